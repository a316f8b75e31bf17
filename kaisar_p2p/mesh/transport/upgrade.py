"""From a raw connection to one that carries streams: agree on Noise, authenticate, agree on yamux.

The initiator sends its proposals together with what follows them, as multistream-select allows, and the muxer is
agreed on inside the handshake when the peer can do that
(https://github.com/libp2p/specs/blob/master/connections/inlined-muxer-negotiation.md): a dial to a node like us takes
one round trip for TCP and one more, to others one more again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.transport.keepalive import Keeper
from kaisar_p2p.mesh.transport.negotiation import confirm, proposal, respond
from kaisar_p2p.mesh.transport.noise import PROTOCOL_ID as NOISE_ID
from kaisar_p2p.mesh.transport.noise import BufferedRaw, NoiseSession, NoiseTransport
from kaisar_p2p.mesh.transport.noise_handshake import HandshakeFailed
from kaisar_p2p.mesh.transport.yamux import Muxer
from kaisar_p2p.mesh.transport.yamux_outbox import SendingBytes
from kaisar_p2p.mesh.transport.yamux_stream import ReceivedBytes

from libp2p.abc import IMuxedConn, IRawConnection, ISecureConn  # isort: skip
from libp2p.crypto.keys import KeyPair  # isort: skip
from libp2p.custom_types import TProtocol  # isort: skip
from libp2p.io.exceptions import IOException  # isort: skip
from libp2p.peer.id import ID  # isort: skip
from libp2p.transport.exceptions import MuxerUpgradeFailure, SecurityUpgradeFailure  # isort: skip
from libp2p.transport.upgrader import TransportUpgrader  # isort: skip

YAMUX_ID = TProtocol("/yamux/1.0.0")

Instead = Callable[[IRawConnection], Awaitable[None]]


class Upgrader(TransportUpgrader):
    """Noise and our yamux, nothing else: the library offers plaintext by default.

    `instead` are protocols that a peer may speak in place of a handshake; their function ends the connection by
    raising.
    """

    def __init__(self, key_pair: KeyPair, limits: MeshLimits, instead: dict[str, Instead]) -> None:
        super().__init__({}, {})
        self.received = ReceivedBytes(limits.buffered_bytes)
        self.sending = SendingBytes(limits.sending_bytes)
        self.keeper = Keeper(limits.keepalive_s)
        self._noise = NoiseTransport(key_pair, (YAMUX_ID,))
        self._limits = limits
        self._instead = instead

    async def upgrade_security(
        self, raw_conn: IRawConnection, is_initiator: bool, peer_id: ID | None = None
    ) -> ISecureConn:
        """Authenticate and encrypt; raises SecurityUpgradeFailure."""
        raw = BufferedRaw(raw_conn)
        try:
            if is_initiator:
                assert peer_id is not None
                return await self._noise.secure_outbound(
                    raw, peer_id, proposal(NOISE_ID), lambda: confirm(raw, NOISE_ID)
                )
            protocol = await respond(raw, lambda name: name == NOISE_ID or name in self._instead)
            if protocol == NOISE_ID:
                return await self._noise.secure_inbound(raw)
            try:
                await self._instead[protocol](raw)  # type: ignore[arg-type]  # it reads, writes, asks for the address
            finally:
                await raw.flush()
            raise HandshakeFailed(f"the peer wanted {protocol} only")
        except (RequestFailed, HandshakeFailed, IOException) as error:
            raise SecurityUpgradeFailure(str(error)) from error

    async def upgrade_connection(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """Agree on yamux; raises MuxerUpgradeFailure."""
        assert isinstance(conn, NoiseSession)
        try:
            if YAMUX_ID not in conn.remote_muxers:
                await self._agree_on_muxer(conn)
        except (RequestFailed, HandshakeFailed, IOException) as error:
            raise MuxerUpgradeFailure(str(error)) from error
        return Muxer(
            conn, peer_id, limits=self._limits, received=self.received, sending=self.sending, keeper=self.keeper
        )

    async def _agree_on_muxer(self, session: NoiseSession) -> None:
        if session.is_initiator:
            await session.write(proposal(YAMUX_ID))
            await confirm(session, YAMUX_ID)
        else:
            await respond(session, lambda name: name == YAMUX_ID)
