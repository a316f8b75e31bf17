"""Nodes behind NATs, with real processes in network namespaces: directly where the NAT lets them, else by relay."""

from __future__ import annotations

import time

import pytest
import trio

from tests.netns.conftest import together

pytestmark = pytest.mark.netns

MIB = 1 << 20
RECOVERY_S = 15.0
WATCHED_S = 30.0


def _has_circuit(info) -> bool:
    return any("p2p-circuit" in address for address in info["addresses"])


async def _two_homes(internet, nat: str, *hosts, **limits):
    """Two nodes behind NATs of their own, connected with the hosts; the first knows the addresses of the second."""
    a, b = await together(internet.home(nat, **limits), internet.home(nat, **limits))
    await _settle(internet, a, b, *hosts)
    return a, b


async def _settle(internet, a, b, *hosts) -> None:
    """Until both nodes have connected with the hosts and found a relay; the first knows the second's addresses."""
    await together(*(internet.connect(node, *hosts) for node in (a, b)))
    for found in await together(*(node.until(_has_circuit) for node in (a, b))):
        assert found["reach"] == "private"
    await a.knows(b)


async def _direct(a, b, within_s: float = 45.0) -> None:
    """Until both use a direct connection."""
    await together(
        a.until(lambda info: info["peers"].get(b.key) is False, within_s),
        b.until(lambda info: info["peers"].get(a.key) is False, within_s),
    )


async def _works(a, b, size: int = 1000) -> None:
    answer = await a.ask("echo", peer=b.key, size=size, deadline_s=15)
    assert answer.get("same"), answer


@pytest.mark.parametrize("pre_shared_key", [b"", bytes(range(32))], ids=["open", "private"])
async def test_a_hole_is_punched_through_nats_that_keep_ports(internet, pre_shared_key: bytes) -> None:
    internet.pre_shared_key = pre_shared_key
    relay, witness = await together(internet.host(relay=True), internet.host(relay=False))
    a, b = await _two_homes(internet, "keeps-ports", relay, witness)
    await a.ask("tunnel", name="early", peer=b.key, deadline_s=15)
    await _direct(a, b)
    assert (await relay.info())["circuits_total"] == 1

    # A stream that began over the relay goes on; what is new goes the short way.
    assert (await a.ask("through", name="early", size=MIB, deadline_s=30)).get("same")
    carried = (await relay.info())["relayed_bytes"]
    await a.ask("tunnel", name="late", peer=b.key, deadline_s=15)
    assert (await a.ask("through", name="late", size=8 * MIB, deadline_s=60)).get("same")
    await _works(b, a, MIB)
    assert (await relay.info())["relayed_bytes"] - carried < MIB // 4


async def test_a_hole_is_punched_over_slow_lines(internet) -> None:
    """30 ms and 80 ms to the internet, each way: both dial so that their first packets meet on the way."""
    relay, witness = await together(internet.host(relay=True), internet.host(relay=False))
    await together(*(_punch_over_slow_lines(internet, relay, witness, loss) for loss in (0.0, 0.01)))


