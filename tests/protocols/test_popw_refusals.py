"""What comes in from peers at a seat and at a worker: refused cheaply, never raised, and never acted upon."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from protocols import actions as do
from protocols.adverts import GPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.interpreter.calls import CHECKER, PROVIDER
from protocols.interpreter.events import SlotStarted
from protocols.interpreter.state import ACTIVE, MachineState, State, WorkerState
from protocols.params import DEMO
from protocols.popw import (
    CHALLENGE_PROTOCOL,
    LATE,
    PASS,
    VOTE_PROTOCOL,
    Challenge,
    PrivatePart,
    Vote,
    core_hash,
    sample_input,
)
from protocols.popw_seat import SeatMachine
from protocols.popw_worker import NOTHING, WorkerCheckMachine
from protocols.quorum import CoreVote, ReadyCore, VerdictCore

NETWORK = sha256(b"refusals").digest()
PARAMS = replace(DEMO, job_n=64, job_k=64, job_tile=32, job_rounds=1, standby_check_permille=1000)
SLOT = 9
EPOCH = PARAMS.epoch_of_slot(SLOT)
WORKER = KeyPair.from_seed(sha256(b"worker").digest())
STRANGER = KeyPair.from_seed(sha256(b"stranger").digest())
KEYS = {keys.public_key: keys for keys in (KeyPair.from_seed(sha256(b"%d" % i).digest()) for i in range(7))}
SPEC = Spec(GPU_CLASS, 8, 32_000, 100_000, 1, 24_000, "RTX 4090")
CHECKERS = {key: MachineState(bytes(32), CHECKER, 1) for key in KEYS}
STATE = State(
    NETWORK,
    PARAMS,
    number=SLOT * PARAMS.slot_blocks,
    machines=Map({**CHECKERS, WORKER.public_key: MachineState(bytes(32), PROVIDER, 1)}),
    workers=Map({WORKER.public_key: WorkerState(bytes(32), SPEC, 1, 0, ACTIVE, 1)}),
    registries=Map({EPOCH: tuple(sorted((key, 10**20) for key in KEYS))}),
    beacons=Map({SLOT: bytes(32)}),
)
STARTED = do.BlockApplied(STATE, (SlotStarted(SLOT),))
_committee = check_committee(STATE, SLOT, WORKER.public_key)
assert _committee is not None
HOLDERS = [KEYS[key] for key in _committee.seats]
GOOD = Challenge(EPOCH, SLOT, WORKER.public_key, 0, bytes(32))
SEALED = seal(GOOD, HOLDERS[0], NETWORK)


def worker_machine() -> WorkerCheckMachine:
    machine = WorkerCheckMachine(WORKER)
    machine.step(STARTED, 0.0)
    return machine


def seat_machine() -> SeatMachine:
    """Of seat 3, after it has challenged the worker."""
    machine = SeatMachine(HOLDERS[3], bytes)
    machine.step(STARTED, 0.0)
    return machine


def call(protocol: str, peer: KeyPair, payload: bytes, call_id: int = 1) -> do.Incoming:
    return do.Incoming(call_id, peer.public_key, protocol, payload, 0.0)


def vote(seat: int = 4) -> Vote:
    keys, core = HOLDERS[seat], VerdictCore(EPOCH, SLOT, WORKER.public_key, bytes([5] * 32), PASS)
    proof = vrf.prove(keys.seed, sample_input(core.commit))
    private = PrivatePart(core_hash(core, NETWORK), seat, 7, proof, bytes([6] * 32))
    signatures = [keys.sign(each.DOMAIN, NETWORK, encode(each)) for each in (core, private)]
    return Vote(core, signatures[0], private, signatures[1])


PAYLOAD = encode(vote())


@pytest.mark.parametrize(
    ("peer", "payload"),
    [
        (HOLDERS[0], b""),
        (HOLDERS[0], b"\xc1" * 40),
        (HOLDERS[0], SEALED[:-1]),
        (HOLDERS[0], SEALED + bytes(20_000)),
        (HOLDERS[0], SEALED[:-1] + bytes([SEALED[-1] ^ 1])),
        (HOLDERS[0], seal(GOOD, HOLDERS[0], bytes(32))),
        (HOLDERS[0], seal(replace(GOOD, epoch=EPOCH + 1), HOLDERS[0], NETWORK)),
        (HOLDERS[0], seal(replace(GOOD, slot=SLOT - 3), HOLDERS[0], NETWORK)),
        (HOLDERS[0], seal(replace(GOOD, slot=SLOT + 50), HOLDERS[0], NETWORK)),
        (HOLDERS[0], seal(replace(GOOD, seat=1), HOLDERS[0], NETWORK)),
        (HOLDERS[0], seal(replace(GOOD, seat=60), HOLDERS[0], NETWORK)),
        (HOLDERS[0], seal(replace(GOOD, worker=bytes(32)), HOLDERS[0], NETWORK)),
        (STRANGER, seal(GOOD, STRANGER, NETWORK)),
        (STRANGER, SEALED),
        (STRANGER, seal(replace(GOOD, slot=SLOT + 1), STRANGER, NETWORK)),
    ],
)
def test_a_malformed_challenge_is_refused(peer: KeyPair, payload: bytes) -> None:
    assert worker_machine().step(call(CHALLENGE_PROTOCOL, peer, payload), 0.0) == [do.Reply(1, NOTHING)]


def test_a_right_challenge_waits_for_the_others() -> None:
    machine = worker_machine()
    assert machine.step(call(CHALLENGE_PROTOCOL, HOLDERS[0], SEALED), 0.0) == []
    assert machine.deadline == PARAMS.challenge_wait_ms / 1000
    assert machine.step(do.Wake(), PARAMS.challenge_wait_ms / 1000) == [do.Reply(1, NOTHING)]
    assert machine.deadline is None


def test_repeated_challenges_do_not_fill_the_worker() -> None:
    machine = worker_machine()
    replies = [machine.step(call(CHALLENGE_PROTOCOL, HOLDERS[0], SEALED, i), 0.0) for i in range(100)]
    assert replies.count([]) == 4


def test_early_challenges_do_not_fill_the_worker() -> None:
    machine = worker_machine()
    early = seal(replace(GOOD, slot=SLOT + 1), HOLDERS[0], NETWORK)
    replies = [machine.step(call(CHALLENGE_PROTOCOL, HOLDERS[0], early, i), 0.0) for i in range(100)]
    assert replies[0] == [] and replies[99] == [do.Reply(98, NOTHING)]


def test_a_worker_that_is_not_due_answers_nobody() -> None:
    machine = WorkerCheckMachine(WORKER)
    idle = replace(STATE, workers=Map())
    machine.step(do.BlockApplied(idle, (SlotStarted(SLOT),)), 0.0)
    assert machine.step(call(CHALLENGE_PROTOCOL, HOLDERS[0], SEALED), 0.0) == [do.Reply(1, NOTHING)]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x95\x19",
        PAYLOAD[:-1],
        PAYLOAD + bytes(2000),
        PAYLOAD[:-1] + bytes([PAYLOAD[-1] ^ 1]),
        encode(replace(vote(), core=replace(vote().core, verdict=LATE))),
        encode(replace(vote(), core=replace(vote().core, slot=SLOT + 1))),
        encode(replace(vote(), core=replace(vote().core, verdict=9))),
        encode(replace(vote(), private=replace(vote().private, seat=63))),
        encode(replace(vote(), private=replace(vote().private, vrf_proof=b""))),
        encode(replace(vote(), private=replace(vote().private, elapsed_ms=1))),
        encode(vote(5)),
    ],
)
def test_a_malformed_vote_is_refused(payload: bytes) -> None:
    assert seat_machine().step(call(VOTE_PROTOCOL, HOLDERS[4], payload), 0.0) == [do.Reply(1, b"\x00")]


def test_a_right_vote_is_counted_however_often_it_comes() -> None:
    machine = seat_machine()
    for _ in range(3):
        assert machine.step(call(VOTE_PROTOCOL, HOLDERS[4], PAYLOAD), 0.0) == [do.Reply(1, b"\x01")]
    assert len(machine.checks[0].tally.counter) == 1


def test_votes_of_the_other_machine_are_left_alone() -> None:
    foreign = encode(CoreVote(ReadyCore(bytes(32), bytes(32)), 0, bytes(64)))
    assert seat_machine().step(call(VOTE_PROTOCOL, HOLDERS[4], foreign), 0.0) == []


def test_before_the_first_block_everything_is_refused() -> None:
    assert WorkerCheckMachine(WORKER).step(call(CHALLENGE_PROTOCOL, HOLDERS[0], SEALED), 0.0) == [do.Reply(1, b"")]
    assert SeatMachine(HOLDERS[3], bytes).step(call(VOTE_PROTOCOL, HOLDERS[4], PAYLOAD), 0.0) == [do.Reply(1, b"\x00")]


@given(st.binary(max_size=300) | st.sampled_from([SEALED, PAYLOAD]), st.integers(0, 2**32), st.integers(1, 255))
def test_changed_bytes_never_raise_and_are_never_counted(data: bytes, position: int, value: int) -> None:
    changed = bytearray(data)
    if changed:
        changed[position % len(changed)] ^= value
    seat, worker = seat_machine(), worker_machine()
    seat.step(call(VOTE_PROTOCOL, HOLDERS[4], bytes(changed)), 0.0)
    assert len(seat.checks[0].tally.counter) == 0
    worker.step(call(CHALLENGE_PROTOCOL, HOLDERS[0], bytes(changed)), 0.0)
    assert worker.deadline is None
