"""Messages of circuit relay v2 and of hole punching: protocol buffers with a length in front, at most 4 KiB.

https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
https://github.com/libp2p/specs/blob/master/relay/DCUtR.md
https://github.com/libp2p/specs/blob/master/RFC/0002-signed-envelopes.md (the voucher)

Coded by hand: the messages are small, and the library's modules for them bring its whole relay along.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from nacl.signing import SigningKey

from kaisar_p2p.mesh.discovery.addresses import Address, AnyAddress, parse_any
from kaisar_p2p.mesh.ids import id_bytes_of
from kaisar_p2p.mesh.protobuf import (
    Fields,
    MalformedMessage,
    all_bytes_in,
    bytes_field,
    bytes_in,
    number_field,
    number_in,
    parse_fields,
    varint,
)
from kaisar_p2p.mesh.transport.negotiation import read_exactly
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from multiaddr import Multiaddr  # isort: skip
from multiaddr.exceptions import Error as MultiaddrError  # isort: skip

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
DCUTR = "/libp2p/dcutr"

MESSAGE_BYTES = 4096
_ADDRESSES = 16
_VOUCHER_DOMAIN = b"libp2p-relay-rsvp"
_VOUCHER_TYPE = b"\x03\x02"


class Status(IntEnum):
    """What a relay, or the peer behind it, answers."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


class HopType(IntEnum):
    """Kinds of `HopMessage`."""

    RESERVE = 0
    CONNECT = 1
    STATUS = 2


class StopType(IntEnum):
    """Kinds of `StopMessage`."""

    CONNECT = 0
    STATUS = 1


class PunchType(IntEnum):
    """Kinds of `PunchMessage`."""

    CONNECT = 100
    SYNC = 300


@dataclass(frozen=True)
class Limit:
    """Of one circuit: seconds, and bytes in each direction; 0 is none."""

    duration_s: int = 0
    data_bytes: int = 0


@dataclass(frozen=True)
class Reservation:
    """A slot at a relay: until when (Unix seconds), where it listens (binary multiaddrs with its id), and its word."""

    expires_at: int
    addresses: tuple[bytes, ...] = ()
    voucher: bytes = b""


@dataclass(frozen=True)
class HopMessage:
    """Between a client and its relay; `peer` is a peer id in bytes."""

    type: int
    peer: bytes | None = None
    reservation: Reservation | None = None
    limit: Limit | None = None
    status: int | None = None

    def encode(self) -> bytes:
        """As a protocol buffer."""
        reservation, limit = self.reservation, self.limit
        return b"".join(
            (
                number_field(1, self.type),
                bytes_field(2, bytes_field(1, self.peer)) if self.peer is not None else b"",
                bytes_field(3, _encode_reservation(reservation)) if reservation is not None else b"",
                bytes_field(4, _encode_limit(limit)) if limit is not None else b"",
                number_field(5, self.status) if self.status is not None else b"",
            )
        )

    @staticmethod
    def decode(data: bytes) -> HopMessage:
        """Raises MalformedMessage."""
        fields = parse_fields(data)
        return HopMessage(
            type=_required(number_in(fields, 1)),
            peer=_peer_in(fields, 2),
            reservation=_reservation_in(fields, 3),
            limit=_limit_in(fields, 4),
            status=number_in(fields, 5),
        )


@dataclass(frozen=True)
class StopMessage:
    """Between a relay and the peer that a circuit leads to."""

    type: int
    peer: bytes | None = None
    limit: Limit | None = None
    status: int | None = None

    def encode(self) -> bytes:
        """As a protocol buffer."""
        return b"".join(
            (
                number_field(1, self.type),
                bytes_field(2, bytes_field(1, self.peer)) if self.peer is not None else b"",
                bytes_field(3, _encode_limit(self.limit)) if self.limit is not None else b"",
                number_field(4, self.status) if self.status is not None else b"",
            )
        )

    @staticmethod
    def decode(data: bytes) -> StopMessage:
        """Raises MalformedMessage."""
        fields = parse_fields(data)
        return StopMessage(
            type=_required(number_in(fields, 1)),
            peer=_peer_in(fields, 2),
            limit=_limit_in(fields, 3),
            status=number_in(fields, 4),
        )


