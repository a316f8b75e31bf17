"""The worker's side of a check: gather challenges, prove once, answer all seats with one commitment (role provider).

A run goes GATHERING → PROVING → (HELD, faults only) → ANSWERED, or to REFUSED when T challenges did not come in time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from kaisar_p2p.wire import matproof
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair, sha256
from kaisar_p2p.wire.envelope import Signed, Verified, seal
from kaisar_p2p.wire.judge import peek_signed
from protocols.actions import (
    Action,
    BlockApplied,
    Compute,
    Duty,
    Event,
    Incoming,
    Note,
    ProveTask,
    Publish,
    Reply,
    Wake,
    WorkDone,
)
from protocols.committees import check_committee
from protocols.due import due_check, may_be_checked
from protocols.equivocation import EVIDENCE_TOPIC, DoubleChallenge
from protocols.interpreter.calls import CHECKER
from protocols.interpreter.events import SlotStarted
from protocols.interpreter.state import State
from protocols.popw import (
    CHALLENGE_PROTOCOL,
    ENVELOPE_BYTES_MAX,
    Challenge,
    Commit,
    Tags,
    check_horizon_slots,
    recheck_slots,
    seed_of,
    validate_challenge,
)
from protocols.quorum import MAX_SEATS, Committee
from protocols.recheck import MAX_RECHECKS, can_be_recheck

NOTHING = b""
"""The last, empty frame to a seat that gets no commitment."""
CALLS_PER_SEAT = 4
MAX_EARLY = 4 * MAX_SEATS


@dataclass(frozen=True)
class WorkerFaults:
    """How a worker misbehaves, for tests and for swarms with adversaries: wrong tags, a late answer, or none at all."""

    wrong_tiles: int = 0
    delay_s: float = 0.0
    silent: bool = False


class Phase(Enum):
    """Where a run is."""

    GATHERING = auto()
    PROVING = auto()
    HELD = auto()
    ANSWERED = auto()
    REFUSED = auto()


@dataclass
class Run:
    """One slot's run: the challenges, who waits for the answer, and the answer."""

    slot: int
    committee: Committee
    phase: Phase = Phase.GATHERING
    challenges: dict[int, Verified[Challenge]] = field(default_factory=dict)
    calls: dict[int, list[int]] = field(default_factory=dict)
    accused: set[int] = field(default_factory=set)
    close_at: float | None = None
    start_at: float | None = None
    answer_at: float | None = None
    seats: tuple[int, ...] = ()
    commit: bytes = b""
    tags: bytes = b""
    duty: Duty | None = None

    @property
    def deadline(self) -> float | None:
        """When this run wants to be woken."""
        if self.phase is Phase.GATHERING:
            return self.close_at if self.start_at is None else self.start_at
        return self.answer_at if self.phase is Phase.HELD else None


