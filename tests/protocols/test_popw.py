"""Rules of the check's messages: a verdict with a reason for every way to be wrong, and never an exception."""

from __future__ import annotations

import struct
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair, domain
from kaisar_p2p.wire.envelope import Signed, seal
from kaisar_p2p.wire.matproof import Job
from kaisar_p2p.wire.verdict import Verdict
from protocols.adverts import GPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.due import GRAND, REGISTRATION, STANDBY, due_workers, is_grand_slot
from protocols.interpreter.calls import CHECKER
from protocols.interpreter.state import (
    ACTIVE,
    ORDER_OPEN,
    REGISTERED,
    RETIRED,
    MachineState,
    OrderState,
    State,
    WorkerState,
)
from protocols.params import MAINNET
from protocols.popw import (
    BADJOB,
    LATE,
    NO_COMMIT,
    NO_DIGEST,
    PASS,
    SILENT,
    WRONG,
    Assignment,
    Challenge,
    Commit,
    PrivatePart,
    Tags,
    Vote,
    aggregators,
    commit_hash,
    core_hash,
    sample_input,
    seats_of,
    seed_of,
    validate_assignment,
    validate_certificate,
    validate_challenge,
    validate_commit,
    validate_tags,
    validate_vote,
)
from protocols.quorum import (
    MAX_SEATS,
    QuorumCertificate,
    ReadyCore,
    VerdictCore,
    VoteCounter,
    WitnessCore,
    check_signature,
)

NETWORK = sha256(b"popw").digest()
PARAMS = replace(MAINNET, job_n=64, job_k=64, job_tile=32)
SLOT, EPOCH = 130, 1
WORKER = KeyPair.from_seed(sha256(b"w").digest())
KEYS = {k.public_key: k for k in (KeyPair.from_seed(sha256(b"s%d" % i).digest()) for i in range(7))}
SPEC = Spec(GPU_CLASS, 8, 32_000, 100_000, 1, 24_000, "RTX 4090")
ORDER = sha256(b"order").digest()


def worker_state(status: int = ACTIVE, registered_block: int = 3) -> WorkerState:
    return WorkerState(bytes(32), SPEC, 1, 0, status, registered_block)


def order_state() -> OrderState:
    fields = dict.fromkeys(OrderState.__dataclass_fields__, 0)
    return OrderState(**{**fields, "worker": WORKER.public_key, "seats": tuple(sorted(KEYS)), "threshold": 5})  # type: ignore[arg-type]


STATE = State(
    NETWORK,
    PARAMS,
    number=SLOT * PARAMS.slot_blocks,
    machines=Map({key: MachineState(bytes(32), CHECKER, 0) for key in KEYS}),
    workers=Map({WORKER.public_key: worker_state()}),
    orders=Map({ORDER: order_state()}),
    registries=Map({EPOCH: tuple(sorted((key, 10**20) for key in KEYS))}),
    mixes=Map({EPOCH: sha256(b"mix").digest()}),
    beacons=Map({slot: sha256(b"%d" % slot).digest() for slot in range(SLOT - 9, SLOT + 1)}),
)
_committee = check_committee(STATE, SLOT, WORKER.public_key)
assert _committee is not None
COMMITTEE = _committee
HOLDERS = [KEYS[key] for key in COMMITTEE.seats]


def challenge(seat: int) -> Challenge:
    return Challenge(EPOCH, SLOT, WORKER.public_key, seat, sha256(b"value %d" % seat).digest())


def commit(seats: tuple[int, ...] = (0, 1, 2, 4, 6)) -> Commit:
    sealed = [decode(Signed, seal(challenge(seat), HOLDERS[seat], NETWORK)) for seat in seats]
    values = tuple(challenge(seat).value for seat in seats)
    mask = sum(1 << seat for seat in seats)
    signatures = tuple(each.signature for each in sealed)
    return Commit(EPOCH, SLOT, WORKER.public_key, PARAMS.job.pack(), mask, values, signatures, (bytes(32),))


