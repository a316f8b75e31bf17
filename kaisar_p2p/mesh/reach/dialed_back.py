"""The accepting end of a dial-back: a secret arrives where a handshake would begin.

It takes the place of a security protocol, so that it comes over a connection of its own, through whatever stands
before our listener, and costs neither side a handshake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)

from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport  # isort: skip
from libp2p.custom_types import TProtocol  # isort: skip
from libp2p.peer.id import ID  # isort: skip

BACK_PROTOCOL = TProtocol("/kaisar/reach/back/1")
SECRET_BYTES = 16
TAKEN, NOT_TAKEN = b"\x01", b"\x00"


class DialedBack(Exception):
    """The connection was a dial-back, and is done."""


class DialBackTransport(ISecureTransport):
    """Takes secrets; `take(secret, host)` says whether it was one of ours, from an address that may bring it."""

    def __init__(self, take: Callable[[bytes, str], bool]) -> None:
        self._take = take

    async def secure_inbound(self, conn: IRawConnection) -> NoReturn:
        """Read one secret, confirm it, and end the connection by raising DialedBack."""
        secret = b""
        while len(secret) < SECRET_BYTES and (part := await conn.read(SECRET_BYTES - len(secret))):
            secret += part
        remote = conn.get_remote_address()
        await conn.write(TAKEN if remote is not None and self._take(secret, remote[0]) else NOT_TAKEN)
        raise DialedBack

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Never: a dial-back carries no streams."""
        raise DialedBack
