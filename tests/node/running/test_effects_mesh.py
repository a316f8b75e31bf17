"""Effects over real meshes: peers that misbehave, messages that are too large, calls in both directions."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from kaisar_p2p.mesh import MeshStream
from kaisar_p2p.wire.verdict import Verdict
from node.effects import NodeEffects
from node.inbox import RULES, Lane
from protocols import actions as do

ANSWER_BYTES = 1_000


def request(peer: bytes, name: str = "r", deadline_s: float = 10.0, max_frames: int = 2) -> do.Request:
    return do.Request(name, peer, "/test/1", b"question", deadline_s, max_frames)


async def closes(stream: MeshStream) -> None:
    await stream.receive_frame()


async def resets(stream: MeshStream) -> None:
    await stream.receive_frame()
    await stream.reset()


async def fails(stream: MeshStream) -> None:
    raise RuntimeError("a bug of theirs")


async def answers_once(stream: MeshStream) -> None:
    await stream.send_frame(b"one")


async def answers_in_part(stream: MeshStream) -> None:
    await stream.send_frame(b"one")
    await stream.send_some(b"\x00\x00\x00\x10half")


async def announces_too_much(stream: MeshStream) -> None:
    await stream.send_some(b"\xff\xff\xff\xff" + bytes(100))
    await trio.sleep_forever()


async def says_nothing(stream: MeshStream) -> None:
    await trio.sleep_forever()


async def says_one_byte(stream: MeshStream) -> None:
    await stream.send_some(b"\x00")
    await trio.sleep_forever()


async def floods(stream: MeshStream) -> None:
    while True:
        await stream.send_frame(bytes(500))


@pytest.mark.parametrize(
    ("handler", "answers", "deadline_s", "ends_well"),
    [
        (closes, 0, 10.0, False),
        (resets, 0, 10.0, False),
        (fails, 0, 10.0, False),
        (answers_once, 1, 10.0, False),
        (answers_in_part, 1, 10.0, False),
        (announces_too_much, 0, 10.0, False),
        (says_nothing, 0, 0.2, False),
        (says_one_byte, 0, 0.2, False),
        (floods, 2, 10.0, True),
    ],
)
async def test_every_request_to_a_peer_ends_once(
    lab: Any,
    make_effects: Callable[..., NodeEffects],
    events_of: Any,
    handler: Callable[[MeshStream], Awaitable[None]],
    answers: int,
    deadline_s: float,
    ends_well: bool,
) -> None:
    ours, theirs = await lab.pair()
    theirs.serve("/test/1", handler, max_frame_bytes=ANSWER_BYTES)
    effects = make_effects(mesh=ours)
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request(theirs.key, deadline_s=deadline_s)], 1.0)
        events = await events_of(effects.inbox, answers + 1)
        nursery.cancel_scope.cancel()
    assert [type(event) for event in events] == [do.Answer] * answers + [do.RequestEnded]
    assert events[-1].request_id == "r"
    assert (events[-1].error == "") is ends_well
    assert effects.inbox.get_nowait() is None
    assert ours.is_connected(theirs.key)


async def test_requests_that_reach_nobody_end(
    lab: Any, make_effects: Callable[..., NodeEffects], events_of: Any
) -> None:
    ours, theirs = await lab.pair()
    effects = make_effects(mesh=ours)
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request(b"\x42" * 32, "stranger"), request(theirs.key, "no such protocol")], 1.0)
        ends = await events_of(effects.inbox, 2)
        nursery.cancel_scope.cancel()
    assert {end.request_id for end in ends} == {"stranger", "no such protocol"}
    assert all(isinstance(end, do.RequestEnded) and end.error for end in ends)


async def test_two_nodes_ask_and_answer(lab: Any, make_effects: Callable[..., NodeEffects], events_of: Any) -> None:
    ours, theirs = await lab.pair()
    asking, serving = make_effects(mesh=ours), make_effects(mesh=theirs)
    theirs.serve("/test/1", functools.partial(serving.serve, "/test/1"), max_frame_bytes=ANSWER_BYTES, per_peer=64)
    async with trio.open_nursery() as nursery:
        await nursery.start(asking.run)
        await nursery.start(serving.run)
        await asking.perform([request(theirs.key, str(n)) for n in range(20)], 1.0)
        for _ in range(20):
            (incoming,) = await events_of(serving.inbox)
            assert (incoming.peer, incoming.payload) == (ours.key, b"question")
            replies: list[do.Action] = [do.Reply(incoming.call_id, b"a", False), do.Reply(incoming.call_id, b"b")]
            await serving.perform(replies, 1.0)
        events = await events_of(asking.inbox, 60)
        nursery.cancel_scope.cancel()
    for n in range(20):
        mine = [event for event in events if event.request_id == str(n)]
        assert [getattr(event, "payload", None) for event in mine] == [b"a", b"b", None]
        assert mine[-1].error == ""
    await lab.until(lambda: not serving._served)


async def test_a_peer_that_hangs_up_frees_its_call(
    lab: Any, make_effects: Callable[..., NodeEffects], events_of: Any
) -> None:
    ours, theirs = await lab.pair()
    serving = make_effects(mesh=theirs)
    theirs.serve("/test/1", functools.partial(serving.serve, "/test/1"), max_frame_bytes=ANSWER_BYTES)
    stream = await ours.open_stream(theirs.key, "/test/1", timeout_s=5, max_frame_bytes=ANSWER_BYTES)
    await stream.send_frame(b"question")
    (incoming,) = await events_of(serving.inbox)
    await stream.reset()
    # The answer may still be written before the reset arrives; then the next one meets it.
    for _ in range(3):
        await serving.perform([do.Reply(incoming.call_id, b"too late", False)], 1.0)
    await lab.stop(ours)
    await serving.perform([do.Reply(incoming.call_id, b"too late")], 1.0)
    await lab.until(lambda: not serving._served)
    await serving.perform([do.Reply(incoming.call_id, b"much too late")], 1.0)
    assert not theirs.statistics().failed_handlers


async def test_a_full_inbox_turns_requests_away(
    lab: Any, make_effects: Callable[..., NodeEffects], events_of: Any
) -> None:
    ours, theirs = await lab.pair()
    asking, serving = make_effects(mesh=ours), make_effects(mesh=theirs)
    for n in range(RULES[Lane.REQUEST].length):
        serving.inbox.put(Lane.REQUEST, do.RequestEnded(str(n), ""))
    theirs.serve("/test/1", functools.partial(serving.serve, "/test/1"), max_frame_bytes=ANSWER_BYTES)
    async with trio.open_nursery() as nursery:
        await nursery.start(asking.run)
        await asking.perform([request(theirs.key)], 1.0)
        (end,) = await events_of(asking.inbox)
        nursery.cancel_scope.cancel()
    assert end.error
    assert serving.inbox.dropped["request"] == 1


async def test_what_is_too_large_to_publish_is_not_echoed_and_the_next_goes_out(
    lab: Any, make_effects: Callable[..., NodeEffects]
) -> None:
    ours, theirs = await lab.pair()
    heard = theirs.subscribe("advert", lambda *_: (Verdict.ACCEPT, ""))
    await lab.until(lambda: theirs.key in ours.subscribers("advert"))
    effects = make_effects(mesh=ours)
    large = bytes(ours.config.limits.message_bytes + 1)
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([do.Publish("advert", large), do.Publish("advert", b"small")], 1.0)
        with trio.fail_after(10):
            assert (await heard.receive()).data == b"small"
        nursery.cancel_scope.cancel()
    assert effects.switchboard.heard == [("advert", b"small")]  # type: ignore[attr-defined]
