"""Bodies and headers: the same from the same parts, and nothing else is accepted. Also the pool and paged fetching."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire import merkle, vrf
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from protocols import epoch_body
from protocols.adverts import CPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.deploy import OPEN, UP
from protocols.digests import header_hash
from protocols.epoch_body import (
    GENESIS,
    Base,
    Known,
    assemble,
    belongs_to,
    certificate_hash,
    check_body,
    counts,
    header_of,
    is_valid,
    leaves_of,
    mix_input,
    mix_of,
    subject_of,
)
from protocols.epoch_fetch import MAX_DOWNLOADS, OBJECT_BYTES_MAX, PAGE_BYTES, Downloads, page_of, parse_request
from protocols.epoch_pool import Pool
from protocols.epochs import VERDICTS, EpochBody, FetchReply, FetchRequest, SignedReveal
from protocols.interpreter.state import ACTIVE, MachineState, OrderState, State, WorkerState
from protocols.params import DEMO, KAI
from protocols.popw import LATE, PASS
from protocols.quorum import QuorumCertificate, ReadyCore, VerdictCore, WitnessCore

PARAMS = replace(DEMO, epoch_slots=4, slot_blocks=2, block_ms=1000, standby_check_permille=1000)
NETWORK = sha256(b"network").digest()
ROOT = sha256(b"state").digest()
SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 0, 0, "")


def keys_of(name: str) -> KeyPair:
    return KeyPair.from_seed(sha256(name.encode()).digest())


CHECKERS = {keys.public_key: keys for keys in (keys_of(f"checker {index}") for index in range(4))}
WORKERS = sorted(keys_of(f"worker {index}").public_key for index in range(3))
ORDER_ID = sha256(b"order").digest()


def state_at(epoch: int) -> State:
    """The state after the last block of an epoch."""
    seats = tuple(sorted(CHECKERS))
    order = OrderState(
        b"c" * 32, b"k" * 32, WORKERS[0], b"p" * 32, b"", SPEC, b"", KAI, 60, 0, 0, 0, 8, 0, seats, 3
    )  # fmt: skip
    epochs = range(max(0, epoch - 3), epoch + 1)
    slots = range(epochs.start * PARAMS.epoch_slots, epochs.stop * PARAMS.epoch_slots)
    return State(
        NETWORK,
        PARAMS,
        number=(epoch + 1) * PARAMS.epoch_blocks - 1,
        machines=Map({key: MachineState(sha256(key).digest(), 2, 0) for key in CHECKERS}),
        workers=Map({key: WorkerState(sha256(key).digest(), SPEC, KAI, 50 * KAI, ACTIVE, 0, 1) for key in WORKERS}),
        orders=Map({ORDER_ID: order}),
        registries=Map({each: tuple(sorted((key, 100 * KAI) for key in CHECKERS)) for each in epochs}),
        mixes=Map({each: sha256(b"mix %d" % each).digest() for each in epochs}),
        beacons=Map({slot: sha256(b"beacon %d" % slot).digest() for slot in slots}),
    )


def signed(core, seats: tuple[bytes, ...], count: int = 3, first: int = 0) -> QuorumCertificate:
    chosen = range(first, first + count)
    body = encode(core)
    signatures = tuple(CHECKERS[seats[seat]].sign(core.DOMAIN, NETWORK, body) for seat in chosen)
    return QuorumCertificate(core, sum(1 << seat for seat in chosen), signatures)


def verdict(state: State, slot: int, worker: int = 0, outcome: int = PASS, first: int = 0) -> QuorumCertificate:
    core = VerdictCore(PARAMS.epoch_of_slot(slot), slot, WORKERS[worker], bytes(32), outcome)
    return signed(core, check_committee(state, slot, WORKERS[worker]).seats, first=first)


def witness(state: State, slot: int) -> QuorumCertificate:
    return signed(WitnessCore(ORDER_ID, WORKERS[0], slot, UP), state.orders[ORDER_ID].seats)


def reveal(state: State, keys: KeyPair, epoch: int) -> SignedReveal:
    return SignedReveal(keys.public_key, vrf.prove(keys.seed, mix_input(state, epoch)))


def parts(state: State, slots: range) -> tuple[list[SignedReveal], list[QuorumCertificate]]:
    certificates = [verdict(state, slot, worker) for slot in slots for worker in (0, 1)]
    certificates += [witness(state, slot) for slot in slots]
    return [reveal(state, keys, state.epoch) for keys in CHECKERS.values()], certificates


def first_epoch() -> tuple[State, EpochBody, Base]:
    """Epoch 1 (with 0, which nobody anchored) as anchored."""
    state = state_at(1)
    body = assemble(state, GENESIS, *parts(state, range(4, 8)))
    header = header_of(body, 0, state, GENESIS, ROOT)
    return state, body, Base(header, header_hash(header, NETWORK), body)


# ── assembly ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_body_covers_everything_since_the_last_anchor() -> None:
    _, _, base = first_epoch()
    assert (base.header.first_slot, base.header.last_slot, base.header.verdicts) == (0, 7, 8)
    state = state_at(2)
    header = header_of(assemble(state, base, *parts(state, range(8, 12))), 3, state, base, ROOT)
    assert (header.first_slot, header.last_slot, header.round) == (8, 11, 3)
    assert header.previous == base.header_hash
    later = state_at(3)
    header = header_of(assemble(later, base, [], []), 0, later, base, ROOT)
    assert (header.first_slot, header.last_slot) == (8, 15)


@given(st.randoms(use_true_random=False))
def test_the_order_of_parts_does_not_matter(random) -> None:
    state = state_at(1)
    reveals, certificates = parts(state, range(4, 8))
    expected = assemble(state, GENESIS, reveals, certificates, [ROOT, NETWORK])
    random.shuffle(reveals)
    random.shuffle(certificates)
    again = assemble(state, GENESIS, reveals, certificates * 2, [NETWORK, ROOT, ROOT])
    assert encode(again) == encode(expected)
    assert header_of(again, 0, state, GENESIS, ROOT) == header_of(expected, 0, state, GENESIS, ROOT)


def test_a_body_survives_the_wire() -> None:
    _, body, base = first_epoch()
    assert decode(EpochBody, encode(body)) == body
    assert belongs_to(decode(EpochBody, encode(body)), base.header, NETWORK)


def test_of_two_certificates_on_one_check_the_one_with_more_votes_counts() -> None:
    """Whoever aggregates cannot leave seats out, and try their subsets for a low hash, to keep them from being paid."""
    state = state_at(1)
    seats = check_committee(state, 5, WORKERS[0]).seats
    core = VerdictCore(1, 5, WORKERS[0], bytes(32), PASS)
    full, *others = [signed(core, seats, count=4), signed(core, seats), signed(core, seats, first=1)]
    for order in ([full, *others], [*others, full]):
        assert assemble(state, GENESIS, [], order).certificates == (full,)
    pool = Pool(NETWORK)
    for each in (*others, full, *others):
        pool.add(each, 5)
    assert list(pool.certificates().values()) == [full]


def test_of_two_certificates_with_as_many_votes_the_lowest_hash_counts() -> None:
    state = state_at(1)
    both = [verdict(state, 5), verdict(state, 5, first=1)]
    chosen = assemble(state, GENESIS, [], both).certificates
    assert chosen == (min(both, key=lambda each: certificate_hash(each, NETWORK)),)


def test_late_certificates_of_the_last_slots_count_in_the_next_body_once() -> None:
    old = state_at(1)
    reveals, certificates = parts(old, range(4, 7))
    body = assemble(old, GENESIS, reveals, certificates)
    header = header_of(body, 0, old, GENESIS, ROOT)
    base = Base(header, header_hash(header, NETWORK), body)
    state = state_at(2)
    late, known, too_late = verdict(state, 7), verdict(state, 6), verdict(state, 5, worker=2)
    chosen = assemble(state, base, [], [late, known, too_late, witness(state, 7)]).certificates
    assert {each.core.slot for each in chosen} == {7}
    assert len(chosen) == 2


def test_certificates_of_the_future_or_of_other_kinds_are_left_out() -> None:
    state = state_at(1)
    later = verdict(state_at(2), 8)
    ready = signed(ReadyCore(ORDER_ID, WORKERS[0]), state.orders[ORDER_ID].seats)
    assert assemble(state, GENESIS, [], [later, ready]).certificates == ()


def test_rewards_are_cumulative_and_the_header_says_what_is_new() -> None:
    _, body, base = first_epoch()
    state = state_at(2)
    new = assemble(state, base, *parts(state, range(8, 12)))
    header = header_of(new, 0, state, base, ROOT)
    old = sum(leaf.cumulative_planck for leaf in body.rewards)
    assert sum(leaf.cumulative_planck for leaf in new.rewards) == old + header.minted_planck
    assert 0 < header.minted_planck <= PARAMS.epoch_reward_planck
    assert base.header.minted_planck <= 2 * PARAMS.epoch_reward_planck


def test_lease_leaves_go_on_from_the_previous_body() -> None:
    _, body, base = first_epoch()
    state = state_at(2)
    (old,), (new,) = body.leases, assemble(state, base, *parts(state, range(8, 12))).leases
    assert (old.seconds, new.seconds, new.outcome) == (8, 16, OPEN)


def test_verdict_leaves_are_sorted_by_slot_and_worker() -> None:
    _, body, base = first_epoch()
    assert len(leaves_of(body, VERDICTS, NETWORK)) == base.header.verdicts == 8
    order = [(each.core.slot, each.core.worker) for each in body.certificates if isinstance(each.core, VerdictCore)]
    assert order == sorted(order)
    assert base.header.verdict_root == merkle.root(leaves_of(body, VERDICTS, NETWORK))
    with pytest.raises(ValueError, match="no tree"):
        leaves_of(body, 4, NETWORK)


# ── mix ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_mix_depends_on_every_reveal_and_on_no_order() -> None:
    state = state_at(1)
    reveals, _ = parts(state, range(0))
    mixes = {mix_of(state, 1, reveals[:count]) for count in range(5)}
    assert len(mixes) == 5
    assert mix_of(state, 1, reversed(reveals)) == mix_of(state, 1, reveals)


def test_without_reveals_the_mix_moves_on() -> None:
    state = state_at(1)
    assert mix_of(state, 1, []) not in (state.mixes[1], mix_of(state, 0, []))


# ── validity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_valid_certificates() -> None:
    state = state_at(1)
    good, seen = verdict(state, 5), witness(state, 5)
    assert is_valid(state, good)
    assert is_valid(state, seen)
    assert not is_valid(state, replace(good, core=replace(good.core, verdict=LATE)))
    assert not is_valid(state, replace(good, core=replace(good.core, epoch=2)))
    assert not is_valid(state, replace(good, core=replace(good.core, worker=bytes(32))))
    assert not is_valid(state, replace(seen, core=replace(seen.core, worker=WORKERS[1])))
    assert not is_valid(state, replace(seen, core=replace(seen.core, status=4)))
    assert not is_valid(state, replace(seen, core=replace(seen.core, order_id=bytes(32))))
    assert not is_valid(state, signed(ReadyCore(ORDER_ID, WORKERS[0]), state.orders[ORDER_ID].seats))


def judged(body: EpochBody, known: Known | None = None, **header: object) -> str:
    state, _, _ = first_epoch()
    made = replace(header_of(body, 0, state, GENESIS, ROOT), **header)
    return check_body(made, body, state, GENESIS, ROOT, known or Known({}))


def test_an_honest_body_is_signed_with_and_without_own_knowledge() -> None:
    _, body, _ = first_epoch()
    assert judged(body) == ""
    own = {subject_of(each): each for each in body.certificates}
    assert judged(body, Known(own, frozenset(own), frozenset(CHECKERS))) == ""


def test_certificates_that_gossip_verified_are_not_verified_again() -> None:
    state, body, _ = first_epoch()
    lie = replace(body.certificates[0], signatures=(bytes(64),) * len(body.certificates[0].signatures))
    forged = assemble(state, GENESIS, body.reveals, [lie, *body.certificates[1:]])
    assert judged(forged) == "an invalid certificate"
    hashes = {certificate_hash(each, state.network) for each in body.certificates}
    assert judged(forged, Known({}, verified=hashes)) == "an invalid certificate"  # nobody verified this one
    # What is in the set is believed: that its signature is not looked at shows on one that has none.
    assert judged(forged, Known({}, verified=hashes | {certificate_hash(lie, state.network)})) == ""


def test_each_lie_has_its_reason() -> None:
    state, body, _ = first_epoch()
    own = {subject_of(each): each for each in body.certificates}
    known = Known(own, frozenset(own), frozenset(CHECKERS))
    few = assemble(state, GENESIS, body.reveals, body.certificates[1:])
    assert "1 certificates that were known in time" in judged(few, known)
    assert "left out" in judged(replace(body, reveals=body.reveals[1:]), known)
    stranger = reveal(state, keys_of("stranger"), 1)
    assert "not in the registry" in judged(assemble(state, GENESIS, [*body.reveals, stranger], body.certificates))
    assert "two of one member" in judged(replace(body, reveals=body.reveals * 2))
    swapped = replace(body.reveals[0], proof=body.reveals[1].proof)
    assert judged(replace(body, reveals=(swapped, *body.reveals[1:]))) == "a false reveal"
    assert judged(replace(body, rewards=body.rewards[:-1])) == "wrong rewards"
    assert judged(replace(body, leases=())) == "wrong leases"
    assert judged(replace(body, certificates=body.certificates[::-1])) == "wrong certificates"
    assert judged(replace(body, certificates=body.certificates * 2)) == "wrong certificates"
    assert judged(replace(body, reveals=body.reveals[::-1])) == "wrong reveals"
    assert "evidence" in judged(replace(body, evidence=(ROOT,)))
    assert judged(body, evidence_root=ROOT, log_root=ROOT) == "wrong evidence_root, log_root in the header"
    assert judged(body, first_slot=4) == "wrong first_slot in the header"
    later = verdict(state_at(2), 8)
    assert "does not belong" in judged(replace(body, certificates=(*body.certificates, later)))


def test_certificates_whose_committee_is_forgotten_are_nobodys_fault() -> None:
    state, body, _ = first_epoch()
    old = verdict(state, 5)
    subject = subject_of(old)
    forgetful = replace(state, beacons=state.beacons.delete(5))
    without = assemble(forgetful, GENESIS, body.reveals, [each for each in body.certificates if each.core.slot != 5])
    header = header_of(without, 0, forgetful, GENESIS, ROOT)
    assert counts(forgetful, GENESIS, subject)
    assert check_body(header, without, forgetful, GENESIS, ROOT, Known({subject: old}, frozenset({subject}))) == ""


def test_an_anchored_body_is_known_by_its_roots() -> None:
    _, body, base = first_epoch()
    assert not belongs_to(replace(body, rewards=body.rewards[1:]), base.header, NETWORK)
    assert not belongs_to(replace(body, leases=()), base.header, NETWORK)
    assert not belongs_to(replace(body, certificates=body.certificates[1:]), base.header, NETWORK)
    assert not belongs_to(replace(body, epoch=2), base.header, NETWORK)


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_pool_keeps_one_certificate_of_each_subject_and_since_when() -> None:
    state, pool = state_at(1), Pool(NETWORK)
    low, high = sorted(
        (verdict(state, 5), verdict(state, 5, first=1)), key=lambda each: certificate_hash(each, NETWORK)
    )
    assert pool.add(high, 5) == certificate_hash(high, NETWORK)
    assert pool.add(low, 7) == certificate_hash(low, NETWORK)
    assert pool.add(high, 7) is None
    assert list(pool.certificates().values()) == [low]
    assert pool.by_hash(certificate_hash(low, NETWORK)) == low
    assert pool.by_hash(certificate_hash(high, NETWORK)) is None
    assert pool.due(5) == {subject_of(low)}
    assert pool.due(4) == frozenset()
    pool.forget(lambda subject: subject[0] <= 5)
    assert not pool.certificates()
    assert pool.by_hash(certificate_hash(low, NETWORK)) is None
    assert pool.add(signed(ReadyCore(ORDER_ID, WORKERS[0]), tuple(CHECKERS)), 5) is None


def test_the_pool_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocols.epoch_pool.MAX_CERTIFICATES", 2)
    monkeypatch.setattr("protocols.epoch_pool.MAX_EVIDENCE", 2)
    state, pool = state_at(1), Pool(NETWORK)
    for slot in (4, 5, 6):
        pool.add(verdict(state, slot), slot)
        pool.add_evidence(sha256(b"%d" % slot).digest(), slot, b"%d" % slot)
    assert len(pool.certificates()) == len(pool.evidence()) == 2
    assert len(pool.evidence(4)) == 1
    pool.forget_evidence(tuple(pool.evidence()))
    assert not pool.evidence()


# ── fetching ─────────────────────────────────────────────────────────────────────────────────────────────────────────

KEY = sha256(b"key").digest()


def run(downloads: Downloads, requests: list, serve) -> object:
    """Answer requests with `serve(peer, FetchRequest)` (None: the stream fails) until the download is over."""
    for _ in range(1000):
        (request,) = requests
        frame = serve(request.peer, parse_request(request.payload))
        if frame is None:
            requests, fetched = downloads.ended(request.request_id)
        else:
            requests, fetched = downloads.answer(request.request_id, frame)
            assert downloads.ended(request.request_id) == ([], None)
        if fetched is not None:
            assert not requests
            return fetched
    raise AssertionError("it never ended")


@given(st.integers(1, 3 * PAGE_BYTES + 1))
def test_an_object_of_any_length_arrives(length: int) -> None:
    data = sha256(b"%d" % length).digest() * (length // 32 + 1)
    data = data[:length]
    downloads = Downloads("t")
    requests = downloads.start("body", KEY, [b"a" * 32])
    assert downloads.is_fetching("body", KEY)
    fetched = run(downloads, requests, lambda peer, request: page_of(data, request.offset))
    assert (fetched.data, fetched.key, fetched.peer) == (data, KEY, b"a" * 32)
    assert not downloads.is_fetching("body", KEY)


BAD = {
    "nothing here": page_of(None, 0),
    "rubbish": b"rubbish",
    "too long": encode(FetchReply(OBJECT_BYTES_MAX + 1, b"x")),
    "an empty page": encode(FetchReply(10, b"")),
    "more than there is": encode(FetchReply(1, b"xx")),
    "a failed stream": None,
}


@pytest.mark.parametrize("bad", BAD)
def test_a_useless_peer_costs_one_request(bad: str) -> None:
    peers = [b"a" * 32, b"b" * 32]
    downloads = Downloads("t")
    good = page_of(b"data", 0)
    fetched = run(
        downloads, downloads.start("body", KEY, peers), lambda peer, request: good if peer == peers[1] else BAD[bad]
    )
    assert fetched.data == b"data"
    fetched = run(downloads, downloads.start("body", KEY, peers), lambda peer, request: BAD[bad])
    assert fetched.data is None


def test_a_length_that_changes_is_refused() -> None:
    replies = iter([encode(FetchReply(4, b"ab")), encode(FetchReply(3, b"c"))])
    downloads = Downloads("t")
    assert run(downloads, downloads.start("body", KEY, [KEY]), lambda peer, request: next(replies)).data is None


def test_downloads_are_bounded_and_not_repeated() -> None:
    downloads = Downloads("t")
    assert downloads.start("body", KEY, []) == []
    started = [downloads.start("body", bytes([index]) * 32, [KEY]) for index in range(MAX_DOWNLOADS + 2)]
    assert [len(requests) for requests in started] == [1] * MAX_DOWNLOADS + [0, 0]
    assert downloads.start("body", bytes(32), [KEY]) == []
    assert downloads.answer("another", b"") == ([], None)


@given(st.binary(max_size=60))
def test_any_request_is_read_or_refused(data: bytes) -> None:
    request = parse_request(data)
    assert request is None or encode(request) == data


def test_a_page_beyond_the_end_is_empty() -> None:
    assert decode(FetchReply, page_of(b"data", 1 << 63)) == FetchReply(4, b"")
    assert parse_request(encode(FetchRequest("body", KEY, 3))).offset == 3


# ── more than fits ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_body_too_large_to_be_fetched_is_cut_and_still_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred tiny leases would otherwise make bodies that nobody can fetch, and stop every anchor."""
    state = state_at(1)
    reveals, certificates = parts(state, range(4, 8))
    everything = {subject_of(each): each for each in certificates}
    known = Known(everything, due=frozenset(everything), due_reveals=frozenset(CHECKERS))
    monkeypatch.setattr(epoch_body, "MAX_CERTIFICATES_BYTES", 1200)
    monkeypatch.setattr(epoch_body, "CERTIFICATE_BYTES_MAX", 320)
    body = assemble(state, GENESIS, reveals, certificates)
    assert 0 < len(body.certificates) < len(certificates)
    assert sum(len(encode(each)) for each in body.certificates) <= 1200
    header = header_of(body, 0, state, GENESIS, ROOT)
    assert check_body(header, body, state, GENESIS, ROOT, known) == ""
    fewer = assemble(state, GENESIS, reveals, body.certificates[:-1])
    problem = check_body(header_of(fewer, 0, state, GENESIS, ROOT), fewer, state, GENESIS, ROOT, known)
    assert "known in time are left out" in problem
    gap = assemble(state, GENESIS, reveals, [*body.certificates[1:], certificates[0]])
    problem = check_body(header_of(gap, 0, state, GENESIS, ROOT), gap, state, GENESIS, ROOT, known)
    assert "known in time are left out" in problem


