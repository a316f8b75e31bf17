"""The pool of certificates for an epoch's body: one of each subject, and what was verified."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocols.epoch_body import certificate_hash, subject_of
from protocols.epoch_pool import EVIDENCE_OF_ONE, Pool
from protocols.quorum import QuorumCertificate, WitnessCore

NETWORK = bytes(32)


def certificate(slot: int, votes: int) -> QuorumCertificate:
    return QuorumCertificate(WitnessCore(bytes(32), bytes(32), slot, 1), (1 << votes) - 1, (bytes(64),) * votes)


CERTIFICATES = st.builds(certificate, st.integers(0, 9), st.integers(1, 4))


@given(st.lists(CERTIFICATES), st.integers(0, 10))
def test_the_most_votes_stay_and_all_were_verified(certificates: list[QuorumCertificate], over: int) -> None:
    pool = Pool(NETWORK)
    for each in certificates:
        pool.add(each, 1)
    hashes = {each: certificate_hash(each, NETWORK) for each in certificates}
    kept = pool.certificates()
    for each in certificates:
        best = kept[subject_of(each)]  # type: ignore[index]
        assert (-len(best.signatures), hashes[best]) <= (-len(each.signatures), hashes[each])
        assert hashes[each] in pool.verified
    pool.forget(lambda subject: subject[0] < over)
    assert all(subject[0] >= over for subject in pool.certificates())
    for each in certificates:
        assert (hashes[each] in pool.verified) == (each.core.slot >= over)  # type: ignore[union-attr]


def test_nobody_fills_the_pool_with_evidence_against_itself() -> None:
    pool = Pool(NETWORK)
    for number in range(5000):
        pool.add_evidence(number.to_bytes(32, "big"), 1, b"flooder")
    pool.add_evidence(bytes([9]) * 32, 1, b"another")
    assert len(pool.evidence()) == EVIDENCE_OF_ONE + 1
    pool.forget_evidence(tuple(pool.evidence()))
    pool.add_evidence(bytes([8]) * 32, 2, b"flooder")
    assert pool.evidence() == {bytes([8]) * 32}