async def _punch_over_slow_lines(internet, relay, witness, loss: float) -> None:
    a, b = await together(*(internet.home("keeps-ports", delay_s=delay_s, loss=loss) for delay_s in (0.03, 0.08)))
    await _settle(internet, a, b, relay, witness)
    began = time.monotonic()
    await a.ask("tunnel", name="early", peer=b.key, deadline_s=15)
    opened = time.monotonic()
    while (await a.info())["peers"].get(b.key) is not False:
        await _works(a, b)  # also at the very moment of the change
        assert time.monotonic() - opened < 45
    await _direct(a, b)
    punched = time.monotonic()
    assert (await a.ask("through", name="early", size=MIB // 16, deadline_s=60)).get("same")
    await together(_works(a, b, MIB // 4), _works(b, a, MIB // 4))
    apart_s = abs(a.line.dialed(b.host) - b.line.dialed(a.host))
    print(f"{loss=}: relayed after {opened - began:.2f} s, direct after {punched - began:.2f} s, {apart_s=:.3f}")
    assert apart_s < 0.5


async def test_nats_that_choose_ports_at_random_leave_the_relay(internet) -> None:
    relay, witness = await together(internet.host(relay=True), internet.host(relay=False))
    a, b = await _two_homes(internet, "random-ports", relay, witness)
    await _works(a, b)
    await a.ask("tunnel", name="long", peer=b.key, deadline_s=15)
    assert (await a.ask("through", name="long", size=4 * MIB, deadline_s=60)).get("same")
    assert (await a.info())["peers"][b.key] is True
    assert (await relay.info())["relayed_bytes"] > 8 * MIB


async def test_a_node_with_a_public_address_is_dialed_back(internet) -> None:
    relay, public, home = await together(
        internet.host(relay=True),
        internet.host(relay=False, target_peers=0),
        internet.home("random-ports", target_peers=0),  # it looks for nobody by itself
    )
    await together(internet.connect(home, relay), internet.connect(public, relay))
    await home.until(_has_circuit)
    assert home.key not in (await public.info())["peers"]
    await public.knows(home)
    await _works(public, home)
    await public.until(lambda info: info["peers"].get(home.key) is False)


@pytest.mark.parametrize("how", ["killed", "unplugged"])
async def test_another_relay_takes_over(internet, how: str) -> None:
    """A cut cable costs what is on the way, no more: what comes after does not wait until the relay counts as dead."""
    relays = await internet.hosts(2, relay=True)
    a, b = await _two_homes(internet, "random-ports", *relays)
    await b.until(lambda info: sum("p2p-circuit" in address for address in info["addresses"]) == 2)
    await a.knows(b)
    await _works(a, b)
    used = [relay for relay in relays if (await relay.info())["circuits"]]
    assert len(used) == 1
    if how == "killed":
        used[0].kill()
    else:
        internet.unplug(used[0])
    began = time.monotonic()
    while True:
        answer = await a.ask("echo", peer=b.key, size=1000, deadline_s=2)
        if answer.get("same"):
            break
        assert time.monotonic() - began < RECOVERY_S, answer
    print(f"recovered from a relay that was {how} after {time.monotonic() - began:.1f} s")
    assert (await a.info())["peers"][b.key] is True
    if how == "killed":  # the other is missed after half a minute
        await b.until(lambda info: sum("p2p-circuit" in address for address in info["addresses"]) == 1)


async def test_a_relay_keeps_to_its_quotas(internet) -> None:
    small = {"relay_reservations": 2, "relay_member_bytes": MIB}
    relay, witness = await together(internet.host(relay=True, **small), internet.host(relay=False))
    a, b = await _two_homes(internet, "random-ports", relay, witness)
    late = await internet.home("random-ports")
    await internet.connect(late, relay, witness)
    await late.until(lambda info: info["reach"] == "private")
    await relay.until(lambda info: info["refused"].get("reservations", 0) > 0)
    assert not _has_circuit(await late.info())

    await a.ask("tunnel", name="bulk", peer=b.key, deadline_s=15)
    answer = await a.ask("through", name="bulk", size=4 * MIB, deadline_s=60)
    assert answer.get("error", "").startswith("RequestFailed") or answer.get("same") is False
    assert (await relay.info())["refused"]["data"] == 1
    await _works(a, b)  # a new circuit, for a while


async def test_gossip_crosses_a_relay(internet) -> None:
    relay, witness = await together(internet.host(relay=True), internet.host(relay=False))
    a, b = await _two_homes(internet, "random-ports", relay, witness)
    for node in (a, b):  # the relay does not take part
        await node.ask("subscribe")
    await _works(a, b)
    await a.until(lambda info: b.key in info["subscribers"])
    await a.ask("publish", text="hello from behind a NAT")
    await b.until(lambda info: info["heard"] == ["hello from behind a NAT"])
    assert (await b.info())["peers"][a.key] is True


async def test_nothing_goes_back_and_forth(internet) -> None:
    """Half a minute with everything at once: a port that a router forwards, holes and relays.

    Two nodes take the best way, once. Two others cannot, try again and again, and leave no socket of that behind.
    """
    internet.punching = {"_AGAIN_S": (0.5,), "_PUNCH_S": 1.0}
    hosts = await internet.hosts(2, relay=True)
    a, b, c, d = await together(
        internet.home("keeps-ports"),
        internet.home("keeps-ports", upnp=True),
        internet.home("random-ports", punches_per_s=10.0),
        internet.home("random-ports", punches_per_s=10.0),
    )
    await together(internet.connect(b, *hosts), _settle(internet, a, d, *hosts), _settle(internet, c, d, *hosts))
    await b.until(lambda info: info["reached_at"])
    await b.knows(a)
    await together(_works(b, a), _works(c, d))
    await together(_direct(a, b), d.until(lambda info: info["punched"] >= 1))
    await _stay(a, b, c, d, WATCHED_S)


async def _stay(a, b, c, d, for_s: float) -> None:
    """The connections of a with b, and c with d, and the open files, are the same after a while of use."""
    before = await together(*(node.info() for node in (a, b, c, d)))
    began = time.monotonic()
    while time.monotonic() - began < for_s:
        await together(_works(a, b), _works(b, a), _works(c, d), _works(d, c))
        await trio.sleep(0.5)
    assert (await d.info())["punched"] >= before[3]["punched"] + 2
    for node, peer, first in zip((a, b, c, d), (b, a, d, c), before, strict=True):
        last = await node.until(lambda info, first=first: info["open_files"] <= first["open_files"] + 2)
        assert _with(peer, last) == _with(peer, first)
    assert _with(b, before[0])["relayed"] <= 1
    assert 1 <= _with(b, before[0])["direct"] <= 2
    assert _with(d, before[2]) == {"relayed": 1, "direct": 0}


def _with(peer, info) -> dict[str, int]:
    """How many connections with a peer there have been so far, by kind."""
    return {kind: info["joined"].get(f"{peer.key} {kind}", 0) for kind in ("relayed", "direct")}