def vote(holder: int, kind: int = PASS, **changes: object) -> Vote:
    """A right vote, then changed before it is signed."""
    keys, commitment = HOLDERS[holder], commit_hash(commit(), NETWORK)
    core = VerdictCore(EPOCH, SLOT, WORKER.public_key, NO_COMMIT if kind == SILENT else commitment, kind)
    core = replace(core, **{k: v for k, v in changes.items() if hasattr(core, k)})  # type: ignore[arg-type]
    looked = kind in (PASS, LATE, WRONG)
    proof = vrf.prove(keys.seed, sample_input(core.commit)) if looked else b""
    private = PrivatePart(core_hash(core, NETWORK), holder, 5, proof, bytes([7] * 32) if looked else NO_DIGEST)
    private = replace(private, **{k: v for k, v in changes.items() if hasattr(private, k)})  # type: ignore[arg-type]
    return Vote(
        core,
        keys.sign(core.DOMAIN, NETWORK, encode(core)),
        private,
        keys.sign(private.DOMAIN, NETWORK, encode(private)),
    )


def flip(data: bytes, index: int = -1) -> bytes:
    changed = bytearray(data)
    changed[index] ^= 1
    return bytes(changed)


# ── derived values ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_seed_has_the_documented_layout() -> None:
    one, beacon = commit(), bytes(range(32))
    head = struct.pack("<II32s12sQ", one.epoch, one.slot, one.worker, one.job, one.mask)
    prefix = b"popw/seed".ljust(16, b"\0") + NETWORK
    assert seed_of(one, beacon, NETWORK) == sha256(prefix + beacon + head + b"".join(one.values)).digest()


def test_the_seed_does_not_depend_on_the_result() -> None:
    assert seed_of(commit(), bytes(32), NETWORK) == seed_of(replace(commit(), roots=()), bytes(32), NETWORK)


def test_a_commitment_is_the_hash_of_everything_signed() -> None:
    assert commit_hash(commit(), NETWORK) == sha256(domain("popw/commit", NETWORK) + encode(commit())).digest()
    assert commit_hash(commit(), NETWORK) != commit_hash(replace(commit(), roots=()), NETWORK)


@given(st.sets(st.integers(0, MAX_SEATS - 1)))
def test_seats_of_a_mask(seats: set[int]) -> None:
    assert seats_of(sum(1 << seat for seat in seats)) == tuple(sorted(seats))


def test_aggregators_are_the_committee_in_an_order_that_the_beacon_gives() -> None:
    orders = {aggregators(COMMITTEE, bytes([i] * 32), WORKER.public_key, NETWORK) for i in range(20)}
    assert len(orders) > 10
    assert all(sorted(order) == sorted(COMMITTEE.seats) for order in orders)


# ── challenge ────────────────────────────────────────────────────────────────────────────────────────────────────────


def judge_challenge(data: bytes, peer: bytes) -> Verdict:
    return validate_challenge(data, peer, WORKER.public_key, COMMITTEE, STATE)[0]


def test_challenge__accept() -> None:
    assert judge_challenge(seal(challenge(3), HOLDERS[3], NETWORK), HOLDERS[3].public_key) is Verdict.ACCEPT


def test_challenge__ignore_another_worker() -> None:
    data = seal(replace(challenge(3), worker=bytes(32)), HOLDERS[3], NETWORK)
    assert judge_challenge(data, HOLDERS[3].public_key) is Verdict.IGNORE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        flip(seal(challenge(3), HOLDERS[3], NETWORK)),
        seal(replace(challenge(3), epoch=EPOCH + 1), HOLDERS[3], NETWORK),
        seal(replace(challenge(3), seat=2), HOLDERS[3], NETWORK),
        seal(replace(challenge(3), seat=7), HOLDERS[3], NETWORK),
        seal(challenge(3), HOLDERS[2], NETWORK),
        seal(challenge(3), HOLDERS[3], bytes(32)),
        seal(commit(), HOLDERS[3], NETWORK),
    ],
)
def test_challenge__reject(data: bytes) -> None:
    assert judge_challenge(data, HOLDERS[3].public_key) is Verdict.REJECT


# ── commit and tags ──────────────────────────────────────────────────────────────────────────────────────────────────


def judge_commit(one: Commit, keys: KeyPair = WORKER, seat: int = 0) -> tuple[Verdict, str]:
    return validate_commit(seal(one, keys, NETWORK), challenge(seat), COMMITTEE, NETWORK)[:2]


