"""Counting votes: what a certificate needs, what is never counted."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from protocols.committees import verify_certificate
from protocols.quorum import (
    Committee,
    QuorumCertificate,
    ReadyCore,
    SignedCore,
    TicketCore,
    VerdictCore,
    VoteCounter,
    WitnessCore,
    check_signature,
    subject_of,
)

NETWORK = sha256(b"quorum").digest()
KEYS = [KeyPair.from_seed(sha256(b"q%d" % i).digest()) for i in range(7)]
COMMITTEE = Committee(tuple(key.public_key for key in KEYS), 5)
UP, DOWN = (WitnessCore(bytes(32), bytes(32), 4, status) for status in (1, 2))


def signed(seat: int, core: WitnessCore = UP) -> SignedCore[WitnessCore]:
    signature = KEYS[seat].sign(core.DOMAIN, NETWORK, encode(core))
    vote = check_signature(core, seat, signature, COMMITTEE, NETWORK)
    assert vote is not None
    return vote


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=30))
def test_a_certificate_appears_exactly_when_a_quorum_agrees(votes: list[tuple[int, bool]]) -> None:
    counter: VoteCounter[WitnessCore] = VoteCounter(COMMITTEE)
    first: dict[int, bool] = {}
    made: list[QuorumCertificate] = []
    for seat, up in votes:
        certificate = counter.add(signed(seat, UP if up else DOWN))
        first.setdefault(seat, up)
        most = max(list(first.values()).count(True), list(first.values()).count(False))
        assert (counter.certificate is not None) == (most >= 5)
        if certificate is not None:
            made.append(certificate)
    assert len(made) <= 1
    assert len(counter) == len(first)
    for certificate in made:
        assert verify_certificate(certificate, COMMITTEE, NETWORK)
        assert decode(QuorumCertificate, encode(certificate)) == certificate
        assert len(certificate.signatures) == 5


def test_a_seats_first_vote_stands() -> None:
    counter: VoteCounter[WitnessCore] = VoteCounter(COMMITTEE)
    counter.add(signed(0, DOWN))
    for seat in range(5):
        assert counter.add(signed(seat)) is None
    vote = counter.vote_of(0)
    assert vote is not None and vote.core == DOWN
    assert counter.add(signed(5)) is not None


def test_only_a_checked_signature_makes_a_vote() -> None:
    signature = KEYS[0].sign(UP.DOMAIN, NETWORK, encode(UP))
    assert check_signature(UP, 1, signature, COMMITTEE, NETWORK) is None
    assert check_signature(DOWN, 0, signature, COMMITTEE, NETWORK) is None
    assert check_signature(UP, 0, signature, COMMITTEE, bytes(32)) is None
    assert check_signature(UP, -1, signature, COMMITTEE, NETWORK) is None
    assert check_signature(UP, 7, signature, COMMITTEE, NETWORK) is None
    assert check_signature(UP, 0, b"", COMMITTEE, NETWORK) is None
    with pytest.raises(TypeError):
        SignedCore(UP, 0, signature, object())


def test_a_committee_of_one_decides_alone_and_of_none_never() -> None:
    one: VoteCounter[WitnessCore] = VoteCounter(Committee(COMMITTEE.seats[:1], 1))
    assert one.add(signed(0)) is not None
    none: VoteCounter[WitnessCore] = VoteCounter(Committee((), 0))
    assert none.add(signed(0)) is None


def test_subjects_are_what_a_seat_decides_once() -> None:
    a, b = bytes(32), bytes([1] * 32)
    same = [
        (VerdictCore(0, 5, a, a, 1), VerdictCore(0, 5, a, b, 3)),
        (TicketCore(a, a, a, a), TicketCore(a, b, a, a)),
        (ReadyCore(a, a), ReadyCore(a, b)),
        (UP, DOWN),
    ]
    assert all(subject_of(first) == subject_of(second) for first, second in same)
    assert len({subject_of(first) for first, _ in same}) == 4
    assert subject_of(VerdictCore(0, 5, a, a, 1)) != subject_of(VerdictCore(0, 6, a, a, 1))
    assert subject_of(WitnessCore(a, a, 4, 1)) != subject_of(WitnessCore(a, a, 5, 1))
