"""What happens to a machine (`Event`) and what it wants done (`Action`): closed unions, so that none is forgotten.

The driver in `node/` turns actions into calls on adapters, and their results into events. The simulator does the same
in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kaisar_p2p.wire.matproof import Job
from protocols.interpreter.events import LedgerEvent
from protocols.interpreter.state import State
from protocols.orders import Workload

# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class BlockApplied:
    """A finalized block was applied; `state` is the state after it. While catching up, `live` is False."""

    state: State
    events: tuple[LedgerEvent, ...]
    live: bool = True


@dataclass(frozen=True)
class Gossip:
    """A message that `validate_*` accepted: `message` is what it returned (usually a Verified)."""

    topic: str
    message: Any
    sender: bytes
    received_at: float


@dataclass(frozen=True)
class Incoming:
    """A peer's request on a stream protocol; answer with `Reply` actions carrying `call_id`."""

    call_id: int
    peer: bytes
    protocol: str
    payload: bytes
    received_at: float


@dataclass(frozen=True)
class Answer:
    """One frame of a peer's answer to our `Request`; `sent_at` is when the request's frame went out (0 = not known)."""

    request_id: str
    payload: bytes
    received_at: float
    sent_at: float = 0.0


@dataclass(frozen=True)
class RequestEnded:
    """A `Request` is over; `error` is empty when the peer closed normally.

    `local` says that the failure was ours: nobody may be blamed for it. `began_at` is when the request left our own
    queue (0 = it did not, or that is not known).
    """

    request_id: str
    error: str
    local: bool = False
    began_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class WorkDone:
    """A `Compute` finished: `result` is the task's result, or None with an `error`."""

    work_id: str
    result: Any
    error: str = ""


@dataclass(frozen=True)
class ContainerReport:
    """From the runtime: `phase` is "created", "started", "healthy", "unhealthy", "exited" or "failed"."""

    order_id: bytes
    phase: str
    detail: str = ""


@dataclass(frozen=True)
class ProbeReport:
    """Result of a `Probe`: did the container answer through the tunnel?

    `answered` is False when not even the worker did; `local` says that the failure was ours and shows nothing.
    """

    probe_id: str
    up: bool
    detail: str
    answered: bool = True
    local: bool = False


@dataclass(frozen=True)
class Wake:
    """The machine's own `deadline` has passed."""


Event = BlockApplied | Gossip | Incoming | Answer | RequestEnded | WorkDone | ContainerReport | ProbeReport | Wake

# ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Duty:
    """Journalled before the action is carried out: for one `key`, a second, different `digest` is refused for ever.

    This is what keeps a node from signing two different things for one duty after a crash.
    """

    key: str
    digest: bytes


@dataclass(frozen=True)
class Publish:
    """Gossip `payload` on a topic."""

    topic: str
    payload: bytes
    duty: Duty | None = None


@dataclass(frozen=True)
class Request:
    """Send one frame to a peer and expect up to `max_frames` frames back before `deadline_s` seconds.

    A frame of more than `max_reply_bytes` ends the request before it is read.
    """

    request_id: str
    peer: bytes
    protocol: str
    payload: bytes
    deadline_s: float
    max_frames: int = 1
    duty: Duty | None = None
    max_reply_bytes: int = 4_096


@dataclass(frozen=True)
class Reply:
    """One frame of an answer; `last` closes the stream."""

    call_id: int
    payload: bytes
    last: bool = True
    duty: Duty | None = None


@dataclass(frozen=True)
class ProveTask:
    """Run the compute proof; the result is a matproof proof (roots, tags)."""

    job: Job
    seed: bytes


@dataclass(frozen=True)
class CheckTask:
    """Recompute `samples` tiles; the result is a matproof.CheckResult."""

    job: Job
    seed: bytes
    roots: tuple[bytes, ...]
    tags: tuple[bytes, ...]
    randomness: bytes
    samples: int


@dataclass(frozen=True)
class Compute:
    """Run a task in a worker thread, one at a time, then report WorkDone."""

    work_id: str
    task: ProveTask | CheckTask


@dataclass(frozen=True)
class Submit:
    """Submit a call with the owner wallet, once for each `key` (a repeated key is ignored while the first is alive)."""

    key: str
    payload: bytes


@dataclass(frozen=True)
class Store:
    """Persist bytes under (kind, key), in the same transaction as the duties of the step."""

    kind: str
    key: bytes
    value: bytes


@dataclass(frozen=True)
class Deploy:
    """Start the order's container; phases come back as ContainerReport."""

    order_id: bytes
    workload: Workload
    cpu_cores: int
    memory_mb: int
    disk_mb: int
    gpus: int


@dataclass(frozen=True)
class Stop:
    """Stop and remove the order's container."""

    order_id: bytes


@dataclass(frozen=True)
class Probe:
    """Open a tunnel to the lease's first port as a user would; reports ProbeReport."""

    probe_id: str
    order_id: bytes
    worker: bytes
    port: int
    deadline_s: float


@dataclass(frozen=True)
class Note:
    """Tell the node's user, in the API's event list and the log. `data` is text and integers, never a secret."""

    kind: str
    data: tuple[tuple[str, str | int], ...] = ()


Action = Publish | Request | Reply | Compute | Submit | Store | Deploy | Stop | Probe | Note
