"""What a member has collected about one epoch that ended: reveals, proposals, votes. Bounded by registry and rounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from kaisar_p2p.wire.codec import decode
from kaisar_p2p.wire.envelope import Signed
from protocols.committees import epoch_members, is_supermajority
from protocols.digests import header_hash
from protocols.epoch_gossip import MAX_ROUNDS
from protocols.epochs import EpochCertificate, EpochHeader, HeaderVote, MixReveal, SignedReveal
from protocols.equivocation import DoubleHeader
from protocols.interpreter.audit import state_root
from protocols.interpreter.state import Registry, State

BODIES_KEPT = 8


@dataclass(frozen=True)
class Ended:
    """The end of the epoch: the state after its last block, and when that was applied here (`now` of the machine)."""

    state: State
    at: float

    @cached_property
    def state_root(self) -> bytes:
        """Root of the state; computed when it is first needed."""
        return state_root(self.state)

    @property
    def window_s(self) -> float:
        """How long reveals are waited for."""
        return self.state.params.reveal_window_ms / 1000

    @property
    def timeout_s(self) -> float:
        """How long a proposer has."""
        return self.state.params.proposer_timeout_ms / 1000

    def starts(self, round_: int) -> float:
        """When a round begins."""
        return self.at + self.window_s + round_ * self.timeout_s

    def round_at(self, now: float) -> int:
        """The round that has begun by `now`; −1 while reveals are waited for, MAX_ROUNDS − 1 at most."""
        round_ = min(MAX_ROUNDS - 1, int((now - self.starts(0)) / self.timeout_s) + 1)
        while round_ >= 0 and self.starts(round_) > now:  # never by division alone: a wake comes exactly at `starts`
            round_ -= 1
        return max(-1, round_)


@dataclass(frozen=True)
class Quorum:
    """A header that ≥ 2/3 of the stake signed."""

    header: EpochHeader
    header_hash: bytes
    certificate: EpochCertificate


@dataclass
class Tally:
    """One epoch's collection. Messages may come before the node itself has seen the epoch end (`ended` is None)."""

    epoch: int
    ended: Ended | None = None
    proposed_round: int = -1
    voted_round: int = -1
    refused: set[bytes] = field(default_factory=set)
    bodies: dict[bytes, bytes] = field(default_factory=dict)
    quorum: Quorum | None = None
    submit_at: float | None = None
    changed_rounds: set[int] = field(default_factory=set)
    _reveals: dict[bytes, tuple[bytes, float]] = field(default_factory=dict)
    _proposals: dict[int, tuple[EpochHeader, bytes]] = field(default_factory=dict)
    _votes: dict[int, dict[bytes, tuple[bytes, bytes]]] = field(default_factory=dict)
    _accused: set[bytes] = field(default_factory=set)

    def add_reveal(self, signer: bytes, reveal: MixReveal, received_at: float) -> None:
        """Keep a checker's verified reveal; it can have only one."""
        self._reveals.setdefault(signer, (reveal.proof, received_at))

    def add_proposal(self, header: EpochHeader, network: bytes) -> None:
        """Keep the first proposal of a round; the caller has checked whose turn it is."""
        if header.round < MAX_ROUNDS:
            self._proposals.setdefault(header.round, (header, header_hash(header, network)))
            self.changed_rounds.add(header.round)

    def add_vote(self, signer: bytes, vote: HeaderVote, envelope: bytes) -> DoubleHeader | None:
        """Keep a member's first vote of a round: its verified envelope's signature is what the certificate needs.

        Returns evidence when it has voted differently in this round before, once for each member and epoch.
        """
        if vote.round >= MAX_ROUNDS:
            return None
        signature = decode(Signed, envelope).signature
        first = self._votes.setdefault(vote.round, {}).setdefault(signer, (vote.header_hash, signature))
        self.changed_rounds.add(vote.round)
        if first[0] == vote.header_hash or signer in self._accused:
            return None
        self._accused.add(signer)
        votes = [
            (HeaderVote(vote.epoch, vote.round, digest), each)
            for digest, each in (first, (vote.header_hash, signature))
        ]
        votes.sort(key=lambda pair: pair[0].header_hash)  # the same evidence, whoever finds it
        return DoubleHeader(signer, *votes[0], *votes[1])

    def reveals(self) -> tuple[SignedReveal, ...]:
        """All reveals."""
        return tuple(SignedReveal(key, proof) for key, (proof, _) in self._reveals.items())

    def reveals_before(self, time: float) -> frozenset[bytes]:
        """Who had revealed by then."""
        return frozenset(key for key, (_, received_at) in self._reveals.items() if received_at <= time)

    def open_proposals(self, round_: int) -> list[tuple[EpochHeader, bytes]]:
        """Proposals up to `round_` on which this node has not decided, newest first; never older than its last vote."""
        return [
            self._proposals[each]
            for each in sorted(self._proposals, reverse=True)
            if self.voted_round < each <= round_ and self._proposals[each][1] not in self.refused
        ]

    def keep_body(self, digest: bytes, data: bytes) -> None:
        """Hold a proposal's body for those who ask, the newest few."""
        self.bodies[digest] = data
        while len(self.bodies) > BODIES_KEPT:
            del self.bodies[next(iter(self.bodies))]

    def find_quorum(self, registry: Registry, round_: int) -> Quorum | None:
        """The proposal of the round, if ≥ 2/3 of the stake voted for it."""
        if round_ not in self._proposals:
            return None
        header, digest = self._proposals[round_]
        ballots, members = self._votes.get(round_, {}), epoch_members(registry)
        agreeing = [
            (index, stake, ballots[key][1])
            for index, (key, stake) in enumerate(members)
            if key in ballots and ballots[key][0] == digest
        ]
        if not is_supermajority(sum(stake for _, stake, _ in agreeing), sum(stake for _, stake in members)):
            return None
        bits = sum(1 << index for index, _, _ in agreeing)
        mask = bits.to_bytes((len(members) + 7) // 8, "little")
        return Quorum(header, digest, EpochCertificate(mask, tuple(signature for _, _, signature in agreeing)))
