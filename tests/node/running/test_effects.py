"""Effects: journal first, bounded work, and exactly one end for everything that a machine waits for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from kaisar_p2p.errors import HardwareError, LimitExceeded, MeshError, RequestFailed, StoreError
from kaisar_p2p.wire.matproof import Job
from node.driver import Driver
from node.effects import CALL_TIMEOUT_S, QUEUE, REPLY_FRAMES, REQUEST_WORKERS, NodeEffects
from node.inbox import RULES, Inbox, Lane
from node.store import NodeStore
from protocols import actions as do
from protocols.orders import Workload

PEER = b"\x02" * 32
MakeEffects = Callable[..., NodeEffects]
TASK = do.ProveTask(Job(128, 128, 128, 1), bytes(32))
WORKLOAD = Workload("", ("true",), (), ())


def request(name: str, peer: bytes = PEER, deadline_s: float = 5.0, max_frames: int = 1) -> do.Request:
    return do.Request(name, peer, "/test/1", b"question", deadline_s, max_frames)


class Stream:
    """The far end of a stream: frames that come, in order, and an error at their end."""

    peer = PEER

    def __init__(self, *frames: bytes, end: Exception | None = None) -> None:
        self.frames, self.sent = list(frames), []
        self.sent: list[bytes] = []
        self.end = end if end is not None else RequestFailed("the peer ended the stream early")

    async def send_frame(self, frame: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append(frame)

    async def receive_frame(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.frames:
            raise self.end
        return self.frames.pop(0)

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *details: object) -> None:
        await trio.lowlevel.checkpoint()


def answers_with(effects: NodeEffects, make: Callable[[], Any]) -> None:
    async def open_stream(*args: object, **kwargs: object) -> Any:
        await trio.lowlevel.checkpoint()
        return make()

    effects.mesh.open_stream = open_stream  # type: ignore[method-assign]


# ── journal ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_journal_is_written_before_anything_is_done(make_effects: MakeEffects) -> None:
    effects = make_effects()
    published = trio.Event()

    def echo(name: str, data: bytes) -> None:
        published.set()

    effects.switchboard.echo = echo  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([do.Publish("advert", b"x", do.Duty("a", b"1")), do.Store("kind", b"k", b"v")], 1.0)
        with trio.fail_after(5):
            await published.wait()
        nursery.cancel_scope.cancel()
    assert effects.mesh.done == ["commit", "publish"]  # type: ignore[attr-defined]


async def test_a_refused_duty_removes_its_action_and_no_other(
    make_effects: MakeEffects, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = NodeStore(tmp_path / "node.sqlite")
    effects = make_effects(store=store)
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        first = do.Publish("epoch", b"first", do.Duty("vote/1", b"first"))
        await effects.perform([first], 1.0)
        other = do.Publish("epoch", b"other", do.Duty("vote/1", b"other"))
        await effects.perform([other, do.Publish("advert", b"hello"), do.Store("kind", b"k", b"v")], 2.0)
        await effects.perform([first, do.Publish("advert", b"last")], 3.0)
        while (("advert", b"last")) not in effects.switchboard.heard:  # type: ignore[attr-defined]
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    published = effects.mesh.published  # type: ignore[attr-defined]
    assert published == [("epoch", b"first"), ("advert", b"hello"), ("epoch", b"first"), ("advert", b"last")]
    assert store.item("kind", b"k") == b"v"
    assert "vote/1" in caplog.text
    store.close()


async def test_a_refused_duty_removes_a_reply(make_effects: MakeEffects, tmp_path: Path) -> None:
    store = NodeStore(tmp_path / "node.sqlite")
    effects = make_effects(store=store)
    call_id, call = effects._open_call()
    await effects.perform([do.Reply(call_id, b"one", False, do.Duty("commit/1", b"one"))], 1.0)
    await effects.perform([do.Reply(call_id, b"two", False, do.Duty("commit/1", b"two"))], 1.0)
    assert call.receive.statistics().current_buffer_used == 1
    assert call.receive.receive_nowait() == (b"one", False)
    store.close()


async def test_on_a_full_disk_nothing_is_done_until_there_is_room(
    make_effects: MakeEffects, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The ledger's follower waits meanwhile, and then goes on without a gap."""
    effects = make_effects()
    inbox, blocks, seen = effects.inbox, RULES[Lane.BLOCK].length + 20, []
    all_seen = trio.Event()
    effects.store.broken = [StoreError("database or disk is full")] * 3  # type: ignore[attr-defined]

    class Machine:
        deadline = None

        def step(self, event: do.Event, now: float) -> list[do.Action]:
            assert isinstance(event, do.RequestEnded)
            seen.append(event.request_id)
            if len(seen) == blocks:
                all_seen.set()
            return [do.Publish("advert", b"signed", do.Duty("a", b"1"))] if len(seen) == 1 else []

    async def follow_ledger() -> None:
        for number in range(blocks):
            await inbox.put_patiently(Lane.BLOCK, do.RequestEnded(str(number), ""))

    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        nursery.start_soon(Driver([Machine()], inbox, effects, effects.clock).run)
        nursery.start_soon(follow_ledger)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["0"]
        assert effects.mesh.published == []  # type: ignore[attr-defined]
        await all_seen.wait()
        nursery.cancel_scope.cancel()
    assert seen == [str(number) for number in range(blocks)]
    assert effects.mesh.published == [("advert", b"signed")]  # type: ignore[attr-defined]
    assert len(effects.store.commits) == 1  # type: ignore[attr-defined]
    assert caplog.text.count("disk is full") == 3


