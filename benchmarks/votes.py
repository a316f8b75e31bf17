"""Votes and certificates: how fast one core verifies them, and how many bytes they take.

The peer is PyNaCl (libsodium) on the same signatures in the same run: the difference is what our rules, codec and
domains add.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from statistics import median
from time import perf_counter

from nacl import bindings

from benchmarks import Figure
from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair, domain
from protocols.committees import verify_certificate
from protocols.interpreter.state import State
from protocols.params import MAINNET
from protocols.popw import PASS, PrivatePart, Vote, core_hash, sample_input, validate_vote
from protocols.quorum import (
    Committee,
    CoreVote,
    QuorumCertificate,
    ReadyCore,
    VerdictCore,
    VoteCounter,
    check_signature,
)

NETWORK = sha256(b"benchmark").digest()
KEYS = [KeyPair.from_seed(sha256(b"%d" % seat).digest()) for seat in range(MAINNET.committee_seats)]
COMMITTEE = Committee(tuple(key.public_key for key in KEYS), MAINNET.committee_threshold)
READY = ReadyCore(bytes(32), bytes(32))
VERDICT = VerdictCore(0, 1, bytes(32), bytes([1] * 32), PASS)
STATE = State(NETWORK, MAINNET)
ROUNDS = 40


def vote_figures() -> list[Figure]:
    """Everything about votes, in about two seconds on one core."""
    bare, one, full, parts, certified = _rates()
    return [
        _rate("votes with one signature verified and counted, per core", one, "PyNaCl verify", bare),
        _rate(
            "check votes verified (two signatures and a VRF proof), per core", full, "the same three checks bare", parts
        ),
        _rate(
            f"signatures of certificates verified, T = {COMMITTEE.threshold}, per core",
            certified,
            "PyNaCl verify",
            bare,
        ),
        *_sizes(),
    ]


def figures() -> list[Figure]:
    """For `python -m benchmarks`."""
    return vote_figures()


def _rates() -> tuple[float, ...]:
    """Signatures or votes a second: bare, with our rules, whole check votes, their three checks bare, certificates."""
    core_votes = [encode(CoreVote(READY, seat, _sign(seat, READY))) for seat in range(len(KEYS))]
    check_votes = [encode(_check_vote(seat)) for seat in range(len(KEYS))]
    certificate = encode(_certificate(COMMITTEE.threshold))
    work: tuple[tuple[int, Callable[[], object]], ...] = (
        (len(KEYS), _bare),
        (len(KEYS), lambda: _count(core_votes)),
        (len(KEYS), lambda: _judge(check_votes)),
        (len(KEYS), _bare_parts),
        (COMMITTEE.threshold, lambda: _check_certificate(certificate)),
    )
    measured: list[list[float]] = [[] for _ in work]
    for _ in range(ROUNDS):  # in turns, so that all of them see the same machine
        for times, (_, run) in zip(measured, work, strict=True):
            times.append(_seconds(run))
    return tuple(count / median(times) for times, (count, _) in zip(measured, work, strict=True))


def _bare() -> None:
    """PyNaCl alone on the same bytes."""
    body = domain(READY.DOMAIN, NETWORK) + encode(READY)
    for key, signature in zip(KEYS, _SIGNATURES, strict=True):
        bindings.crypto_sign_open(signature + body, key.public_key)


def _count(votes: list[bytes]) -> None:
    counter: VoteCounter[ReadyCore] = VoteCounter(COMMITTEE)
    for data in votes:
        vote = decode(CoreVote, data)
        assert isinstance(vote.core, ReadyCore)
        signed = check_signature(vote.core, vote.seat, vote.signature, COMMITTEE, NETWORK)
        assert signed is not None
        counter.add(signed)
    assert counter.certificate is not None


def _judge(votes: list[bytes]) -> None:
    counter: VoteCounter[VerdictCore] = VoteCounter(COMMITTEE)
    for key, data in zip(KEYS, votes, strict=True):
        _, reason, signed = validate_vote(decode(Vote, data), key.public_key, COMMITTEE, STATE)
        assert signed is not None, reason
        counter.add(signed)
    assert counter.certificate is not None


def _bare_parts() -> None:
    """The signatures and the proof of a check vote, without codec and rules."""
    for key, (core, private, proof) in zip(KEYS, _BARE_PARTS, strict=True):
        bindings.crypto_sign_open(core, key.public_key)
        bindings.crypto_sign_open(private, key.public_key)
        assert vrf.verify(key.public_key, sample_input(VERDICT.commit), proof)


def _check_vote(seat: int) -> Vote:
    proof = vrf.prove(KEYS[seat].seed, sample_input(VERDICT.commit))
    private = PrivatePart(core_hash(VERDICT, NETWORK), seat, 1234, proof, bytes(32))
    return Vote(VERDICT, _sign(seat, VERDICT), private, _sign(seat, private))


def _sign(seat: int, message: ReadyCore | VerdictCore | PrivatePart) -> bytes:
    return KEYS[seat].sign(message.DOMAIN, NETWORK, encode(message))


def _signed_bytes(seat: int, message: VerdictCore | PrivatePart) -> bytes:
    return _sign(seat, message) + domain(message.DOMAIN, NETWORK) + encode(message)


_SIGNATURES = [_sign(seat, READY) for seat in range(len(KEYS))]
_BARE_PARTS = [
    (_signed_bytes(seat, vote.core), _signed_bytes(seat, vote.private), vote.private.vrf_proof)
    for seat, vote in ((seat, _check_vote(seat)) for seat in range(len(KEYS)))
]


def _certificate(threshold: int) -> QuorumCertificate:
    return QuorumCertificate(VERDICT, (1 << threshold) - 1, tuple(_sign(seat, VERDICT) for seat in range(threshold)))


def _check_certificate(data: bytes) -> None:
    assert verify_certificate(decode(QuorumCertificate, data), COMMITTEE, NETWORK)


def _sizes() -> list[Figure]:
    large, small = (len(encode(_certificate(threshold))) for threshold in (MAINNET.committee_threshold, 11))
    vote = len(encode(_check_vote(0)))
    return [
        _size(
            f"certificate on the mesh, T = {MAINNET.committee_threshold}",
            large,
            73 + 8 + 64 * MAINNET.committee_threshold,
        ),
        _size("certificate on the mesh, T = 11", small, 73 + 8 + 64 * 11),
        _size("check vote to an aggregator", vote, 351),
    ]


def _rate(figure: str, value: float, peer: str, peer_value: float) -> Figure:
    ratio = value / peer_value
    return {
        "figure": figure,
        "value": round(value),
        "unit": "1/s",
        "peer": f"{peer} ({peer_value:,.0f}/s)",
        "ratio": round(ratio, 3),
        "target": "ratio ≥ 0.8",
        "ok": ratio >= 0.8,
    }


def _size(figure: str, value: int, packed: int) -> Figure:
    return {
        "figure": figure,
        "value": value,
        "unit": "B",
        "peer": f"fixed-layout structs ({packed} B)",
        "ratio": round(value / packed, 3),
        "target": "ratio ≤ 1.15",
        "ok": value <= 1.15 * packed,
    }


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