def test_windows_of_leases_come_before_checks_when_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations that fail fill a body for little money; what clients owe must not wait for them."""
    state = state_at(1)
    reveals, certificates = parts(state, range(4, 8))
    everything = {subject_of(each): each for each in certificates}
    monkeypatch.setattr(epoch_body, "MAX_CERTIFICATES_BYTES", 1600)
    monkeypatch.setattr(epoch_body, "CERTIFICATE_BYTES_MAX", 320)
    body = assemble(state, GENESIS, reveals, certificates)
    found = [subject_of(each) for each in body.certificates]
    assert found == sorted(found)
    assert {slot for slot, tag, _ in found if tag == 72} == {4, 5, 6, 7}
    assert {slot for slot, tag, _ in found if tag == 23} == {4}
    known = Known(everything, due=frozenset(everything), due_reveals=frozenset(CHECKERS))
    assert check_body(header_of(body, 0, state, GENESIS, ROOT), body, state, GENESIS, ROOT, known) == ""


def test_with_too_many_orders_the_oldest_have_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch_body, "MAX_LEAVES", 2)
    state = state_at(1)
    order = state.orders[ORDER_ID]
    orders = {bytes([18 - block]) * 32: replace(order, placed_block=block) for block in (8, 9, 10)}
    leaves = assemble(replace(state, orders=Map(orders)), GENESIS, [], []).leases
    assert [leaf.order_id[0] for leaf in leaves] == [9, 10]