async def test_a_step_that_ends_after_the_workers_does_not_break_the_end_of_the_node(make_effects: MakeEffects) -> None:
    """While a node is cancelled, its workers may go before its driver has handed over what it decided last."""
    effects = make_effects()
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        nursery.cancel_scope.cancel()
    await effects.perform([do.Publish("advert", b"x"), request("late")], 1.0)
    assert not effects.inbox.dropped


async def test_several_tasks_may_journal_at_the_same_time(make_effects: MakeEffects, tmp_path: Path) -> None:
    store = NodeStore(tmp_path / "node.sqlite")
    effects = make_effects(store=store)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for number in range(30):
                note = do.Note("test", (("number", number),))
                nursery.start_soon(effects.perform, [note, do.Store("kind", bytes([number]), b"v")], 1.0)
            nursery.start_soon(trio.to_thread.run_sync, store.prune, 1.0, {"kind": 100})
    assert sorted(event.data["number"] for event in store.events(0, 100)) == list(range(30))
    assert len(list(store.items("kind"))) == 30
    store.close()


async def test_who_waits_for_notes_is_woken(make_effects: MakeEffects) -> None:
    effects = make_effects()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(effects.wait_for_note)
        await trio.testing.wait_all_tasks_blocked()
        await effects.perform([do.Note("something")], 1.0)
        with trio.fail_after(5):
            await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_to_oneself_takes_the_same_path(make_effects: MakeEffects, events_of: Any) -> None:
    effects = make_effects()
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request("own", effects.mesh.key, max_frames=5)], 1.0)
        (incoming,) = await events_of(effects.inbox)
        assert isinstance(incoming, do.Incoming)
        assert (incoming.peer, incoming.protocol, incoming.payload) == (effects.mesh.key, "/test/1", b"question")
        await effects.perform([do.Reply(incoming.call_id, b"a", False), do.Reply(incoming.call_id, b"b", True)], 1.0)
        first, second, end = await events_of(effects.inbox, 3)
        nursery.cancel_scope.cancel()
    assert [first.payload, second.payload] == [b"a", b"b"]
    assert end == do.RequestEnded("own", "")
    assert not effects._served


async def test_a_request_to_oneself_that_nobody_answers_ends(
    make_effects: MakeEffects, autojump_clock: trio.testing.MockClock, events_of: Any
) -> None:
    effects = make_effects()
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request("own", effects.mesh.key)], 1.0)
        incoming, end = await events_of(effects.inbox, 2)
        nursery.cancel_scope.cancel()
    assert end == do.RequestEnded("own", "timed out")
    assert not effects._served
    await effects.perform([do.Reply(incoming.call_id, b"too late")], 9.0)


