"""The bodies that a node holds, and the newest anchored one, which the next epoch continues.

A body whose header this node signed is kept, in the node's store too, before the signature goes out: the header may be
anchored much later, and if nobody had its body by then, no further epoch could be closed.
"""

from __future__ import annotations

from collections.abc import Iterable

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import decode
from protocols.actions import Action, Answer, RequestEnded, Store
from protocols.epoch_body import GENESIS, Base, belongs_to
from protocols.epoch_fetch import ANCHORED, BODY, MAX_PEERS, Downloads, Fetched
from protocols.epoch_gossip import proposers
from protocols.epochs import EpochBody
from protocols.interpreter.state import State

BODIES_KEPT = 32
QUORUMS_KEPT = 8
STORE_KIND = "body"


def parse_body(data: bytes | None) -> EpochBody | None:
    """The body in these bytes, None if there is none."""
    if data is None:
        return None
    try:
        return decode(EpochBody, data)
    except DecodeError:
        return None


class Library:
    """Keeps the newest few bodies in memory, the rest is in the node's store; fetches the one that is missing."""

    def __init__(self, own_key: bytes, network: bytes, bodies: Iterable[tuple[bytes, bytes]]) -> None:
        self._own_key = own_key
        self._network = network
        self._bodies: dict[bytes, bytes] = {}
        self._downloads = Downloads("epoch")
        self._not_before = 0.0
        self._attempts = 0
        self._quorums: list[bytes] = []
        self.base = GENESIS
        for digest, data in bodies:
            self._keep(digest, data)

    @property
    def lacks_base(self) -> bool:
        """Whether an epoch is anchored whose body is not here: nothing can be built or checked then."""
        return self.base.header is not None and self.base.body is None

    def get(self, digest: bytes) -> bytes | None:
        """A body by its header's hash."""
        return self._bodies.get(digest)

    def follow(self, state: State) -> bool:
        """Make the newest anchor the base; True if base or its body changed."""
        anchor = state.anchors.get(state.last_anchor)
        if anchor is None:
            return False
        is_same = self.base.header_hash == anchor.header_hash
        if is_same and self.base.body is not None:
            return False
        body = parse_body(self._bodies.get(anchor.header_hash))
        if is_same and body is None:
            return False
        self.base = Base(anchor.header, anchor.header_hash, body)
        self._quorums.clear()
        return True

    def hold(self, digest: bytes, data: bytes) -> list[Action]:
        """Keep the body of a header that this node approves of, in memory and on disk."""
        self._keep(digest, data)
        return [Store(STORE_KIND, digest, data)]

    def expect(self, digest: bytes) -> None:
        """A quorum signed this header: its body is not dropped before an anchor decides."""
        if digest not in self._quorums:
            self._quorums = [*self._quorums, digest][-QUORUMS_KEPT:]

    # ── fetching ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def is_fetching(self, digest: bytes) -> bool:
        """Whether a proposal's body is on its way."""
        return self._downloads.is_fetching(BODY, digest)

    def fetch_proposed(self, digest: bytes, proposer: bytes) -> list[Action]:
        """Ask a proposer for its body."""
        return [*self._downloads.start(BODY, digest, [proposer])]

    def fetch_base(self, state: State | None, now: float) -> list[Action]:
        """Ask for the base's body; `state` is the newest one."""
        if state is None or self.base.header is None:
            return []
        return self.fetch_anchored(state, self.base.header.epoch, now)

    def fetch_anchored(self, state: State, epoch: int, now: float) -> list[Action]:
        """Ask the header's proposer, then others, for an anchored body; not sooner than a round after a failure."""
        anchor = state.anchors.get(epoch)
        if anchor is None or now < self._not_before:
            return []
        order = proposers(state, epoch) or tuple(key for key, _ in state.registries.get(state.epoch, ()))
        start = (anchor.header.round + self._attempts * MAX_PEERS) % max(1, len(order))
        peers = [key for key in order[start:] + order[:start] if key != self._own_key]
        return [*self._downloads.start(ANCHORED, anchor.header_hash, peers)]

    def on_answer(self, event: Answer | RequestEnded, state: State, now: float) -> tuple[list[Action], Fetched | None]:
        """Go on with a download. Anchored bodies are checked and kept here; a proposal's body is returned."""
        if isinstance(event, Answer):
            requests, fetched = self._downloads.answer(event.request_id, event.payload)
        else:
            requests, fetched = self._downloads.ended(event.request_id)
        if fetched is None or fetched.kind == BODY:
            return [*requests], fetched
        return [*requests, *self._on_anchored_body(fetched, state, now)], None

    def _on_anchored_body(self, fetched: Fetched, state: State, now: float) -> list[Action]:
        anchor = next((each for each in state.anchors.values() if each.header_hash == fetched.key), None)
        body = parse_body(fetched.data)
        if anchor is None or fetched.data is None or body is None or not belongs_to(body, anchor.header, self._network):
            self._not_before = now + state.params.proposer_timeout_ms / 1000
            self._attempts += 1
            return []
        return self.hold(fetched.key, fetched.data)

    def _keep(self, digest: bytes, data: bytes) -> None:
        self._bodies.pop(digest, None)
        self._bodies[digest] = data
        needed = {digest, self.base.header_hash, *self._quorums}
        for old in [old for old in self._bodies if old not in needed][: max(0, len(self._bodies) - BODIES_KEPT)]:
            del self._bodies[old]
