"""The library's host on our network, for its protocols, identify above all; and ping."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial

import trio

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.negotiation import read_exactly
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.yamux_stream import MuxedStream

from libp2p.custom_types import TProtocol  # isort: skip
from libp2p.host.basic_host import BasicHost  # isort: skip
from libp2p.host.ping import ID as PING_ID  # isort: skip
from libp2p.identity.identify.identify import ID as IDENTIFY_ID  # isort: skip
from libp2p.identity.identify.identify import identify_handler_for  # isort: skip
from libp2p.network.stream.net_stream import NetStream, StreamState  # isort: skip
from libp2p.protocol_muxer.multiselect import Multiselect  # isort: skip
from multiaddr import Multiaddr  # isort: skip

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
        self._libp2p = {str(IDENTIFY_ID): identify_handler_for(self)}
        self._pinging: Counter[Connection] = Counter()
        for protocol in self._libp2p:
            network.handlers[protocol] = partial(self._serve, protocol)
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

    async def _serve(self, protocol: str, connection: Connection, stream: MuxedStream) -> None:
        net_stream = NetStream(stream, connection, None)
        await net_stream.set_state(StreamState.OPEN)
        net_stream.set_protocol(TProtocol(protocol))
        await self._libp2p[protocol](net_stream)