@pytest.mark.parametrize("seat", [0, 3])  # 3 is not in the mask: its challenge came late
def test_commit__accept(seat: int) -> None:
    assert judge_commit(commit(), seat=seat) == (Verdict.ACCEPT, "")


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (commit((0, 1, 2, 3)), "not T seats of the committee"),
        (replace(commit(), mask=0b1111 | 1 << 7), "not T seats of the committee"),
        (replace(commit(), mask=0), "not T seats of the committee"),
        (replace(commit(), values=commit().values[:4]), "values do not match the mask"),
        (replace(commit(), signatures=commit().signatures[:4]), "values do not match the mask"),
        (replace(commit(), values=(bytes(32), *commit().values[1:])), "not the value that this seat sent"),
        (replace(commit(), values=(*commit().values[:4], bytes(32))), "bad signature on a challenge"),
        (replace(commit(), signatures=(*commit().signatures[:4], bytes(64))), "bad signature on a challenge"),
        (replace(commit(), slot=SLOT - 1), "commit on another check"),
        (replace(commit(), epoch=0), "commit on another check"),
    ],
)
def test_commit__reject(one: Commit, reason: str) -> None:
    assert judge_commit(one) == (Verdict.REJECT, reason)


def test_commit__reject_values_that_absent_seats_never_sent() -> None:
    """Otherwise the worker could compute before it is asked."""
    honest = commit((0, 1, 2, 4))
    invented = replace(
        honest,
        mask=honest.mask | 1 << 6,
        values=(*honest.values, bytes(32)),
        signatures=(*honest.signatures, HOLDERS[0].sign("popw/chal", NETWORK, encode(challenge(6)))),
    )
    assert judge_commit(invented) == (Verdict.REJECT, "bad signature on a challenge")


def test_commit__reject_another_signer() -> None:
    assert judge_commit(commit(), HOLDERS[0]) == (Verdict.REJECT, "commit on another check")


def test_commit__reject_a_bad_signature() -> None:
    data = flip(seal(commit(), WORKER, NETWORK))
    assert validate_commit(data, challenge(0), COMMITTEE, NETWORK)[0] is Verdict.REJECT


def test_tags_have_one_number_for_each_tile() -> None:
    job = Job(64, 64, 32, 2)
    right = Tags((bytes(16), bytes(16)))
    assert validate_tags(encode(right), job) == right
    for wrong in (Tags((bytes(16),)), Tags((bytes(16), bytes(15))), Tags(()), Tags((bytes(16),) * 3)):
        assert validate_tags(encode(wrong), job) is None
    assert validate_tags(encode(Tags((bytes(10_000), bytes(16)))), job) is None
    assert validate_tags(b"\x92\x16", job) is None


# ── vote ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verdict", [PASS, LATE, WRONG, SILENT, BADJOB])
def test_vote__accept(verdict: int) -> None:
    judged, _, signed = validate_vote(vote(2, verdict), HOLDERS[2].public_key, COMMITTEE, STATE)
    assert judged is Verdict.ACCEPT and signed is not None and signed.seat == 2


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (vote(2, seat=3), "not that seat's vote"),
        (vote(2, seat=63), "not that seat's vote"),
        (vote(2, epoch=0), "impossible verdict"),
        (vote(2, verdict=0), "impossible verdict"),
        (vote(2, commit=NO_COMMIT), "impossible verdict"),
        (vote(2, SILENT, commit=bytes([1] * 32)), "impossible verdict"),
        (vote(2, SILENT, digest=bytes([1] * 32)), "impossible verdict"),
        (vote(2, BADJOB, vrf_proof=bytes(80)), "impossible verdict"),
        (vote(2, vrf_proof=b""), "impossible verdict"),
        (vote(2, core_hash=bytes(32)), "private part of another core"),
        (replace(vote(2), private_signature=bytes(64)), "bad signature on the private part"),
        (vote(2, vrf_proof=bytes(80)), "bad proof of the samples"),
        (vote(2, vrf_proof=vrf.prove(HOLDERS[3].seed, b"x")), "bad proof of the samples"),
        (replace(vote(2), core_signature=bytes(64)), "bad signature on the core"),
    ],
)
def test_vote__reject(one: Vote, reason: str) -> None:
    assert validate_vote(one, HOLDERS[2].public_key, COMMITTEE, STATE) == (Verdict.REJECT, reason, None)


# ── gossip: certificates and assignments ─────────────────────────────────────────────────────────────────────────────


def certificate_of(core: VerdictCore | ReadyCore | WitnessCore, seats: tuple[bytes, ...]) -> QuorumCertificate:
    signed = [KEYS[seats[i]].sign(core.DOMAIN, NETWORK, encode(core)) for i in range(5)]
    return QuorumCertificate(core, 0b11111, tuple(signed))


