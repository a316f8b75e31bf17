"""The one place that imports py-libp2p, and keeps what this node never uses of it out of the process.

Two reasons for stand-in modules:

* ``fastecdsa`` is a source package that needs gcc and GMP, used by libp2p only for P-256 keys. It may be absent.
* ``import libp2p`` pulls QUIC, WebSocket, WebTransport, TLS with ACME, bitswap, the DHT, mDNS, Prometheus, … of
  which this node uses nothing: 1.1 s of CPU and 50 MB instead of 0.3 s and 17 MB, in every process of a swarm.

While libp2p is imported, the names below resolve to empty modules whose attributes are classes that refuse to be
used. Afterwards the stand-ins leave ``sys.modules`` again, so anything else that imports, say, ``httpx`` gets the
real one. A package that is already imported is never replaced. Every module of this package imports this one first.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Sequence
from importlib import import_module, util
from typing import Any

ABSENT_OR_UNUSED: dict[str, str] = {
    "fastecdsa": "P-256 keys; a source package that may be absent",
    "coincurve": "secp256k1 keys",
    "Crypto": "RSA keys",
    "OpenSSL": "TLS transport",
    "service_identity": "TLS transport",
    "aioquic": "QUIC transport",
    "trio_websocket": "WebSocket transport",
    "wsproto": "WebSocket transport",
    "zeroconf": "mDNS discovery",
    "ifaddr": "mDNS discovery",
    "miniupnpc": "UPnP port mapping",
    "rpcudp": "the old DHT",
    "grpc": "remote discovery services",
    "prometheus_client": "libp2p's own metrics",
    "psutil": "libp2p's resource manager",
    "dns": "resolving /dnsaddr",
    "requests": "ACME certificates",
    "httpx": "ACME certificates",
    "cbor2": "bitswap",
    "libp2p.bitswap": "block exchange",
    "libp2p.kad_dht": "DHT",
    "libp2p.discovery": "mDNS, UPnP and the library's bootstrap; kaisar_p2p.mesh.discovery replaces them",
    "libp2p.peer.persistent": "peerstores on disk",
    "libp2p.relay": "the library's relays; kaisar_p2p.mesh.reach.relaying replaces them",
    "libp2p.security.secio": "obsolete security transport",
    "libp2p.security.tls": "TLS security transport",
    "libp2p.transport.quic": "QUIC transport",
    "libp2p.transport.webrtc": "WebRTC transport",
    "libp2p.transport.websocket": "WebSocket transport",
    "libp2p.transport.webtransport": "WebTransport transport",
}


class _Unused(type):
    """Classes of a stand-in: fit for annotations, `except` and base classes. Using one raises.

    That matters where a stand-in replaces cryptography: a check that silently did nothing would pass.
    """

    def __call__(cls, *_args: Any, **_options: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__}: this part of libp2p is not used here, see {__name__}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __or__(cls, _other: object) -> Any:
        return cls

    def __ror__(cls, _other: object) -> Any:
        return cls


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        base = Exception if name.endswith(("Error", "Exception", "Timeout")) else object
        unused = _Unused(name, (base,), {"__module__": self.__name__})
        setattr(self, name, unused)
        return unused


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for each of `names` and what is below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(name + ".") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """A stand-in is empty."""


def _top_is_imported(name: str) -> bool:
    return name.split(".")[0] in sys.modules and not name.startswith("libp2p.")


def import_libp2p() -> None:
    """Import py-libp2p once, with stand-ins for what is not used. Does nothing when it is imported already."""
    if "libp2p" in sys.modules:
        return
    finder = _StandInFinder([name for name in ABSENT_OR_UNUSED if not _top_is_imported(name)])
    sys.meta_path.insert(0, finder)
    try:
        for name in (
            "libp2p",
            "libp2p.host.basic_host",
            "libp2p.host.ping",
            "libp2p.identity.identify.identify",
            "libp2p.network.swarm",
            "libp2p.network.connection.swarm_connection",
            "libp2p.pubsub.pb.rpc_pb2",
            "libp2p.security.noise.transport",
            "libp2p.stream_muxer.muxer_multistream",
        ):
            import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)
    if util.find_spec("fastecdsa") is None:
        # ecc.py of libp2p may still be reached by a late import: leave this one in place.
        sys.modules["fastecdsa"] = _StandIn("fastecdsa")
    logger = logging.getLogger("libp2p")  # prints to stderr on its own otherwise; the node logs what matters itself
    logger.addHandler(logging.NullHandler())
    logger.setLevel(logging.CRITICAL)


import_libp2p()
