"""Two commitments of one worker in one slot: how a seat finds the other one, and the evidence (for `popw_seat`).

A vote and a certificate name a commitment, they do not carry it. A seat that sees another one than its own asks who
voted for it; both envelopes together are the evidence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.envelope import Signed
from kaisar_p2p.wire.judge import peek
from protocols.actions import Action, Note, Publish, Request
from protocols.equivocation import EVIDENCE_TOPIC, DoubleCommit, context_of, verify_evidence
from protocols.interpreter.state import State
from protocols.popw import ENVELOPE_BYTES_MAX, NO_COMMIT, VOTE_PROTOCOL, CommitRequest

MAX_ASKED = 4
"""Seats that are asked for their commitment in one check: each may have gone since, or lie."""
ASK_DEADLINE_S = 3.0
REQUEST_BYTES_MAX = 64


def parse_commit_request(payload: bytes) -> CommitRequest | None:
    """The request in a frame of `/kaisar/vote/1`, or None."""
    return peek(CommitRequest, payload, REQUEST_BYTES_MAX)


@dataclass
class Commitments:
    """The worker's commitment in one check as this seat got it (`envelope`), and the search for another one."""

    name: str
    request: CommitRequest
    hash: bytes = NO_COMMIT
    envelope: bytes = b""
    accused: bool = False
    _asked: set[bytes] = field(default_factory=set)

    def named(self, commitment: bytes, voter: bytes) -> list[Action]:
        """`voter` signed a verdict on a commitment: if it is not ours, see it."""
        if NO_COMMIT in (self.hash, commitment) or commitment == self.hash or self.accused:
            return []
        if voter in self._asked or len(self._asked) >= MAX_ASKED:
            return []
        self._asked.add(voter)
        identifier = f"commit/{self.name}/{len(self._asked)}"
        payload = encode(self.request)
        return [Request(identifier, voter, VOTE_PROTOCOL, payload, ASK_DEADLINE_S, max_reply_bytes=ENVELOPE_BYTES_MAX)]

    def seen(self, envelope: bytes, state: State) -> list[Action]:
        """An envelope from anybody: evidence, once, if the worker signed in it another commitment than ours."""
        if self.accused or not self.envelope or envelope == self.envelope:
            return []
        first, second = (peek(Signed, each, ENVELOPE_BYTES_MAX) for each in sorted((self.envelope, envelope)))
        if first is None or second is None:
            return []
        evidence = DoubleCommit(first, second)
        if verify_evidence(evidence, context_of(state)) is None:
            return []
        self.accused = True
        data = (("kind", "double commit"), ("offender", self.request.worker.hex()), ("slot", self.request.slot))
        return [Publish(EVIDENCE_TOPIC, encode(evidence)), Note("evidence", data)]