CORE = VerdictCore(EPOCH, SLOT, WORKER.public_key, commit_hash(commit(), NETWORK), PASS)
GOOD = certificate_of(CORE, COMMITTEE.seats)
SORTED = tuple(sorted(KEYS))


def judge_certificate(certificate: QuorumCertificate) -> tuple[Verdict, str]:
    return validate_certificate(encode(certificate), 0.0, STATE)[:2]


@pytest.mark.parametrize(
    "certificate",
    [
        GOOD,
        certificate_of(ReadyCore(ORDER, WORKER.public_key), SORTED),
        certificate_of(WitnessCore(ORDER, WORKER.public_key, SLOT, 1), SORTED),
    ],
)
def test_gossip_certificate__accept(certificate: QuorumCertificate) -> None:
    assert judge_certificate(certificate) == (Verdict.ACCEPT, "")


@pytest.mark.parametrize(
    "certificate",
    [
        certificate_of(replace(CORE, slot=SLOT + 1), COMMITTEE.seats),
        certificate_of(replace(CORE, slot=1), COMMITTEE.seats),
        certificate_of(replace(CORE, worker=bytes(32)), COMMITTEE.seats),
        certificate_of(ReadyCore(bytes(32), WORKER.public_key), SORTED),
        certificate_of(WitnessCore(ORDER, WORKER.public_key, SLOT + 1, 1), SORTED),
    ],
)
def test_gossip_certificate__ignore_what_a_newer_block_may_explain(certificate: QuorumCertificate) -> None:
    assert judge_certificate(certificate)[0] is Verdict.IGNORE


@pytest.mark.parametrize(
    "certificate",
    [
        replace(GOOD, signatures=GOOD.signatures[::-1]),
        replace(GOOD, signatures=GOOD.signatures[:4]),
        replace(GOOD, mask=0b1111, signatures=GOOD.signatures[:4]),
        replace(GOOD, mask=0b111111),
        replace(GOOD, mask=0b1111 | 1 << 63),
        replace(GOOD, mask=0),
        replace(GOOD, core=replace(CORE, verdict=WRONG)),
        certificate_of(replace(CORE, epoch=2), COMMITTEE.seats),
        certificate_of(replace(CORE, verdict=9), COMMITTEE.seats),
        certificate_of(replace(CORE, verdict=SILENT), COMMITTEE.seats),
        certificate_of(ReadyCore(ORDER, bytes(32)), SORTED),
        certificate_of(ReadyCore(ORDER, WORKER.public_key), SORTED[::-1]),
    ],
)
def test_gossip_certificate__reject(certificate: QuorumCertificate) -> None:
    assert judge_certificate(certificate)[0] is Verdict.REJECT


def test_gossip_certificate__reject_what_is_too_large() -> None:
    assert validate_certificate(bytes(9000), 0.0, STATE)[:2] == (Verdict.REJECT, "too large")


def test_a_certificate_of_counted_votes_is_accepted() -> None:
    counter: VoteCounter[VerdictCore] = VoteCounter(COMMITTEE)
    made = [
        counter.add(signed)
        for seat in (6, 2, 5, 0, 1, 3)
        if (signed := validate_vote(vote(seat), HOLDERS[seat].public_key, COMMITTEE, STATE)[2]) is not None
    ]
    assert [each is not None for each in made] == [False, False, False, False, True, False]
    assert made[4] is not None and judge_certificate(made[4]) == (Verdict.ACCEPT, "")
    assert check_signature(CORE, 9, bytes(64), COMMITTEE, NETWORK) is None


RIGHT = Assignment(EPOCH, SLOT, WORKER.public_key, COMMITTEE.seats)


@pytest.mark.parametrize(
    ("assignment", "keys", "verdict"),
    [
        (RIGHT, HOLDERS[0], Verdict.ACCEPT),
        (replace(RIGHT, slot=SLOT + 1), HOLDERS[0], Verdict.IGNORE),
        (replace(RIGHT, epoch=0), HOLDERS[0], Verdict.REJECT),
        (replace(RIGHT, seats=COMMITTEE.seats[::-1]), HOLDERS[0], Verdict.REJECT),
        (replace(RIGHT, seats=()), HOLDERS[0], Verdict.REJECT),
        (RIGHT, WORKER, Verdict.REJECT),
    ],
)
def test_gossip_assignment(assignment: Assignment, keys: KeyPair, verdict: Verdict) -> None:
    assert validate_assignment(seal(assignment, keys, NETWORK), 0.0, STATE)[0] is verdict