class WorkerCheckMachine:
    """Answers the check committees of this machine's slots."""

    def __init__(self, keys: KeyPair, faults: WorkerFaults | None = None) -> None:
        """`faults` is for tests only; without it the machine is honest."""
        self._keys = keys
        self._faults = faults or WorkerFaults()
        self._state: State | None = None
        self._runs: dict[int, Run] = {}
        self._due_slots: set[int] = set()
        self._early: dict[bytes, Incoming] = {}

    @property
    def deadline(self) -> float | None:
        """The end of the nearest wait for challenges."""
        return min((run.deadline for run in self._runs.values() if run.deadline is not None), default=None)

    def step(self, event: Event, now: float) -> list[Action]:
        """React to one event."""
        match event:
            case BlockApplied():
                return self._block(event, now)
            case Incoming(protocol=protocol) if protocol == CHALLENGE_PROTOCOL:
                return [] if self._faults.silent else self._incoming(event, now)
            case WorkDone(work_id=work_id) if work_id.startswith("prove/"):
                return self._work_done(event, now)
            case Wake():
                return self._wake(now)
            case _:
                return []

    # ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self, event: BlockApplied, now: float) -> list[Action]:
        self._state = state = event.state
        oldest = state.slot - check_horizon_slots(state.params)
        actions: list[Action] = []
        for slot in [slot for slot in self._runs if slot < oldest]:
            actions += _refuse_all(self._runs.pop(slot))
        for started in event.events:
            if isinstance(started, SlotStarted):
                self._open_run(state, started.slot)
        early = [call for call in self._early.values() if _slot_of(call) <= state.slot]
        for call in early:
            del self._early[call.peer]
            actions += self._incoming(call, now)
        return actions

    def _open_run(self, state: State, slot: int) -> None:
        """Whether this worker is due is decided from the state at the slot's first block, as its seats do."""
        key, params = self._keys.public_key, state.params
        again = may_be_checked(state, slot, key) and can_be_recheck(self._due_slots, slot, params)
        due = due_check(state, slot, key) is not None
        self._due_slots = {each for each in self._due_slots if each >= slot - MAX_RECHECKS * recheck_slots(params)}
        if due:
            self._due_slots.add(slot)
        committee = check_committee(state, slot, key) if due or again else None
        if committee is not None and slot not in self._runs:
            self._runs[slot] = Run(slot, committee)

    # ── challenges ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _incoming(self, event: Incoming, now: float) -> list[Action]:
        refusal: list[Action] = [Reply(event.call_id, NOTHING)]
        seen = peek_signed(Challenge, event.payload, ENVELOPE_BYTES_MAX)
        if seen is None or self._state is None:
            return refusal
        slot = seen[1].slot
        if slot == self._state.slot + 1 or (slot == 0 and self._state.number < 0):
            return self._keep_early(event, self._state)
        run = self._runs.get(slot)
        if run is None or slot < self._state.slot - check_horizon_slots(self._state.params):
            return refusal
        _, _, verified = validate_challenge(
            event.payload, event.peer, self._keys.public_key, run.committee, self._state
        )
        if verified is None:
            return refusal
        return self._challenged(run, verified, event.call_id, now)

    def _keep_early(self, event: Incoming, state: State) -> list[Action]:
        """A seat that applied the slot's first block before us: wait for the block. One call of each that may be drawn.

        Keys without stake, which anybody can have, must not take the places of seats.
        """
        if not _may_be_drawn(state, event.peer) or len(self._early) >= MAX_EARLY:
            return [Reply(event.call_id, NOTHING)]
        replaced = self._early.pop(event.peer, None)
        self._early[event.peer] = event
        return [Reply(replaced.call_id, NOTHING)] if replaced else []

    def _challenged(self, run: Run, challenge: Verified[Challenge], call_id: int, now: float) -> list[Action]:
        assert self._state is not None
        seat = challenge.message.seat
        first = run.challenges.setdefault(seat, challenge)
        if first.message != challenge.message:
            return [Reply(call_id, NOTHING), *_accuse(run, first, challenge)]
        calls = run.calls.setdefault(seat, [])
        if run.phase is Phase.REFUSED or len(calls) >= CALLS_PER_SEAT:
            return [Reply(call_id, NOTHING)]
        if run.phase is Phase.ANSWERED:
            return _answers(run, call_id)
        calls.append(call_id)
        if run.phase is not Phase.GATHERING:
            return []
        if run.close_at is None:
            run.close_at = now + self._state.params.challenge_wait_ms / 1000
        count = len(run.challenges)
        if count >= len(run.committee.seats):
            return self._start(run)
        if count >= run.committee.threshold and run.start_at is None:
            run.start_at = now + self._state.params.challenge_gather_ms / 1000
        return []

    def _wake(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for run in self._runs.values():
            if run.deadline is None or run.deadline > now:
                continue
            if run.phase is Phase.HELD:
                actions += _answer_all(run)
            elif len(run.challenges) >= run.committee.threshold:
                actions += self._start(run)
            else:
                run.phase = Phase.REFUSED
                actions += _refuse_all(run)
        return actions

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, run: Run) -> list[Action]:
        assert self._state is not None
        run.phase, run.seats = Phase.PROVING, tuple(sorted(run.challenges))
        job, network = self._state.params.job, self._state.network
        seed = seed_of(self._commit(run, ()), self._state.beacons[run.slot], network)
        return [Compute(f"prove/{run.slot}", ProveTask(job, seed))]

    def _commit(self, run: Run, roots: tuple[bytes, ...]) -> Commit:
        assert self._state is not None
        params = self._state.params
        asked = [run.challenges[seat] for seat in run.seats]
        return Commit(
            epoch=params.epoch_of_slot(run.slot),
            slot=run.slot,
            worker=self._keys.public_key,
            job=params.job.pack(),
            mask=sum(1 << seat for seat in run.seats),
            values=tuple(challenge.message.value for challenge in asked),
            signatures=tuple(decode(Signed, challenge.envelope).signature for challenge in asked),
            roots=roots,
        )

    def _work_done(self, event: WorkDone, now: float) -> list[Action]:
        run = next((run for run in self._runs.values() if event.work_id == f"prove/{run.slot}"), None)
        if run is None or run.phase is not Phase.PROVING or self._state is None:
            return []
        if event.result is None:
            run.phase = Phase.REFUSED
            return [Note("proof_failed", (("slot", run.slot), ("error", event.error[:200]))), *_refuse_all(run)]
        roots, tags = _with_faults(event.result, self._faults)
        run.commit = seal(self._commit(run, roots), self._keys, self._state.network)
        run.tags = encode(Tags(tuple(sent.astype("<u4", copy=False).tobytes() for sent in tags)))
        run.duty = Duty(f"commit/{run.slot}", sha256(run.commit))
        if self._faults.delay_s > 0:
            run.phase, run.answer_at = Phase.HELD, now + self._faults.delay_s
            return []
        return _answer_all(run)