async def test_more_requests_than_workers_wait_for_their_turn(make_effects: MakeEffects) -> None:
    effects = make_effects()
    opened, go = [], trio.Event()

    async def open_stream(peer: bytes, *args: object, **kwargs: object) -> Stream:
        opened.append(peer)
        await go.wait()
        return Stream(b"answer")

    effects.mesh.open_stream = open_stream  # type: ignore[assignment]
    total = REQUEST_WORKERS + 30
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request(str(n)) for n in range(total)], 1.0)
        await trio.testing.wait_all_tasks_blocked()
        assert len(opened) == REQUEST_WORKERS
        go.set()
        with trio.fail_after(10):
            events = [await effects.inbox.get() for _ in range(2 * total)]
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert effects.inbox.get_nowait() is None
    ends = [event for event in events if isinstance(event, do.RequestEnded)]
    assert sorted(end.request_id for end in ends) == sorted(str(n) for n in range(total))
    assert {end.error for end in ends} == {""}


async def test_requests_beyond_the_queue_end_at_once_even_if_the_inbox_is_full(make_effects: MakeEffects) -> None:
    effects = make_effects()

    async def never(*args: object, **kwargs: object) -> Stream:
        await trio.sleep_forever()
        raise AssertionError

    effects.mesh.open_stream = never  # type: ignore[assignment]
    for n in range(RULES[Lane.RESULT].length):
        effects.inbox.put(Lane.RESULT, do.RequestEnded(f"older {n}", ""))
    room = QUEUE + REQUEST_WORKERS
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await trio.testing.wait_all_tasks_blocked()
        await effects.perform([request(str(n)) for n in range(room + 7)], 1.0)
        nursery.cancel_scope.cancel()
    events = []
    while (event := effects.inbox.get_nowait()) is not None:
        events.append(event)
    refused = [event for event in events if event.error]
    assert [event.request_id for event in refused] == [str(n) for n in range(room, room + 7)]
    assert effects.inbox.dropped["effect-request"] == 7


async def test_work_and_deployments_beyond_the_queue_are_reported(make_effects: MakeEffects) -> None:
    effects = make_effects()  # without workers every queue is full
    actions: list[do.Action] = [
        do.Compute("work", TASK),
        do.Deploy(b"\x05" * 32, WORKLOAD, 1, 1, 1, 0),
        do.Probe("probe", bytes(32), PEER, 80, 1.0),
        do.Publish("advert", b"x"),
    ]
    await effects.perform(actions, 1.0)
    done, report = effects.inbox.get_nowait(), effects.inbox.get_nowait()
    assert isinstance(done, do.WorkDone)
    assert (done.work_id, done.result) == ("work", None)
    assert done.error
    assert isinstance(report, do.ContainerReport)
    assert (report.order_id, report.phase) == (b"\x05" * 32, "failed")
    probed = effects.inbox.get_nowait()
    assert isinstance(probed, do.ProbeReport)
    assert (probed.probe_id, probed.up, probed.local) == ("probe", False, True)
    assert effects.inbox.get_nowait() is None


async def test_answers_wait_for_room_in_the_inbox(make_effects: MakeEffects) -> None:
    effects = make_effects()
    answers_with(effects, lambda: Stream(b"one", b"two"))
    limit = RULES[Lane.RESULT].length
    for n in range(limit):
        effects.inbox.put(Lane.RESULT, do.RequestEnded(f"older {n}", ""))
    names = [str(n) for n in range(10)]
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request(name, max_frames=2) for name in names], 1.0)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(10):
            events = [await effects.inbox.get() for _ in range(limit + 3 * len(names))]
        nursery.cancel_scope.cancel()
    for name in names:
        mine = [event for event in events if getattr(event, "request_id", "") == name]
        assert [getattr(event, "payload", None) for event in mine] == [b"one", b"two", None]
        assert mine[-1] == do.RequestEnded(name, "")


@pytest.mark.parametrize(
    ("far_end", "answers", "error"),
    [
        (lambda: Stream(b"a", b"b"), 2, ""),
        (lambda: Stream(b"a"), 1, "the peer ended the stream early"),
        (lambda: Stream(), 0, "the peer ended the stream early"),
        (lambda: Stream(end=MeshError("no such peer")), 0, "no such peer"),
        (lambda: Stream(end=RuntimeError("a bug")), 0, "failed here: the log says why"),
        (lambda: Stream(b"a", end=ValueError("a bug")), 1, "failed here: the log says why"),
    ],
)
async def test_every_request_ends_once(
    make_effects: MakeEffects, far_end: Callable[[], Stream], answers: int, error: str, events_of: Any
) -> None:
    effects = make_effects()
    answers_with(effects, far_end)
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request("r", max_frames=2)], 1.0)
        events = await events_of(effects.inbox, answers + 1)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert all(isinstance(event, do.Answer) for event in events[:-1])
    assert events[-1] == do.RequestEnded("r", error, local=error.startswith("failed here"))
    assert effects.inbox.get_nowait() is None