@dataclass(frozen=True)
class PunchMessage:
    """Of hole punching: my observed addresses (binary multiaddrs), or the starting signal."""

    type: int
    addresses: tuple[bytes, ...] = ()

    def encode(self) -> bytes:
        """As a protocol buffer."""
        return number_field(1, self.type) + b"".join(bytes_field(2, address) for address in self.addresses)

    @staticmethod
    def decode(data: bytes) -> PunchMessage:
        """Raises MalformedMessage."""
        fields = parse_fields(data)
        return PunchMessage(_required(number_in(fields, 1)), all_bytes_in(fields, 2))


# -- sending and receiving --------------------------------------------------------------------------------------------


async def send(stream: MuxedStream, message: HopMessage | StopMessage | PunchMessage) -> None:
    """Send one message with its length."""
    await stream.write(framed(message))


def framed(message: HopMessage | StopMessage | PunchMessage) -> bytes:
    """A message with its length in front."""
    data = message.encode()
    return varint(len(data)) + data


async def receive(stream: MuxedStream, most: int = MESSAGE_BYTES) -> bytes:
    """The bytes of one message, and none after it; RequestFailed at the end of the stream or for a wrong length."""
    size = shift = 0
    while True:
        byte = (await read_exactly(stream, 1))[0]
        size |= (byte & 127) << shift
        shift += 7
        if size > most or shift > 21:
            raise MalformedMessage(f"a message of more than {most} bytes was announced")
        if byte < 128:
            return await read_exactly(stream, size)


# -- addresses and vouchers -------------------------------------------------------------------------------------------


def binary_of(address: AnyAddress | str) -> bytes:
    """A multiaddr in binary."""
    return bytes(Multiaddr(str(address)).to_bytes())


def addresses_of(binaries: Iterable[bytes]) -> list[tuple[AnyAddress, bytes | None]]:
    """The TCP addresses, or ones behind relays, among what a peer sent, each with the key named at its end."""
    found: list[tuple[AnyAddress, bytes | None]] = []
    for binary in tuple(binaries)[:_ADDRESSES]:
        try:
            found.append(parse_any(str(Multiaddr(binary))))
        except (ValueError, LookupError, MultiaddrError):
            continue  # another transport, or garbage
    return found


def direct_addresses_of(binaries: Iterable[bytes]) -> list[Address]:
    """Of these, the ones to dial directly."""
    return [address for address, _key in addresses_of(binaries) if isinstance(address, Address)]


def voucher(relay: SigningKey, peer: bytes, expires_at: int) -> bytes:
    """The relay's signed word that the peer with this machine key has a slot until then (Unix seconds)."""
    own = bytes(relay.verify_key)
    payload = bytes_field(1, id_bytes_of(own)) + bytes_field(2, id_bytes_of(peer)) + number_field(3, expires_at)
    signed = b"".join(varint(len(part)) + part for part in (_VOUCHER_DOMAIN, _VOUCHER_TYPE, payload))
    signature = relay.sign(signed).signature
    public_key = number_field(1, 1) + bytes_field(2, own)  # ed25519
    return (
        bytes_field(1, public_key) + bytes_field(2, _VOUCHER_TYPE) + bytes_field(3, payload) + bytes_field(5, signature)
    )


# -- parts of messages -------------------------------------------------------------------------------------------------


def _required(value: int | None) -> int:
    if value is None:
        raise MalformedMessage("a message has no type")
    return value


def _peer_in(fields: Fields, field: int) -> bytes | None:
    data = bytes_in(fields, field)
    return None if data is None else bytes_in(parse_fields(data), 1)


def _limit_in(fields: Fields, field: int) -> Limit | None:
    data = bytes_in(fields, field)
    if data is None:
        return None
    inner = parse_fields(data)
    return Limit(number_in(inner, 1) or 0, number_in(inner, 2) or 0)


def _encode_limit(limit: Limit) -> bytes:
    return number_field(1, limit.duration_s) + number_field(2, limit.data_bytes)


def _reservation_in(fields: Fields, field: int) -> Reservation | None:
    data = bytes_in(fields, field)
    if data is None:
        return None
    inner = parse_fields(data)
    return Reservation(number_in(inner, 1) or 0, all_bytes_in(inner, 2), bytes_in(inner, 3) or b"")


def _encode_reservation(reservation: Reservation) -> bytes:
    addresses = b"".join(bytes_field(2, address) for address in reservation.addresses)
    signed = bytes_field(3, reservation.voucher) if reservation.voucher else b""
    return number_field(1, reservation.expires_at) + addresses + signed
