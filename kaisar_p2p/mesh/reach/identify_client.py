"""Asking a peer who it is and how it sees us, with libp2p's identify protocol, so that any implementation answers.

https://github.com/libp2p/specs/blob/master/identify/README.md
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.discovery.addresses import Address
from kaisar_p2p.mesh.protobuf import all_bytes_in, bytes_in, parse_fields
from kaisar_p2p.mesh.reach.circuit_wire import direct_addresses_of, receive
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal

from libp2p.identity.identify.identify import ID  # isort: skip

_PROTOCOL = str(ID)
_MESSAGE_BYTES = 16 * 1024
_PROTOCOLS = 128
_DEADLINE_S = 5.0


@dataclass(frozen=True)
class Identity:
    """What the peer says: where it listens, where it sees our end of the connection, which protocols it speaks."""

    listening: tuple[Address, ...]
    observed: Address | None
    protocols: frozenset[str]


async def identify(connection: Connection) -> Identity:
    """Ask. Raises RequestFailed, the library's MuxedStreamError or MuxedConnUnavailable, or trio.TooSlowError."""
    stream = connection.muxer.open_stream_nowait()
    try:
        with trio.fail_after(_DEADLINE_S):
            await stream.write(proposal(_PROTOCOL))
            await confirm(stream, _PROTOCOL)
            return parse(await receive(stream, _MESSAGE_BYTES))
    finally:
        stream.reset_nowait()


def parse(data: bytes) -> Identity:
    """Raises MalformedMessage."""
    fields = parse_fields(data, most=4 * _PROTOCOLS)
    observed = direct_addresses_of((bytes_in(fields, 4) or b"",))
    return Identity(
        listening=tuple(direct_addresses_of(all_bytes_in(fields, 2))),
        observed=observed[0] if observed else None,
        protocols=frozenset(p.decode("utf-8", "replace") for p in all_bytes_in(fields, 3)[:_PROTOCOLS]),
    )