@pytest.mark.parametrize(
    ("end", "connected", "local"),
    [
        (RequestFailed("the peer ended the stream early"), [PEER], False),
        (RequestFailed("the peer ended the stream early"), [], True),  # we have lost everybody, not only this peer
        (LimitExceeded("one of our own bounds"), [PEER], True),
    ],
)
async def test_a_request_says_whether_its_failure_was_ours(
    make_effects: MakeEffects, end: Exception, connected: list[bytes], local: bool, events_of: Any
) -> None:
    effects = make_effects()
    effects.mesh.connected = connected  # type: ignore[attr-defined]
    answers_with(effects, lambda: Stream(end=end))
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request("r")], 1.0)
        (ended,) = await events_of(effects.inbox)
        nursery.cancel_scope.cancel()
    assert ended.error and ended.local is local


async def test_our_own_full_inbox_does_not_use_up_the_peers_time(
    make_effects: MakeEffects, autojump_clock: trio.testing.MockClock
) -> None:
    effects, limit = make_effects(), RULES[Lane.RESULT].length
    answers_with(effects, lambda: Stream(b"one", b"two"))
    for n in range(limit):
        effects.inbox.put(Lane.RESULT, do.RequestEnded(f"older {n}", ""))
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([request("r", deadline_s=2.0, max_frames=2)], 1.0)
        await trio.sleep(60)
        events = [await effects.inbox.get() for _ in range(limit + 3)][limit:]
        nursery.cancel_scope.cancel()
    assert [getattr(event, "payload", None) for event in events] == [b"one", b"two", None]
    assert events[-1] == do.RequestEnded("r", "")


async def test_a_peer_that_never_answers_costs_the_deadline_and_no_more(
    make_effects: MakeEffects, autojump_clock: trio.testing.MockClock, events_of: Any
) -> None:
    effects = make_effects()

    class Silent(Stream):
        async def receive_frame(self) -> bytes:
            await trio.sleep_forever()
            raise AssertionError

    answers_with(effects, Silent)
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        began = trio.current_time()
        await effects.perform([request("r", deadline_s=7.0)], 1.0)
        assert await events_of(effects.inbox) == [do.RequestEnded("r", "timed out")]
        assert trio.current_time() - began == pytest.approx(7.0)
        nursery.cancel_scope.cancel()


# ── served calls ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_call_that_no_machine_answers_ends_and_frees_its_place(
    make_effects: MakeEffects, autojump_clock: trio.testing.MockClock
) -> None:
    effects = make_effects()
    began = trio.current_time()
    await effects.serve("/test/1", Stream(b"question"))  # type: ignore[arg-type]
    assert trio.current_time() - began == pytest.approx(CALL_TIMEOUT_S)
    assert not effects._served


async def test_a_call_is_closed_when_the_inbox_is_full(make_effects: MakeEffects) -> None:
    effects = make_effects()
    for n in range(RULES[Lane.REQUEST].length):
        effects.inbox.put(Lane.REQUEST, do.RequestEnded(str(n), ""))
    with trio.fail_after(5):
        await effects.serve("/test/1", Stream(b"question"))  # type: ignore[arg-type]
    assert not effects._served


async def test_a_peer_that_does_not_read_gets_no_answer_with_a_gap(make_effects: MakeEffects, events_of: Any) -> None:
    effects = make_effects()

    class Slow(Stream):
        reading = trio.Event()

        async def send_frame(self, frame: bytes) -> None:
            await self.reading.wait()
            self.sent.append(frame)

    stream, failures = Slow(b"question"), []

    async def serve() -> None:
        try:
            await effects.serve("/test/1", stream)  # type: ignore[arg-type]
        except MeshError as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        (incoming,) = await events_of(effects.inbox)
        replies: list[do.Action] = [do.Reply(incoming.call_id, bytes([n]), False) for n in range(REPLY_FRAMES + 3)]
        await effects.perform(replies, 1.0)
        await effects.perform([do.Reply(incoming.call_id, b"last", True)], 1.0)
        stream.reading.set()
    assert stream.sent == [bytes([n]) for n in range(len(stream.sent))]
    assert b"last" not in stream.sent
    assert len(failures) == 1
    assert not effects._served


