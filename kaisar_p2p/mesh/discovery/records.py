"""Signed address records: what a node says about where it is reached, so that others can pass it on unaltered.

Whoever tells the addresses of a third key must show that key's signature, made for this network; so nobody can send
dialers elsewhere in another's name. Of several records the largest sequence counts: a replay of an older one changes
nothing where the newer is known, and ends with its lifetime where it is not. The idea is libp2p's
(https://github.com/libp2p/specs/blob/master/RFC/0003-routing-records.md), the envelope is ours (`wire.envelope`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from kaisar_p2p.errors import DecodeError, SignatureError
from kaisar_p2p.wire.codec import U8, U32, U64, AtMost, Bytes32, Count, message
from kaisar_p2p.wire.crypto import KeyPair, sha256
from kaisar_p2p.wire.envelope import Verified, open_signed, seal

RECORD_BYTES = 2048
_FRAMING_BYTES = 256  # of a record: everything but the addresses
MAX_ADDRESSES = 16
ADDRESS_BYTES = 200
SKEW_S = 2 * 3600
"""Two clocks that are off by an hour each, in opposite directions."""
MAX_LIFETIME_S = 24 * 3600

RELAY = 1
"""Service: reserves slots and carries connections (libp2p's circuit relay v2)."""
RENDEZVOUS = 2
"""Service: reachable from everywhere, so a good place to leave a record and to look for others."""


@message(4)
@dataclass(frozen=True)
class AddressRecord:
    """Where a peer is reached, and what it does for others; valid for `lifetime_s` from `issued_at` (Unix seconds)."""

    DOMAIN: ClassVar[str] = "kaisar/addresses"
    key: Bytes32
    sequence: U64
    addresses: Annotated[tuple[Annotated[str, AtMost(ADDRESS_BYTES)], ...], Count(MAX_ADDRESSES)]
    issued_at: U64
    lifetime_s: U32
    services: U8


Record = Verified[AddressRecord]


def network_id(name: str) -> bytes:
    """32 bytes that stand for a network's name, in signatures and in the peer exchange."""
    return sha256(b"kaisar/mesh/network", name.encode())


def open_record(data: bytes, network: bytes, now: float) -> Record:
    """A record that its key has signed for this network and that is valid at `now` (Unix seconds).

    Raises DecodeError or SignatureError. Clocks may differ by `SKEW_S`.
    """
    if len(data) > RECORD_BYTES:
        raise DecodeError(f"an address record of {len(data)} bytes exceeds {RECORD_BYTES}")
    record = open_signed(AddressRecord, data, network)
    told = record.message
    if told.key != record.signer:
        raise SignatureError("an address record about another key than its signer's")
    if not 0 < told.lifetime_s <= MAX_LIFETIME_S:
        raise DecodeError("an address record that is valid for too long")
    if not told.issued_at - SKEW_S <= now <= told.issued_at + told.lifetime_s + SKEW_S:
        raise DecodeError("an address record of another time")
    return record


_REMEMBERED = 64  # records that we signed


class OwnRecord:
    """This node's record: signed anew when something in it changes, and when a quarter of its life is over."""

    def __init__(
        self,
        keys: KeyPair,
        network: bytes,
        addresses: Callable[[], Iterable[str]],
        lifetime_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys, self._network = keys, network
        self._addresses = addresses
        self._lifetime_s = int(min(lifetime_s, MAX_LIFETIME_S))
        self._clock = clock
        self._sequence = 0
        self._told: AddressRecord | None = None
        self._envelope = b""
        self._signed: deque[AddressRecord] = deque(maxlen=_REMEMBERED)
        self._began = clock()
        self.services = 0

    def envelope(self) -> bytes:
        """The signed record, as it travels."""
        addresses, now = _fitting(self._addresses()), self._clock()
        told = self._told
        if told is None or (told.addresses, told.services) != (addresses, self.services) or self._is_old(told, now):
            self._sign(addresses, now)
        return self._envelope

    @property
    def sequence(self) -> int:
        """Of the newest record that was signed; 0 before the first."""
        return self._sequence

    def surpass(self, sequence: int) -> bool:
        """A peer knows a record of ours that is newer than ours: from before a restart, with a clock that was ahead.

        The next one gets a larger sequence. Returns whether that was necessary.
        """
        if sequence <= self._sequence:
            return False
        self._sequence, self._told = sequence, None
        return True

    def proves_twin(self, told: AddressRecord) -> bool:
        """Another process signs with our key: a record that was issued since we began, and not by us.

        What this node signed before a restart, perhaps with a clock that was ahead, proves nothing.
        """
        forgotten = len(self._signed) == _REMEMBERED and told.sequence < self._signed[0].sequence
        return self._began < told.issued_at <= self._clock() + 1 and told not in self._signed and not forgotten

    def _is_old(self, told: AddressRecord, now: float) -> bool:
        return not 0 <= now - told.issued_at < self._lifetime_s / 4

    def _sign(self, addresses: tuple[str, ...], now: float) -> None:
        # Milliseconds of the clock, so that a restart does not begin again below what others have seen.
        self._sequence = min(max(int(now * 1000), self._sequence + 1), 2**64 - 1)
        self._told = AddressRecord(
            self._keys.public_key, self._sequence, addresses, max(0, int(now)), self._lifetime_s, self.services
        )
        self._signed.append(self._told)
        self._envelope = seal(self._told, self._keys, self._network)


def _fitting(addresses: Iterable[str]) -> tuple[str, ...]:
    """The first ones that a record holds."""
    chosen: list[str] = []
    left = RECORD_BYTES - _FRAMING_BYTES
    for text in addresses:
        size = len(text.encode()) + 3
        if size <= min(left, ADDRESS_BYTES + 3) and len(chosen) < MAX_ADDRESSES:
            chosen.append(text)
            left -= size
    return tuple(chosen)
