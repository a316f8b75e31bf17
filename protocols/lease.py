"""One lease on its worker: the table of its states, and what the node keeps of it (`lease_worker` runs them).

A lease goes PLACED → AUTHORISED → DEPLOYING → RUNNING (↔ DEGRADED) → ENDED; a signal that the table does not know in a
state changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated

from kaisar_p2p.wire.codec import U8, U32, AtMost, Bytes32, Text64, encode, is_line, message
from kaisar_p2p.wire.crypto import sha256
from protocols.actions import Duty, Note, Publish, Store
from protocols.deploy import (
    AUTHORISED,
    DEGRADED,
    DEPLOYING,
    ENDED,
    LEASE_TOPIC,
    OPEN,
    OUTCOME_NAMES,
    PLACED,
    RUNNING,
    STATE_NAMES,
)
from protocols.orders import Workload

REPEAT_S = 2.0
"""A lease that is healthy but not READY says so again after this long, then after twice as long, and so on."""


class Signal(Enum):
    """What can happen to a lease."""

    TICKET = auto()
    WORKLOAD = auto()
    HEALTHY = auto()
    READY = auto()
    UNHEALTHY = auto()
    EXITED = auto()
    OVER = auto()


TRANSITIONS: dict[tuple[int, Signal], int] = {
    (PLACED, Signal.TICKET): AUTHORISED,
    (AUTHORISED, Signal.WORKLOAD): DEPLOYING,
    (DEPLOYING, Signal.HEALTHY): DEPLOYING,
    (DEPLOYING, Signal.READY): RUNNING,
    (DEPLOYING, Signal.UNHEALTHY): ENDED,
    (RUNNING, Signal.UNHEALTHY): DEGRADED,
    (DEGRADED, Signal.HEALTHY): RUNNING,
    **{(state, Signal.EXITED): ENDED for state in (DEPLOYING, RUNNING, DEGRADED)},
    **{(state, Signal.OVER): ENDED for state in (PLACED, AUTHORISED, DEPLOYING, RUNNING, DEGRADED)},
}


@message(79)
@dataclass(frozen=True)
class LeaseRecord:
    """What a worker's node keeps of a lease; never sent.

    `event` is the newest envelope, `sequence` that of the next one.
    """

    state: U8
    outcome: U8
    reason: Text64
    sequence: U32
    healthy: U8
    ready_slot: U32
    spec_hash: Bytes32
    event: Annotated[bytes, AtMost(2048)]


@dataclass
class Lease:
    """One lease on this worker."""

    order_id: bytes
    spec_hash: bytes
    state: int = PLACED
    outcome: int = OPEN
    reason: str = ""
    sequence: int = 0
    healthy: bool = False
    ready_slot: int = 0
    event: bytes = b""
    workload: Workload | None = None
    adopted: bool = True
    deploy_by: float | None = None
    repeat_at: float | None = None
    repeat_s: float = REPEAT_S
    stop_at: float | None = None

    @classmethod
    def of(cls, order_id: bytes, record: LeaseRecord, workload: Workload | None) -> Lease:
        """As it was when it was stored; its container has yet to be found."""
        return cls(
            order_id,
            record.spec_hash,
            record.state,
            record.outcome,
            record.reason,
            record.sequence,
            bool(record.healthy),
            record.ready_slot,
            record.event,
            workload,
            adopted=False,
        )

    @property
    def record(self) -> Store:
        """What to keep."""
        kept = LeaseRecord(
            self.state,
            self.outcome,
            self.reason,
            self.sequence,
            int(self.healthy),
            self.ready_slot,
            self.spec_hash,
            self.event,
        )
        return Store("lease", self.order_id, encode(kept))

    @property
    def publication(self) -> Publish:
        """The newest event; the same bytes again do no harm."""
        duty = Duty(f"lease/{self.order_id.hex()}/{self.sequence - 1}", sha256(self.event))
        return Publish(LEASE_TOPIC, self.event, duty)

    def note(self, text: str = "") -> Note:
        """The lease as the provider's own events tell it."""
        data: list[tuple[str, str | int]] = [("role", "worker"), ("order", self.order_id.hex())]
        data += [("state", STATE_NAMES[self.state]), ("reason", self.reason), ("text", clipped(text))]
        if self.state == ENDED:
            data.append(("outcome", OUTCOME_NAMES[self.outcome]))
        return Note("lease", tuple(data))

    @property
    def port(self) -> int:
        """What witnesses connect to."""
        return self.workload.ports[0] if self.workload and self.workload.ports else 0

    @property
    def has_container(self) -> bool:
        """Whether there should be a container."""
        return self.state in (DEPLOYING, RUNNING, DEGRADED)

    @property
    def deadline(self) -> float | None:
        """Its earliest time limit."""
        if self.state == ENDED:
            return self.stop_at
        waiting = (self.deploy_by,) if self.state < RUNNING else ()
        return min((at for at in (*waiting, self.repeat_at) if at is not None), default=None)


def clipped(text: str) -> str:
    """At most 256 bytes of UTF-8, one line: a program's own words may be anything."""
    line = "".join(letter for letter in " ".join(text.split()) if is_line(letter))
    return line.encode("utf-8", "replace")[:256].decode("utf-8", "ignore")