# ── other effects ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_work_that_fails_is_reported_and_the_next_is_done(
    make_effects: MakeEffects, events_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[Any] = ["result", ValueError("a bug"), HardwareError("out of memory")]

    class Computer:
        async def run(self, task: object) -> object:
            await trio.lowlevel.checkpoint()
            outcome = outcomes.pop()
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

    effects = make_effects(computer=Computer())
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        with caplog.at_level(logging.ERROR):
            await effects.perform([do.Compute(name, TASK) for name in ("a", "b", "c")], 1.0)
            events = await events_of(effects.inbox, 3)
        nursery.cancel_scope.cancel()
    assert [event.result for event in events] == [None, None, "result"]
    assert events[0].error == "out of memory"
    assert events[1].error
    assert events[2].error == ""
    assert "a bug" in caplog.text


async def test_a_runtime_with_a_bug_fails_the_deployment(make_effects: MakeEffects, events_of: Any) -> None:
    class Containers:
        async def deploy(self, action: do.Deploy) -> None:
            raise RuntimeError("a bug")

        async def stop(self, order_id: bytes) -> None:
            raise RuntimeError("a bug")

    effects = make_effects(containers=Containers())
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([do.Stop(b"\x05" * 32), do.Deploy(b"\x05" * 32, WORKLOAD, 1, 1, 1, 0)], 1.0)
        (report,) = await events_of(effects.inbox)
        nursery.cancel_scope.cancel()
    assert (report.order_id, report.phase) == (b"\x05" * 32, "failed")


async def test_probes_and_calls_reach_their_adapters(make_effects: MakeEffects, events_of: Any) -> None:
    submitted: list[tuple[str, bytes]] = []

    class Adapter:
        async def probe(self, order_id: bytes, worker: bytes, port: int, deadline_s: float) -> tuple[bool, str, bool]:
            return port == 80, f"port {port}", port < 90

        async def submit_once(self, key: str, payload: bytes) -> None:
            if key == "bad":
                raise RuntimeError("a bug")
            submitted.append((key, payload))

    adapter = Adapter()
    effects = make_effects(prober=adapter, submitter=adapter)
    async with trio.open_nursery() as nursery:
        await nursery.start(effects.run)
        await effects.perform([do.Submit("bad", b""), do.Submit("good", b"call")], 1.0)
        await effects.perform([do.Probe("p", bytes(32), PEER, 80, 1.0)], 1.0)
        assert await events_of(effects.inbox) == [do.ProbeReport("p", True, "port 80")]
        await effects.perform(
            [do.Probe("down", bytes(32), PEER, 81, 1.0), do.Probe("gone", bytes(32), PEER, 90, 1.0)], 1.0
        )
        down, gone = sorted(await events_of(effects.inbox, 2), key=lambda report: report.probe_id)
        assert (down.answered, down.local, gone.answered, gone.local) == (True, False, False, False)
        effects.mesh.connected.clear()  # type: ignore[attr-defined]
        await effects.perform([do.Probe("alone", bytes(32), PEER, 90, 1.0)], 1.0)
        (alone,) = await events_of(effects.inbox)
        assert alone.local  # nobody is gone because we are
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert submitted == [("good", b"call")]


async def test_all_who_wait_for_room_get_it(autojump_clock: trio.testing.MockClock) -> None:
    inbox, producers = Inbox(), 40
    for n in range(RULES[Lane.RESULT].length):
        inbox.put(Lane.RESULT, do.RequestEnded(str(n), ""))
    async with trio.open_nursery() as nursery:
        for n in range(producers):
            nursery.start_soon(inbox.put_patiently, Lane.RESULT, do.RequestEnded(f"late {n}", ""))
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(60):
            got = [await inbox.get() for _ in range(RULES[Lane.RESULT].length + producers)]
    late = [event.request_id for event in got if event.request_id.startswith("late")]
    assert sorted(late) == sorted(f"late {n}" for n in range(producers))
