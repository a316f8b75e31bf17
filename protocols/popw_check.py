"""What a seat knows of one check (`popw_seat` acts on it)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from kaisar_p2p.wire.matproof import Job
from protocols.actions import Duty
from protocols.due import DueCheck
from protocols.popw import Challenge, Commit
from protocols.popw_commits import Commitments
from protocols.popw_votes import Tally
from protocols.quorum import Committee


class Stage(Enum):
    """Where a seat is with one check."""

    WAITING = auto()
    COMMITTED = auto()
    CHECKING = auto()
    VOTED = auto()
    DROPPED = auto()


@dataclass
class Check:
    """One check of this slot in which this node has a seat.

    The worker's time counts from `sent_at`: the slot's start (`started_at`), or when the first challenge that may have
    reached it (`reached_out`) left this node.
    """

    name: str
    due: DueCheck
    challenge: Challenge
    payload: bytes
    beacon: bytes
    job: Job
    order: tuple[bytes, ...]
    tally: Tally
    commitments: Commitments
    started_at: float
    sent_at: float
    reached_out: bool = False
    stage: Stage = Stage.WAITING
    attempt: int = 0
    retry_at: float | None = None
    elapsed_ms: int = 0
    commit: Commit | None = None
    tags: tuple[bytes, ...] = ()
    proof: bytes = b""
    vote: bytes = b""
    duty: Duty | None = None
    asked: int = 0
    patience_at: float | None = None
    pending: set[str] = field(default_factory=set)

    @property
    def committee(self) -> Committee:
        """Who has a seat."""
        return self.tally.committee
