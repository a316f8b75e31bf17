"""Topics: who hears what once, verdicts as they were given, and nothing that a flood could fill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import trio
from immutables import Map

from kaisar_p2p.mesh import GossipMessage
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from kaisar_p2p.wire.verdict import Verdict
from node import topics
from node.inbox import RULES, Inbox, Lane
from node.topics import PARSED, SEEN, Seen, Switchboard, Topic
from protocols.actions import Gossip, RequestEnded
from protocols.adverts import Heartbeat
from protocols.genesis import Genesis, genesis_state, write_genesis
from protocols.interpreter.calls import CLIENT
from protocols.interpreter.state import MachineState, State

OWN, NOW_S = b"\x01" * 32, 1_800_000_000.0
KEYS = KeyPair.from_seed(b"\x07" * 32)


def first_letter(data: bytes, received_at: float, state: State) -> tuple[Verdict, str, Any]:
    """Data that begins with a is accepted, with r rejected, the rest ignored."""
    verdict = {b"a": Verdict.ACCEPT, b"r": Verdict.REJECT}.get(data[:1], Verdict.IGNORE)
    return verdict, f"because of {data[:1]!r}", data.decode() if verdict is Verdict.ACCEPT else None


TEST_TOPICS = {
    "advert": Topic(first_letter, Lane.ADVERT),
    "lease": Topic(first_letter, Lane.LEASE, heavy=True),
    "epoch": Topic(first_letter, Lane.EPOCH),
}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Topics whose messages are words."""
    monkeypatch.setattr(topics, "TOPICS", TEST_TOPICS)
    yield


def switchboard(inbox: Inbox, state: Callable[[], Any] = lambda: None) -> Switchboard:
    return Switchboard(inbox, state, OWN, lambda: NOW_S)


class FakeMesh:
    """Keeps the validators, and the channels that a test writes to."""

    def __init__(self) -> None:
        self.validators: dict[str, Any] = {}
        self.senders: dict[str, trio.MemorySendChannel[Any]] = {}

    def subscribe(
        self, name: str, validate: Any, *, queue: int, heavy: bool, priority: int
    ) -> trio.MemoryReceiveChannel[Any]:
        self.validators[name] = validate
        self.senders[name], receive = trio.open_memory_channel[Any](queue)
        assert (heavy, priority) == (TEST_TOPICS[name].heavy, TEST_TOPICS[name].priority)
        return receive


def judge(mesh: FakeMesh, topic: str, data: bytes, sender: bytes = b"s" * 32) -> tuple[Verdict, str]:
    return mesh.validators[topic](data, sender, sender, NOW_S)  # type: ignore[no-any-return]


# ── validation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted(topics.TOPICS))
@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff" * 300, b"\x92" * 40, bytes(300_000)], ids=lambda data: len(data)
)
def test_gossip__reject_garbage(name: str, data: bytes) -> None:
    state = genesis_state(write_genesis(Genesis("test", "demo", 0)))
    verdict, reason, message = topics.TOPICS[name].validate(data, NOW_S, state)
    assert verdict is Verdict.REJECT
    assert reason
    assert message is None


async def test_verdicts_are_passed_on_and_duplicates_ignored(plain: None) -> None:
    board, mesh = switchboard(Inbox()), FakeMesh()
    async with trio.open_nursery() as nursery:
        await nursery.start(board.run, mesh)
        assert judge(mesh, "advert", b"rude") == (Verdict.REJECT, "because of b'r'")
        assert judge(mesh, "advert", b"rude")[0] is Verdict.REJECT, "a repeated offence stays one"
        assert judge(mesh, "advert", b"later") == (Verdict.IGNORE, "because of b'l'")
        assert judge(mesh, "advert", b"apple")[0] is Verdict.ACCEPT
        assert judge(mesh, "advert", b"apple", b"t" * 32) == (Verdict.IGNORE, "duplicate")
        nursery.cancel_scope.cancel()