def _may_be_drawn(state: State, key: bytes) -> bool:
    """Whether a key may have a seat in the next slot: by the registry, or if an epoch ends before it, by its stake."""
    slot, machine = state.slot + 1, state.machines.get(key)
    registry = state.registries.get(state.params.epoch_of_slot(slot))
    if registry is not None:
        return any(key == member and stake > 0 for member, stake in registry)
    account = state.accounts.get(machine.owner) if machine is not None and machine.roles & CHECKER else None
    return account is not None and account.stake_planck >= max(1, state.params.min_stake_planck)


def _slot_of(call: Incoming) -> int:
    seen = peek_signed(Challenge, call.payload, ENVELOPE_BYTES_MAX)
    return seen[1].slot if seen else 0


def _with_faults(proof: Any, faults: WorkerFaults) -> tuple[tuple[bytes, ...], tuple[matproof.Tags, ...]]:
    """Roots and tags of a proof; a cheat commits consistently to wrong tags of the last round."""
    roots, tags = tuple(proof.roots), tuple(proof.tags)
    if faults.wrong_tiles <= 0:
        return roots, tags
    wrong = tags[-1].copy()
    wrong[: faults.wrong_tiles] ^= 1
    return (*roots[:-1], matproof.tags_root(wrong)), (*tags[:-1], wrong)


def _answers(run: Run, call_id: int) -> list[Action]:
    # Both frames carry the duty: if the journal refuses the commitment, its tags must not go out alone.
    return [Reply(call_id, run.commit, last=False, duty=run.duty), Reply(call_id, run.tags, last=True, duty=run.duty)]


def _answer_all(run: Run) -> list[Action]:
    """Every seat gets the commitment before any gets the tags: only the former is timed."""
    run.phase = Phase.ANSWERED
    waiting = [_answers(run, call) for calls in run.calls.values() for call in calls]
    for calls in run.calls.values():
        calls.clear()
    note = Note("proved", (("slot", run.slot), ("challenges", len(run.seats))))
    return [note, *[commit for commit, _ in waiting], *[tags for _, tags in waiting]]


def _refuse_all(run: Run) -> list[Action]:
    waiting = [call for calls in run.calls.values() for call in calls]
    run.calls.clear()
    return [Reply(call, NOTHING) for call in waiting]


def _accuse(run: Run, first: Verified[Challenge], second: Verified[Challenge]) -> list[Action]:
    """Evidence of a second challenge by one seat, once."""
    seat = first.message.seat
    if seat in run.accused:
        return []
    run.accused.add(seat)
    evidence = DoubleChallenge(decode(Signed, first.envelope), decode(Signed, second.envelope))
    note = Note("evidence", (("kind", "double challenge"), ("offender", first.signer.hex()), ("slot", run.slot)))
    return [Publish(EVIDENCE_TOPIC, encode(evidence)), note]
