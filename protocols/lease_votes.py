"""One deploy committee agreeing on one core: sign, send to the aggregators, count, certify (for `lease_witness`).

A vote goes to the first two aggregators, with retries because an aggregator may be a block behind; without a
certificate it goes to the next two after a while, so that two dead aggregators do not stop a lease.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair, domain_hash, sha256
from kaisar_p2p.wire.judge import peek
from protocols.actions import Action, Duty, Note, Publish, Request
from protocols.equivocation import EVIDENCE_TOPIC, DoubleVote
from protocols.popw import AGGREGATORS, COUNTED, MAX_AGGREGATORS, REFUSED, VOTE_DEADLINE_S, VOTE_PROTOCOL
from protocols.quorum import (
    Committee,
    CoreVote,
    QuorumCertificate,
    ReadyCore,
    SignedCore,
    TicketCore,
    VoteCounter,
    WitnessCore,
    check_signature,
)

LeaseCore = TicketCore | ReadyCore | WitnessCore
VOTE_BYTES_MAX = 512
RETRY_S = 0.4
MAX_ATTEMPTS = 6
"""Over 12 s: an aggregator that is two mainnet blocks behind still counts the vote."""
PATIENCE_S = 2.5


def aggregators(seats: tuple[bytes, ...], order_id: bytes, network: bytes) -> tuple[bytes, ...]:
    """The seats in the order in which they aggregate: lowest hash of the order with their key first."""
    return tuple(sorted(seats, key=lambda key: domain_hash("kaisar/agg", network, order_id, key)))


def parse_core_vote(payload: bytes) -> CoreVote | None:
    """The vote in a frame of `/kaisar/vote/1`; None for garbage, and for a verdict's vote (another machine's)."""
    return peek(CoreVote, payload, VOTE_BYTES_MAX)


def core_duty(core: LeaseCore) -> Duty:
    """One ticket and one READY of this node for each order, one statement for each order and window, for ever."""
    order = core.order_id.hex()
    digest = sha256(encode(core))
    match core:
        case TicketCore():
            return Duty(f"ticket/{order}", digest)
        case ReadyCore():
            return Duty(f"ready/{order}", digest)
        case WitnessCore():
            return Duty(f"witness/{order}/{core.slot}", digest)


@dataclass
class _Delivery:
    aggregator: bytes
    attempts: int = 0
    retry_at: float | None = None


@dataclass
class Ballot:
    """The votes of one committee on one subject, as one of its seats sees them; the certificate goes to `topic`."""

    name: str
    committee: Committee
    order: tuple[bytes, ...]
    topic: str
    core: LeaseCore | None = None
    closed: bool = False
    patience_at: float | None = None
    _asked: int = 0
    _vote: bytes = b""
    _deliveries: dict[bytes, _Delivery] = field(default_factory=dict)
    _accused: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._counter: VoteCounter[Any] = VoteCounter(self.committee)

    @property
    def deadline(self) -> float | None:
        """The next retry, or when the next aggregators are asked."""
        if self.closed:
            return None
        times = [each.retry_at for each in self._deliveries.values() if each.retry_at is not None]
        return min([*times, *([self.patience_at] if self.patience_at is not None else [])], default=None)

    # ── our own vote ─────────────────────────────────────────────────────────────────────────────────────────────────

    def vote(self, core: LeaseCore, keys: KeyPair, network: bytes, now: float) -> list[Action]:
        """Sign `core` and send it; does nothing when this seat has voted already."""
        if self.core is not None or keys.public_key not in self.committee.seats:
            return []
        self.core = core
        seat = self.committee.seats.index(keys.public_key)
        signature = keys.sign(core.DOMAIN, network, encode(core))
        self._vote = encode(CoreVote(core, seat, signature))
        signed = _check(core, seat, signature, self.committee, network)
        actions = self._count(signed) if signed is not None else []
        return [*actions, *self._ask_next(keys.public_key, now)]

    def _ask_next(self, own_key: bytes, now: float) -> list[Action]:
        if self.closed:
            return []
        asked = self.order[self._asked : self._asked + AGGREGATORS]
        self._asked += AGGREGATORS
        more = self._asked < min(MAX_AGGREGATORS, len(self.order))
        self.patience_at = now + PATIENCE_S if more else None
        return [self._send(_Delivery(key)) for key in asked if key != own_key]

    def _send(self, delivery: _Delivery) -> Request:
        assert self.core is not None
        delivery.attempts, delivery.retry_at = delivery.attempts + 1, None
        request_id = f"{self.name}/{delivery.aggregator.hex()[:16]}/{delivery.attempts}"
        self._deliveries[delivery.aggregator] = delivery
        return Request(
            request_id, delivery.aggregator, VOTE_PROTOCOL, self._vote, VOTE_DEADLINE_S, duty=core_duty(self.core)
        )

    def answered(self, request_id: str, payload: bytes, now: float) -> None:
        """An aggregator has counted our vote, or cannot yet."""
        delivery = self._delivery(request_id)
        if delivery is None:
            return
        if payload == COUNTED:
            delivery.attempts = MAX_ATTEMPTS
        else:
            self._retry_later(delivery, now)

    def ended(self, request_id: str, error: str, now: float) -> None:
        """A request is over; one that failed is tried again."""
        delivery = self._delivery(request_id)
        if delivery is not None and error:
            self._retry_later(delivery, now)

    def _delivery(self, request_id: str) -> _Delivery | None:
        return next(
            (
                each
                for each in self._deliveries.values()
                if request_id == f"{self.name}/{each.aggregator.hex()[:16]}/{each.attempts}"
            ),
            None,
        )

    def _retry_later(self, delivery: _Delivery, now: float) -> None:
        if delivery.attempts < MAX_ATTEMPTS and delivery.retry_at is None:
            delivery.retry_at = now + RETRY_S * 2 ** (delivery.attempts - 1)

    def wake(self, own_key: bytes, now: float) -> list[Action]:
        """Retries that are due, and the next aggregators when patience is over."""
        if self.closed:
            return []
        due = [each for each in self._deliveries.values() if each.retry_at is not None and each.retry_at <= now]
        actions: list[Action] = [self._send(each) for each in due]
        if self.patience_at is not None and self.patience_at <= now:
            actions += self._ask_next(own_key, now)
        return actions

    # ── others' votes ────────────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, vote: CoreVote, peer: bytes, network: bytes) -> tuple[bytes, list[Action]]:
        """Count a seat's vote; a repeat costs no signature check, a second different one is evidence."""
        # [REJECT] The sender holds that seat.
        if vote.seat >= len(self.committee.seats) or self.committee.seats[vote.seat] != peer:
            return REFUSED, []
        first = self._counter.vote_of(vote.seat)
        if first is not None and first.core == vote.core:
            return COUNTED, []
        if vote.seat in self._accused:
            return REFUSED, []
        # [REJECT] The signature is right.
        signed = _check(vote.core, vote.seat, vote.signature, self.committee, network)
        if signed is None:
            return REFUSED, []
        if first is not None:
            return REFUSED, self._accuse(first, vote)
        return COUNTED, self._count(signed)

    def _count(self, signed: SignedCore[Any]) -> list[Action]:
        certificate = self._counter.add(signed)
        if certificate is None or self.closed:
            return []
        self.closed = True
        # Our own signature is in it perhaps: then it goes out only under the duty of that vote.
        duty = core_duty(self.core) if self.core is not None and certificate.core == self.core else None
        return [Publish(self.topic, encode(certificate), duty)]

    @property
    def certificate(self) -> QuorumCertificate | None:
        """The certificate, if this seat could make one."""
        return self._counter.certificate

    def _accuse(self, first: SignedCore[Any], second: CoreVote) -> list[Action]:
        self._accused.add(second.seat)
        key = self.committee.seats[second.seat]
        evidence = DoubleVote(key, first.core, first.signature, second.core, second.signature)
        note = Note("evidence", (("kind", "double vote"), ("offender", key.hex())))
        return [Publish(EVIDENCE_TOPIC, encode(evidence)), note]


def _check(
    core: LeaseCore, seat: int, signature: bytes, committee: Committee, network: bytes
) -> SignedCore[Any] | None:
    match core:  # one call for each kind, because the kinds are told apart by type
        case TicketCore():
            return check_signature(core, seat, signature, committee, network)
        case ReadyCore():
            return check_signature(core, seat, signature, committee, network)
        case WitnessCore():
            return check_signature(core, seat, signature, committee, network)
