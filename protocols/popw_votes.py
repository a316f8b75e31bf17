"""Aggregation of verdicts: any seat may collect its committee's votes and make the certificate; `popw_seat` uses it."""

from __future__ import annotations

from dataclasses import dataclass

from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import sha256
from kaisar_p2p.wire.judge import peek
from kaisar_p2p.wire.matproof import samples
from kaisar_p2p.wire.verdict import Verdict
from protocols.actions import Action, Duty, Note, Publish
from protocols.equivocation import EVIDENCE_TOPIC, DoubleVote, FalsePass, WrongResult
from protocols.interpreter.state import State
from protocols.popw import COUNTED, LATE, PASS, REFUSED, VERDICT_NAMES, Commit, Vote, commit_hash, validate_vote
from protocols.quorum import MAX_SEATS, Committee, CoreVote, QuorumCertificate, SignedCore, VerdictCore, VoteCounter

CERTIFICATE_TOPIC = "certificate"
VOTE_BYTES_MAX = 1024


def is_core_vote(payload: bytes) -> bool:
    """Whether a frame on `/kaisar/vote/1` is for the machine that counts deploy, ready and witness votes."""
    return payload[1:2] == bytes([CoreVote.TAG])  # type: ignore[attr-defined]


def parse_vote(payload: bytes) -> Vote | None:
    """The verdict vote in a frame, or None."""
    return peek(Vote, payload, VOTE_BYTES_MAX)


def verdict_duty(core: VerdictCore) -> Duty:
    """One verdict of this node for each (slot, worker), for ever."""
    return Duty(f"verdict/{core.slot}/{core.worker.hex()}", sha256(encode(core)))


@dataclass
class Tally:
    """The votes on one check. `closed` once a certificate, ours or another member's, is known to be out."""

    committee: Committee
    own_seat: int

    def __post_init__(self) -> None:
        self.counter: VoteCounter[VerdictCore] = VoteCounter(self.committee)
        self.closed = False
        self._accused: set[int] = set()
        self._false_passers: set[int] = set()
        self._passes: dict[int, Vote] = {}
        self._wrong: dict[tuple[int, int], WrongResult] = {}

    def receive(self, vote: Vote, peer: bytes, state: State) -> tuple[bytes, list[Action]]:
        """Count another seat's vote: the answer for it, and what follows. A repeat costs no signature check."""
        seat = vote.private.seat
        first = self.counter.vote_of(seat)
        if first is not None and first.core == vote.core:
            return COUNTED, []
        if seat in self._accused:
            return REFUSED, []
        verdict, _, signed = validate_vote(vote, peer, self.committee, state)
        if signed is None or verdict is not Verdict.ACCEPT:
            return REFUSED, []
        if first is not None:
            return REFUSED, self._accuse(first, signed)
        actions = self.count(signed)
        if vote.core.verdict in (PASS, LATE):
            self._passes[seat] = vote
            actions += [each for wrong in self._wrong.values() for each in self._false_pass(vote, wrong, state)]
        return COUNTED, actions

    def found_wrong(self, wrong: WrongResult, state: State) -> list[Action]:
        """A tile of this check is proven wrong, by us or by others: whoever sampled and passed it is accused."""
        if len(self._wrong) >= MAX_SEATS or (wrong.round, wrong.tile) in self._wrong:
            return []
        self._wrong[wrong.round, wrong.tile] = wrong
        return [each for vote in self._passes.values() for each in self._false_pass(vote, wrong, state)]

    def count(self, signed: SignedCore[VerdictCore]) -> list[Action]:
        """Count a checked vote; publishes the certificate when it completes one that nobody has published yet."""
        certificate = self.counter.add(signed)
        if certificate is None or self.closed:
            return []
        self.closed = True
        return self._publish(certificate, signed.core)

    def _publish(self, certificate: QuorumCertificate, core: VerdictCore) -> list[Action]:
        # Our own signature is in it perhaps: then it goes out only under the duty of that verdict.
        duty = verdict_duty(core) if certificate.mask >> self.own_seat & 1 else None
        name = VERDICT_NAMES[core.verdict]
        note = Note("certificate", (("slot", core.slot), ("worker", core.worker.hex()), ("verdict", name)))
        return [Publish(CERTIFICATE_TOPIC, encode(certificate), duty), note]

    def _false_pass(self, vote: Vote, wrong: WrongResult, state: State) -> list[Action]:
        seat, core = vote.private.seat, vote.core
        picks = samples(state.params.job, vrf.proof_to_hash(vote.private.vrf_proof), state.params.samples)
        if seat in self._false_passers or (wrong.round, wrong.tile) not in picks:
            return []
        if core.commit != commit_hash(decode(Commit, wrong.commit.body), state.network):
            return []
        self._false_passers.add(seat)
        note = _evidence_note("false pass", self.committee.seats[seat], core.slot)
        return [Publish(EVIDENCE_TOPIC, encode(FalsePass(vote, wrong))), note]

    def _accuse(self, first: SignedCore[VerdictCore], second: SignedCore[VerdictCore]) -> list[Action]:
        self._accused.add(second.seat)
        key = self.committee.seats[second.seat]
        evidence = DoubleVote(key, first.core, first.signature, second.core, second.signature)
        return [Publish(EVIDENCE_TOPIC, encode(evidence)), _evidence_note("double vote", key, first.core.slot)]


def _evidence_note(kind: str, offender: bytes, slot: int) -> Note:
    return Note("evidence", (("kind", kind), ("offender", offender.hex()), ("slot", slot)))