def test_gossip_assignment__reject_a_bad_signature() -> None:
    assert validate_assignment(flip(seal(RIGHT, HOLDERS[0], NETWORK)), 0.0, STATE)[0] is Verdict.REJECT


SAMPLES = [seal(challenge(0), HOLDERS[0], NETWORK), seal(commit(), WORKER, NETWORK), encode(GOOD), encode(vote(0))]


@given(st.binary(max_size=400) | st.sampled_from(SAMPLES), st.integers(0, 2**32), st.integers(0, 255))
def test_no_bytes_raise(data: bytes, position: int, value: int) -> None:
    """Noise, and right messages with one byte changed or the end cut off."""
    changed = bytearray(data)
    if changed:
        changed[position % len(changed)] ^= value
    for each in (bytes(changed), data[: position % (len(data) + 1)]):
        assert validate_challenge(each, HOLDERS[0].public_key, WORKER.public_key, COMMITTEE, STATE)[0] in Verdict
        assert validate_commit(each, challenge(0), COMMITTEE, NETWORK)[0] in Verdict
        assert validate_certificate(each, 0.0, STATE)[0] in Verdict
        assert validate_assignment(each, 0.0, STATE)[0] in Verdict
        validate_tags(each, PARAMS.job)


# ── who is due ───────────────────────────────────────────────────────────────────────────────────────────────────────


def with_workers(workers: dict[bytes, WorkerState], **changes: object) -> State:
    return replace(STATE, workers=Map(workers), **changes)  # type: ignore[arg-type]


def keys(count: int) -> list[bytes]:
    return [sha256(b"due %d" % index).digest() for index in range(count)]


def test_a_registration_is_due_from_the_next_slot_on() -> None:
    first, first_block = keys(1)[0], SLOT * PARAMS.slot_blocks
    for block, due in ((first_block, False), (first_block + 1, False), (first_block - 1, True)):
        found = due_workers(with_workers({first: worker_state(REGISTERED, block)}), SLOT)
        assert [check.reason for check in found] == ([REGISTRATION] if due else [])
        assert all(check.samples == PARAMS.registration_samples for check in found)


def test_a_registration_that_fails_for_an_epoch_is_tried_at_the_standby_rate() -> None:
    workers = {key: worker_state(REGISTERED, 0) for key in keys(2000)}
    assert 50 <= len(due_workers(with_workers(workers), SLOT)) <= 150


def test_about_one_in_twenty_idle_workers_is_due() -> None:
    state = with_workers({key: worker_state() for key in keys(2000)})
    slot = next(slot for slot in range(SLOT - 9, SLOT + 1) if not is_grand_slot(state, slot))
    due = due_workers(state, slot)
    assert 60 <= len(due) <= 140
    assert {check.reason for check in due} == {STANDBY}
    assert [check.worker for check in due] == sorted(check.worker for check in due)


def test_every_epoch_has_one_grand_slot_in_which_all_idle_workers_are_due() -> None:
    slots = range(EPOCH * PARAMS.epoch_slots, (EPOCH + 1) * PARAMS.epoch_slots)
    (grand,) = [slot for slot in slots if is_grand_slot(STATE, slot)]
    workers = {key: worker_state() for key in keys(50)}
    state = with_workers(workers, beacons=Map({grand: bytes(32)}))
    assert [check.reason for check in due_workers(state, grand)] == [GRAND] * 50


def test_leased_and_retired_workers_are_not_due() -> None:
    leased, retired = keys(2)
    state = with_workers(
        {leased: worker_state(), retired: worker_state(RETIRED)},
        params=replace(PARAMS, standby_check_permille=1000),
        orders=Map({ORDER: replace(order_state(), status=ORDER_OPEN, placed_ms=STATE.time_ms, duration_s=60)}),
        open_orders=Map({leased: (ORDER,)}),
    )
    assert due_workers(state, SLOT) == ()
    assert len(due_workers(replace(state, open_orders=Map()), SLOT)) == 1


def test_nobody_is_due_in_an_unknown_slot() -> None:
    assert due_workers(STATE, SLOT + 1) == ()
