"""The library's host on our network, for its protocols, identify above all; and ping."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

import trio

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.protobuf import varint
from kaisar_p2p.mesh.transport.negotiation import read_exactly
from kaisar_p2p.mesh.transport.yamux_stream import MuxedStream

from libp2p.custom_types import TProtocol  # isort: skip
from libp2p.host.basic_host import BasicHost  # isort: skip
from libp2p.host.ping import ID as PING_ID  # isort: skip
from libp2p.identity.identify.identify import ID as IDENTIFY_ID  # isort: skip
from libp2p.identity.identify.identify import (  # isort: skip
    _mk_identify_protobuf as identify_message,
    _remote_address_to_multiaddr as multiaddr_of,
)
from libp2p.protocol_muxer.multiselect import Multiselect  # isort: skip
from multiaddr import Multiaddr  # isort: skip

_AGENT = "kaisar"  # no version: an attacker would know whom to try what on
_PING_BYTES = 32
_PING_STREAMS = 2  # of one connection, as the specification says
_PING_IDLE_S = 60.0


class Host(BasicHost):
    """The library's host on our network: serves identify and ping, does nothing by itself."""

    def __init__(self, network: Network, addresses: Callable[[], tuple[str, ...]]) -> None:
        self._addresses = addresses
        self._handlers = network.handlers
        super().__init__(network, default_protocols=OrderedDict(), disable_identify_address_discovery=True)
        network.notifees.clear()  # it would identify every peer, in a task whose failure ends the program
        self._pinging: Counter[Connection] = Counter()
        network.handlers[str(IDENTIFY_ID)] = self._answer_identify
        network.handlers[str(PING_ID)] = self._answer_pings

    def get_addrs(self) -> list[Multiaddr]:
        """What identify tells."""
        return [Multiaddr(text) for text in self._addresses()]

    def get_transport_addrs(self) -> list[Multiaddr]:
        """As `get_addrs`; our network has no listener objects of the library."""
        return self.get_addrs()

    def get_mux(self) -> Multiselect:
        """What identify tells that we speak: libp2p's protocols, gossip and relays among them; not our own."""
        spoken = (protocol for protocol in self._handlers if not protocol.startswith("/kaisar/"))
        return Multiselect(dict.fromkeys(map(TProtocol, spoken)))

    async def _answer_pings(self, connection: Connection, stream: MuxedStream) -> None:
        """Send back 32 bytes at a time (https://github.com/libp2p/specs/blob/master/ping/ping.md).

        The library's service counts a peer's streams, and a connection that breaks during a ping stays counted: after
        two of those the peer is never answered again, and what belonged to its connections is kept for ever.
        """
        if self._pinging[connection] >= _PING_STREAMS:
            stream.reset_nowait()
            return
        self._pinging[connection] += 1
        try:
            while True:
                with trio.fail_after(_PING_IDLE_S):
                    await stream.write(await read_exactly(stream, _PING_BYTES))
        except RequestFailed:  # the peer has pinged enough
            await stream.close()
        finally:
            self._pinging[connection] -= 1
            if not self._pinging[connection]:
                del self._pinging[connection]

    async def _answer_identify(self, connection: Connection, stream: MuxedStream) -> None:
        """Who we are (https://github.com/libp2p/specs/blob/master/identify/README.md), by another name."""
        told = identify_message(self, multiaddr_of(connection.muxer.get_remote_address()))
        told.agent_version = _AGENT
        data = told.SerializeToString()
        await stream.write(varint(len(data)) + data)
        await stream.close()
