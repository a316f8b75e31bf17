"""Addresses of peers: which are acceptable, which are known, which are ours. The input comes from other peers."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.mesh.ids import id_of, key_of

from libp2p.peer.id import ID  # isort: skip

log = logging.getLogger(__name__)

_MAX_TEXT = 160
_CIRCUIT = "/p2p-circuit"
_last_seen: dict[Address, list[Address]] = {}  # of the interfaces, by what is bound
_HOST_PROTOCOLS = ("ip4", "ip6", "dns4", "dns6", "dns")


@dataclass(frozen=True)
class Address:
    """A TCP address, ``/ip4/<host>/tcp/<port>`` as a multiaddr."""

    kind: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"/{self.kind}/{self.host}/tcp/{self.port}"

    @property
    def is_private(self) -> bool:
        """Loopback, link-local or of a private network; a name is taken as public."""
        if not self.kind.startswith("ip"):
            return False
        return not ipaddress.ip_address(self.host).is_global

    @property
    def is_loopback(self) -> bool:
        """Of this machine only."""
        return self.kind.startswith("ip") and ipaddress.ip_address(self.host).is_loopback

    @property
    def is_wildcard(self) -> bool:
        """All interfaces: to listen on, not to dial."""
        return self.kind.startswith("ip") and ipaddress.ip_address(self.host).is_unspecified

    @property
    def is_dialable(self) -> bool:
        """It names a host and a port."""
        return self.port != 0 and not self.is_wildcard


@dataclass(frozen=True)
class CircuitAddress:
    """A peer behind a relay, ``<address of the relay>/p2p/<relay id>/p2p-circuit`` as a multiaddr.

    Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md.
    """

    relay: bytes  # machine key
    through: Address  # where the relay is dialed

    def __str__(self) -> str:
        return f"{self.through}/p2p/{id_of(self.relay)}{_CIRCUIT}"

    @property
    def is_private(self) -> bool:
        """The relay is on loopback or a private network."""
        return self.through.is_private

    @property
    def is_wildcard(self) -> bool:
        """The relay's address is not one to dial."""
        return self.through.is_wildcard

    @property
    def is_dialable(self) -> bool:
        """The relay's address names a host and a port."""
        return self.through.is_dialable


AnyAddress = Address | CircuitAddress


def parse_any(text: str) -> tuple[AnyAddress, bytes | None]:
    """`parse`, which also takes ``<relay>/p2p/<relay id>/p2p-circuit[/p2p/<ed25519 peer id>]``. Raises ValueError."""
    before, circuit, after = text.partition(_CIRCUIT)
    if not circuit:
        return parse(text)
    through, relay = parse(before)
    if relay is None or (after and not after.startswith("/p2p/")):
        raise ValueError(f"not an address behind a relay: {text!r:.80}")
    return CircuitAddress(relay, through), _key_in(["", "", "", "", "", *after.split("/")[1:]])


def parse(text: str) -> tuple[Address, bytes | None]:
    """An address and, when the multiaddr ends in ``/p2p/<id>``, the machine key in it.

    Raises ValueError for anything but ``/(ip4|ip6|dns4|dns6|dns)/<host>/tcp/<port>[/p2p/<ed25519 peer id>]``.
    """
    parts = text.split("/") if len(text) <= _MAX_TEXT else []
    if len(parts) not in (5, 7) or parts[0] or parts[1] not in _HOST_PROTOCOLS or parts[3] != "tcp":
        raise ValueError(f"not a TCP multiaddr: {text!r:.80}")
    kind, host = parts[1], parts[2]
    port = int(parts[4]) if parts[4].isascii() and parts[4].isdigit() else -1
    if not 0 <= port <= 65535:
        raise ValueError(f"no port: {text!r:.80}")
    if kind == "ip4":
        ipaddress.IPv4Address(host)
    elif kind == "ip6":
        if ipaddress.IPv6Address(host).ipv4_mapped is not None:  # would pass for what it is not
            raise ValueError(f"IPv4 inside IPv6: {text!r:.80}")
        _check_name(host.partition("%")[2] or "-", text)
    else:
        _check_name(host, text)
    return Address(kind, host, port), _key_in(parts)


def _check_name(name: str, text: str) -> None:
    if not name or not all(c.isascii() and (c.isalnum() or c in "-._") for c in name):
        raise ValueError(f"not a host name: {text!r:.80}")


def _key_in(parts: list[str]) -> bytes | None:
    if len(parts) == 5:
        return None
    if len(parts) != 7 or parts[5] != "p2p" or len(parts[6]) > _MAX_TEXT:
        raise ValueError("only /p2p and a peer id may follow")
    key = key_of(ID.from_base58(parts[6]).to_bytes())
    if key is None:
        raise ValueError("the peer id is not that of an ed25519 key")
    return key


def peer_of(multiaddr: str) -> tuple[bytes, str]:
    """Machine key and address that a user wrote: ``/ip4/…/tcp/…/p2p/<id>``, or behind a relay; raises ConfigError."""
    try:
        address, key = parse_any(multiaddr)
    except ValueError as error:
        raise ConfigError(
            f"{multiaddr!r} is not a peer's address: {error}", hint="/ip4/<address>/tcp/<port>/p2p/<id>"
        ) from None
    if key is None:
        raise ConfigError(f"{multiaddr!r} does not name the peer", hint="append /p2p/<peer id>")
    return key, str(address)


def with_peer(address: AnyAddress, key: bytes) -> str:
    """The multiaddr of a peer at an address."""
    return f"{address}/p2p/{id_of(key)}"


def is_loopback(address: AnyAddress) -> bool:
    """Only this machine itself is behind it."""
    direct = address.through if isinstance(address, CircuitAddress) else address
    return direct.kind.startswith("ip") and ipaddress.ip_address(direct.host).is_loopback


def local_addresses(bound: Iterable[Address]) -> tuple[Address, ...]:
    """What others can dial when these are bound: a wildcard becomes the addresses of the interfaces."""
    found: list[Address] = []
    for address in bound:
        found += _of_interfaces(address) if address.is_wildcard else [address]
    return tuple(dict.fromkeys(found))


def _of_interfaces(wildcard: Address) -> list[Address]:
    family = socket.AF_INET if wildcard.kind == "ip4" else socket.AF_INET6
    try:
        interfaces = psutil.net_if_addrs()
    except OSError as error:  # no file descriptor is left, say: then nothing new is known
        log.debug("the interfaces cannot be read: %s", error)
        return _last_seen.get(wildcard, [])
    hosts = [
        entry.address.split("%")[0] for entries in interfaces.values() for entry in entries if entry.family == family
    ]
    usable = [h for h in hosts if not ipaddress.ip_address(h).is_link_local]
    outward = [h for h in usable if not ipaddress.ip_address(h).is_loopback]
    _last_seen[wildcard] = [Address(wildcard.kind, host, wildcard.port) for host in outward or usable]
    return _last_seen[wildcard]
