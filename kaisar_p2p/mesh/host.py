"""The library's host on our network, for its protocols: identify and ping."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from kaisar_p2p.mesh.connection import Connection
from kaisar_p2p.mesh.network import Network
from kaisar_p2p.mesh.yamux_stream import MuxedStream

from libp2p.custom_types import TProtocol  # isort: skip
from libp2p.host.basic_host import BasicHost  # isort: skip
from libp2p.host.ping import ID as PING_ID  # isort: skip
from libp2p.host.ping import PingService  # isort: skip
from libp2p.identity.identify.identify import ID as IDENTIFY_ID  # isort: skip
from libp2p.identity.identify.identify import identify_handler_for  # isort: skip
from libp2p.network.stream.net_stream import NetStream, StreamState  # isort: skip
from multiaddr import Multiaddr  # isort: skip


class Host(BasicHost):
    """The library's host on our network: serves identify and ping, does nothing by itself."""

    def __init__(self, network: Network, addresses: Callable[[], tuple[str, ...]]) -> None:
        self._addresses = addresses
        ping = PingService(self).handle_ping
        super().__init__(
            network, default_protocols=OrderedDict({PING_ID: ping}), disable_identify_address_discovery=True
        )
        network.notifees.clear()  # it would identify every peer, in a task whose failure ends the program
        self._libp2p = {str(IDENTIFY_ID): identify_handler_for(self), str(PING_ID): ping}
        for protocol in self._libp2p:
            network.handlers[protocol] = partial(self._serve, protocol)

    def get_addrs(self) -> list[Multiaddr]:
        """What identify tells."""
        return [Multiaddr(text) for text in self._addresses()]

    def get_transport_addrs(self) -> list[Multiaddr]:
        """As `get_addrs`; our network has no listener objects of the library."""
        return self.get_addrs()

    async def _serve(self, protocol: str, connection: Connection, stream: MuxedStream) -> None:
        net_stream = NetStream(stream, connection, None)
        await net_stream.set_state(StreamState.OPEN)
        net_stream.set_protocol(TProtocol(protocol))
        await self._libp2p[protocol](net_stream)
