"""Finding peers on the local network, as libp2p does (https://github.com/libp2p/specs/blob/master/discovery/mdns.md).

A node answers for the service ``_p2p._udp.local`` under a random name, with its addresses as ``dnsaddr=`` in the TXT
record; ours also carries which network the node belongs to, so that others are not dialed. Nothing here is
authenticated: what is found goes into the address book as a hint of the local network, and who answers there has to
prove its key. Multicast is the business of the `zeroconf` package, in threads of its own, imported when it is used.
"""

from __future__ import annotations

import logging
import queue
import secrets
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from kaisar_p2p.mesh.discovery.addresses import Address, parse, with_peer

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

log = logging.getLogger(__name__)

SERVICE = "_p2p._udp.local."
_TXT_STRING_BYTES, _TXT_BYTES = 255, 1200  # one string of a TXT record; a record that fits into one packet
_RESOLVE_MS = 3000
_ADDRESSES = 8

Found = Callable[[bytes, list[str]], object]


def txt_record(strings: Iterable[str]) -> bytes:
    """The data of a TXT record (RFC 6763, 6.1); strings that do not fit are left out."""
    data = b""
    for text in strings:
        raw = text.encode()
        if len(raw) <= _TXT_STRING_BYTES and len(data) + len(raw) < _TXT_BYTES:
            data += bytes([len(raw)]) + raw
    return data


def txt_strings(data: bytes) -> list[str]:
    """The strings of a TXT record, as far as they are whole and text."""
    found: list[str] = []
    while data:
        length, raw, data = data[0], data[1 : 1 + data[0]], data[1 + data[0] :]
        if len(raw) == length and raw.isascii():
            found.append(raw.decode())
    return found


def peer_in(data: bytes, network: str) -> tuple[bytes, list[str]] | None:
    """The peer that a TXT record names and where it is, None when it is of another network or names no one key."""
    strings = txt_strings(data[: 4 * _TXT_BYTES])
    if f"network={network}" not in strings:
        return None
    keys: set[bytes] = set()
    addresses: list[str] = []
    for text in [each.removeprefix("dnsaddr=") for each in strings if each.startswith("dnsaddr=")]:
        try:
            address, key = parse(text)
        except ValueError:
            continue
        if key is not None:
            keys.add(key)
            addresses.append(str(address))
    return (keys.pop(), addresses[:_ADDRESSES]) if len(keys) == 1 else None


class LocalNetwork:
    """Answers and asks on the local network for as long as `run` runs. `found` is called in trio's thread."""

    def __init__(
        self,
        key: bytes,
        network: bytes,
        addresses: Callable[[], tuple[Address, ...]],
        found: Found,
        *,
        most: int,
        interfaces: Sequence[str] | None = None,
    ) -> None:
        self._key, self._network = key, network.hex()[:16]
        self._addresses = addresses
        self._found = found
        self._most = most
        self._interfaces = interfaces
        self._name = secrets.token_hex(20)
        self._commands: queue.SimpleQueue[tuple[Address, ...] | None] = queue.SimpleQueue()
        self._seen: dict[str, bytes] = {}  # names and what they told last; only in the thread of `ServiceBrowser`
        self._token: trio.lowlevel.TrioToken | None = None

    def readdress(self) -> None:
        """Our addresses have changed."""
        self._commands.put(self._addresses())

    async def run(self) -> None:
        """Until cancelled; where there is no multicast, says so once and ends."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            own_thread = trio.CapacityLimiter(1)  # not one of those that everybody shares: it is kept for good
            await trio.to_thread.run_sync(self._work, self._addresses(), abandon_on_cancel=True, limiter=own_thread)
        except Exception as error:  # noqa: BLE001  (the edge: whatever the package meets, the node goes on without it)
            log.warning(
                "peers on the local network are not looked for: %s (no multicast here, or port 5353 is taken; "
                "network.mdns = false switches this off)",
                str(error) or type(error).__name__,
            )
        finally:
            self._commands.put(None)

    # -- in a thread --------------------------------------------------------------------------------------------------

    def _work(self, addresses: tuple[Address, ...]) -> None:
        import zeroconf

        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        interfaces: Any = list(self._interfaces) if self._interfaces else zeroconf.InterfaceChoice.All
        changed = self._answer(zeroconf.Zeroconf(interfaces=interfaces), addresses)
        while changed is not None:  # other addresses: other interfaces to listen on, perhaps none for a while
            try:
                daemon = zeroconf.Zeroconf(interfaces=interfaces)
            except OSError as error:
                log.debug("no multicast at the moment: %s", error)
                changed = self._commands.get()
            else:
                changed = self._answer(daemon, changed)

    def _answer(self, daemon: Zeroconf, addresses: tuple[Address, ...]) -> tuple[Address, ...] | None:
        """Answer and look, until our addresses change: to what; None at the end."""
        import zeroconf

        self._seen.clear()
        try:
            daemon.register_service(self._service(addresses))
            browser = zeroconf.ServiceBrowser(daemon, SERVICE, handlers=[self._on_change])
            changed = self._commands.get()
            browser.cancel()  # `close` leaves its thread behind
            return changed
        finally:
            daemon.close()

    def _service(self, addresses: tuple[Address, ...]) -> ServiceInfo:
        from zeroconf import ServiceInfo

        told = [f"dnsaddr={with_peer(address, self._key)}" for address in addresses[:_ADDRESSES]]
        return ServiceInfo(
            SERVICE,
            f"{self._name}.{SERVICE}",
            port=addresses[0].port if addresses else 0,
            properties=txt_record((f"network={self._network}", *told)),
            server=f"{self._name}.local.",
            addresses=[socket.inet_aton(each.host) for each in addresses[:_ADDRESSES] if each.kind == "ip4"],
        )

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: Any) -> None:
        try:
            self._look_at(zeroconf, service_type, name, state_change)
        except Exception as error:  # noqa: BLE001  (the edge: a name that the package refuses would end its thread)
            log.debug("%r on the local network is left out: %r", name[:80], error)

    def _look_at(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: Any) -> None:
        from zeroconf import ServiceInfo, ServiceStateChange

        if state_change is ServiceStateChange.Removed:
            self._seen.pop(name, None)
        elif not name.startswith(self._name) and (name in self._seen or len(self._seen) < self._most):
            info = ServiceInfo(service_type, name)
            info.request(zeroconf, _RESOLVE_MS)
            self._tell(name, info.text or b"")

    def _tell(self, name: str, data: bytes) -> None:
        known, self._seen[name] = self._seen.get(name), data[: 4 * _TXT_BYTES]
        peer = peer_in(data, self._network) if data != known else None
        if peer is not None and peer[0] != self._key and self._token is not None:
            try:
                self._token.run_sync_soon(self._found, *peer)
            except trio.RunFinishedError:
                self._commands.put(None)