async def test_a_message_that_was_too_early_is_judged_again(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    height = [1]

    def needs_height(data: bytes, received_at: float, state: int) -> tuple[Verdict, str, Any]:
        return (Verdict.ACCEPT, "", data) if state >= 2 else (Verdict.IGNORE, "ahead of us", None)

    monkeypatch.setitem(topics.TOPICS, "advert", Topic(needs_height, Lane.ADVERT))  # type: ignore[arg-type]
    board, mesh = switchboard(Inbox(), lambda: height[0]), FakeMesh()
    async with trio.open_nursery() as nursery:
        await nursery.start(board.run, mesh)
        assert judge(mesh, "advert", b"x")[0] is Verdict.IGNORE
        height[0] = 2
        assert judge(mesh, "advert", b"x")[0] is Verdict.ACCEPT
        nursery.cancel_scope.cancel()


# ── delivery ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def received(topic: str, data: bytes) -> Any:
    return GossipMessage(topic, data, b"s" * 32, b"a" * 32, NOW_S - 1)


async def test_what_was_accepted_arrives_with_its_sender_and_time(plain: None) -> None:
    inbox, mesh = Inbox(), FakeMesh()
    board = switchboard(inbox)
    async with trio.open_nursery() as nursery:
        await nursery.start(board.run, mesh)
        judge(mesh, "lease", b"all")
        await mesh.senders["lease"].send(received("lease", b"all"))
        with trio.fail_after(5):
            assert await inbox.get() == Gossip("lease", "all", b"s" * 32, NOW_S - 1)
        nursery.cancel_scope.cancel()


async def test_a_message_without_room_in_the_inbox_may_come_again(plain: None) -> None:
    inbox, mesh = Inbox(), FakeMesh()
    board = switchboard(inbox)
    for n in range(RULES[Lane.EPOCH].length):
        inbox.put(Lane.EPOCH, RequestEnded(str(n), ""))
    async with trio.open_nursery() as nursery:
        await nursery.start(board.run, mesh)
        assert judge(mesh, "epoch", b"again")[0] is Verdict.ACCEPT
        await mesh.senders["epoch"].send(received("epoch", b"again"))
        await trio.testing.wait_all_tasks_blocked()
        while inbox.get_nowait() is not None:
            pass
        assert judge(mesh, "epoch", b"again")[0] is Verdict.ACCEPT
        await mesh.senders["epoch"].send(received("epoch", b"again"))
        with trio.fail_after(5):
            assert (await inbox.get()).message == "again"  # type: ignore[union-attr]
        nursery.cancel_scope.cancel()


async def test_what_the_mesh_drops_after_validation_does_not_pile_up(plain: None) -> None:
    board, mesh = switchboard(Inbox()), FakeMesh()
    async with trio.open_nursery() as nursery:
        await nursery.start(board.run, mesh)
        for n in range(20 * PARSED):  # accepted, and never delivered
            assert judge(mesh, "advert", b"a%d" % n)[0] is Verdict.ACCEPT
        assert sum(map(len, board._parsed.values())) <= PARSED
        assert judge(mesh, "advert", b"a0")[0] is Verdict.ACCEPT, "what never arrived is no duplicate"
        nursery.cancel_scope.cancel()


def test_the_memory_of_duplicates_is_bounded() -> None:
    seen = Seen(3)
    for n in range(5):
        seen.add(bytes([n]))
    assert [bytes([n]) in seen for n in range(5)] == [False, False, True, True, True]
    seen.forget(bytes([4]))
    seen.forget(b"never seen")
    assert bytes([4]) not in seen
    assert SEEN >= 1_000


# ── echo ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_our_own_gossip_reaches_our_own_machines_once(plain: None) -> None:
    inbox, mesh = Inbox(), FakeMesh()
    board = switchboard(inbox)
    async with trio.open_nursery() as nursery:
        await nursery.start(board.run, mesh)
        board.echo("lease", b"all")
        board.echo("lease", b"all")
        board.echo("lease", b"rude")
        assert judge(mesh, "lease", b"all") == (Verdict.IGNORE, "duplicate")
        nursery.cancel_scope.cancel()
    assert inbox.get_nowait() == Gossip("lease", "all", OWN, NOW_S)
    assert inbox.get_nowait() is None


async def test_an_echo_without_room_is_not_held_for_heard(plain: None) -> None:
    inbox = Inbox()
    board = switchboard(inbox)
    for n in range(RULES[Lane.LEASE].length):
        inbox.put(Lane.LEASE, RequestEnded(str(n), ""))
    board.echo("lease", b"all")
    while inbox.get_nowait() is not None:
        pass
    board.echo("lease", b"all")
    assert isinstance(inbox.get_nowait(), Gossip)


# ── over real meshes ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_replay_of_an_old_message_is_ignored_and_costs_its_sender_nothing(lab: Any) -> None:
    first, second = await lab.pair()
    state = genesis_state(write_genesis(Genesis("test", "demo", 0)))
    state = replace(state, machines=Map({KEYS.public_key: MachineState(OWN, CLIENT, 0)}))
    inbox = Inbox()
    board = Switchboard(inbox, lambda: state, second.key, time.time)
    await lab.nursery.start(board.run, second)
    await lab.until(lambda: second.key in first.subscribers("heartbeat"))
    old = seal(Heartbeat(KEYS.public_key, int(time.time() * 1000), CLIENT, 0, 0), KEYS, state.network)
    new = seal(Heartbeat(KEYS.public_key, int(time.time() * 1000) + 1, CLIENT, 0, 0), KEYS, state.network)
    for data in (old, old, old, new):
        await first.publish("heartbeat", data)
    with trio.fail_after(10):
        heard = [await inbox.get(), await inbox.get()]
    assert [event.message.envelope for event in heard] == [old, new]  # type: ignore[union-attr]
    assert second.statistics().messages["heartbeat", "ignore"] == 2
    assert not second.statistics().messages.get(("heartbeat", "reject"))
    assert inbox.get_nowait() is None
    assert second.is_connected(first.key)
