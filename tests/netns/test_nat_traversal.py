"""Nodes behind NATs, with real processes in network namespaces: directly where the NAT lets them, else by relay."""

from __future__ import annotations

import time

import pytest

pytestmark = pytest.mark.netns

MIB = 1 << 20
RECOVERY_S = 20.0


def _has_circuit(info) -> bool:
    return any("p2p-circuit" in address for address in info["addresses"])


async def _two_homes(internet, nat: str, *hosts, **limits):
    """Two nodes behind NATs of their own, connected with the hosts; the first knows the addresses of the second."""
    a, b = await internet.home(nat, **limits), await internet.home(nat, **limits)
    for node in (a, b):
        await internet.connect(node, *hosts)
    for node in (a, b):
        assert (await node.until(_has_circuit))["reach"] == "private"
    await a.knows(b)
    return a, b


async def _works(a, b, size: int = 1000) -> None:
    answer = await a.ask("echo", peer=b.key, size=size, deadline_s=15)
    assert answer.get("same"), answer


@pytest.mark.parametrize("pre_shared_key", [b"", bytes(range(32))], ids=["open", "private"])
async def test_a_hole_is_punched_through_nats_that_keep_ports(internet, pre_shared_key: bytes) -> None:
    internet.pre_shared_key = pre_shared_key
    relay, witness = await internet.host(relay=True), await internet.host(relay=False)
    a, b = await _two_homes(internet, "keeps-ports", relay, witness)
    await a.ask("tunnel", name="early", peer=b.key, deadline_s=15)
    await a.until(lambda info: info["peers"].get(b.key) is False)
    await b.until(lambda info: info["peers"].get(a.key) is False)
    assert (await relay.info())["circuits_total"] == 1

    # A stream that began over the relay goes on; what is new goes the short way.
    assert (await a.ask("through", name="early", size=MIB, deadline_s=30)).get("same")
    carried = (await relay.info())["relayed_bytes"]
    await a.ask("tunnel", name="late", peer=b.key, deadline_s=15)
    assert (await a.ask("through", name="late", size=8 * MIB, deadline_s=60)).get("same")
    await _works(b, a, MIB)
    assert (await relay.info())["relayed_bytes"] - carried < MIB // 4


async def test_nats_that_choose_ports_at_random_leave_the_relay(internet) -> None:
    relay, witness = await internet.host(relay=True), await internet.host(relay=False)
    a, b = await _two_homes(internet, "random-ports", relay, witness)
    await _works(a, b)
    await a.ask("tunnel", name="long", peer=b.key, deadline_s=15)
    assert (await a.ask("through", name="long", size=4 * MIB, deadline_s=60)).get("same")
    assert (await a.info())["peers"][b.key] is True
    assert (await relay.info())["relayed_bytes"] > 8 * MIB


async def test_a_node_with_a_public_address_is_dialed_back(internet) -> None:
    relay, public = await internet.host(relay=True), await internet.host(relay=False, target_peers=0)
    home = await internet.home("random-ports", target_peers=0)  # it looks for nobody by itself
    await internet.connect(home, relay)
    await internet.connect(public, relay)
    await home.until(_has_circuit)
    assert home.key not in (await public.info())["peers"]
    await public.knows(home)
    await _works(public, home)
    await public.until(lambda info: info["peers"].get(home.key) is False)


@pytest.mark.parametrize("how", ["killed", "unplugged"])
async def test_another_relay_takes_over(internet, how: str) -> None:
    relays = [await internet.host(relay=True) for _ in range(2)]
    a, b = await _two_homes(internet, "random-ports", *relays, keepalive_s=1.0)
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
        answer = await a.ask("echo", peer=b.key, size=1000, deadline_s=5)
        if answer.get("same"):
            break
        assert time.monotonic() - began < RECOVERY_S, answer
    assert (await a.info())["peers"][b.key] is True
    await b.until(lambda info: sum("p2p-circuit" in address for address in info["addresses"]) == 1)


async def test_a_relay_keeps_to_its_quotas(internet) -> None:
    small = {"relay_reservations": 2, "relay_member_bytes": MIB}
    relay, witness = await internet.host(relay=True, **small), await internet.host(relay=False)
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
    relay, witness = await internet.host(relay=True), await internet.host(relay=False)
    a, b = await _two_homes(internet, "random-ports", relay, witness)
    for node in (a, b):  # the relay does not take part
        await node.ask("subscribe")
    await _works(a, b)
    await a.until(lambda info: b.key in info["subscribers"])
    await a.ask("publish", text="hello from behind a NAT")
    await b.until(lambda info: info["heard"] == ["hello from behind a NAT"])
    assert (await b.info())["peers"][a.key] is True
