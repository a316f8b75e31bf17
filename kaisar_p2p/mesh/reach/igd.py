"""A router's port forwarding, asked for by UPnP: finding the router (SSDP) and its three calls (SOAP).

Own code instead of a library's, because the libraries block in C and read without a bound. The router, and whoever
in the local network claims to be one, is not trusted: sizes and times are bounded, and a device must describe itself
at the very address that it answered from.

Sources: UPnP Device Architecture 1.1 (SSDP, SOAP), WANIPConnection:2 (the calls and their error codes),
https://openconnectivity.org/developer/specifications/upnp-resources/upnp/.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit
from xml.sax.saxutils import escape, unescape

import trio

from kaisar_p2p.errors import MeshError

SSDP = ("239.255.255.250", 1900)
_SERVICES = ("WANIPConnection:2", "WANIPConnection:1", "WANPPPConnection:1")
_SEARCHED = (
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
)
_MOST_ANSWERS = 16
_DATAGRAM_BYTES = 2048
_DOCUMENT_BYTES = 256 * 1024
_HEAD_BYTES = 16 * 1024
_CALL_S = 5.0

TAKEN, ONLY_PERMANENT = 718, 725
"""Error codes of AddPortMapping: ConflictInMappingEntry, OnlyPermanentLeasesSupported."""


class RouterRefused(MeshError):
    """The router does not do it, or does not answer; `code` is UPnP's error code, 0 for none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Gateway:
    """A router that forwards ports: where its connection service is called, and our own address as it sees us."""

    control_url: str
    service: str
    local_host: str

    async def external_host(self) -> str:
        """The router's IPv4 address outside."""
        answer = await self._call("GetExternalIPAddress")
        host = _value(answer, "NewExternalIPAddress")
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise RouterRefused(f"the router has no address outside: {host!r:.40}") from None

    async def map(self, external_port: int, port: int, lease_s: int, label: str) -> None:
        """Forward the router's `external_port` to our `port`; the same again renews it. 0 seconds: for ever."""
        await self._call(
            "AddPortMapping",
            NewRemoteHost="",
            NewExternalPort=external_port,
            NewProtocol="TCP",
            NewInternalPort=port,
            NewInternalClient=self.local_host,
            NewEnabled=1,
            NewPortMappingDescription=label,
            NewLeaseDuration=lease_s,
        )

    async def unmap(self, external_port: int) -> None:
        """Forward it no longer."""
        await self._call("DeletePortMapping", NewRemoteHost="", NewExternalPort=external_port, NewProtocol="TCP")

    async def _call(self, action: str, **arguments: object) -> str:
        fields = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in arguments.items())
        body = (
            '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"'
            ' s:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
            f'<u:{action} xmlns:u="{self.service}">{fields}</u:{action}></s:Body></s:Envelope>'
        )
        headers = {"SOAPAction": f'"{self.service}#{action}"', "Content-Type": 'text/xml; charset="utf-8"'}
        status, answer = await _http("POST", self.control_url, headers, body)
        if status != 200:
            code = _value(answer, "errorCode")
            raise RouterRefused(
                f"the router refuses {action}: {_value(answer, 'errorDescription') or status!r:.80}",
                int(code) if code.isascii() and code.isdigit() and len(code) < 6 else 0,
            )
        return answer


async def find_gateway(local_host: str, *, wait_s: float = 3.0, target: tuple[str, int] = SSDP) -> Gateway:
    """The first router in the network of one of our IPv4 addresses that forwards ports; RouterRefused for none."""
    with trio.move_on_after(wait_s):
        async with aclosing(_answers(local_host, target)) as locations:
            async for location in locations:
                try:
                    return await _described(location)
                except (RouterRefused, OSError):
                    continue
    raise RouterRefused("no router in this network answers to UPnP")


async def _answers(local_host: str, target: tuple[str, int]) -> AsyncGenerator[str, None]:
    """Locations that devices name; each at the address that it answers from."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp:
        await udp.bind((local_host, 0))
        udp.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_MULTICAST_IF, ipaddress.IPv4Address(local_host).packed)
        for kind in _SEARCHED:
            search = (
                f"M-SEARCH * HTTP/1.1\r\nHOST: {SSDP[0]}:{SSDP[1]}\r\n"
                f'MAN: "ssdp:discover"\r\nMX: 2\r\nST: {kind}\r\n\r\n'
            )
            await udp.sendto(search.encode(), target)
        seen: set[str] = set()
        while len(seen) < _MOST_ANSWERS:
            answer, (host, *_) = await udp.recvfrom(_DATAGRAM_BYTES)
            found = re.search(rb"(?im)^location:[ \t]*(http://[\x21-\x7e]{1,512})[ \t]*\r?$", answer)
            location = found[1].decode("ascii") if found else ""
            if (
                location
                and location not in seen
                and _host_of(location) == host
                and ipaddress.ip_address(host).is_private
            ):
                seen.add(location)
                yield location


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def _described(location: str) -> Gateway:
    """Read a device's description, and find the service in it."""
    status, text = await _http("GET", location, {}, "")
    if status != 200:
        raise RouterRefused(f"the router's description is missing: {status}")
    services = [part.partition("</service>")[0] for part in text.split("<service>", 64)[1:]]
    for wanted in _SERVICES:
        for service in services:
            kind, control = _value(service, "serviceType"), _value(service, "controlURL")
            if kind.endswith(wanted) and kind.startswith("urn:") and control:
                return Gateway(_checked(location, control), kind, await _our_host(location))
    raise RouterRefused("the router does not forward ports by UPnP")


def _checked(location: str, control: str) -> str:
    try:
        url = urljoin(location, control)
        same = urlsplit(url).hostname == urlsplit(location).hostname and urlsplit(url).scheme == "http"
    except ValueError:
        same = False
    if not same:
        raise RouterRefused("the router names a control address elsewhere")
    return url


async def _our_host(location: str) -> str:
    """Our address on the way to the router."""
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp:
        await udp.connect((_host_of(location) or "", 9))  # sends nothing
        return str(udp.getsockname()[0])


def _value(text: str, name: str) -> str:
    """The text of the first such element; no XML parser, so nothing to expand."""
    found = re.search(rf"<(?:[A-Za-z0-9_]+:)?{name}(?:\s[^<>]*)?>([^<>]{{0,512}})</", text)
    return unescape(found[1]).strip() if found else ""


async def _http(method: str, url: str, headers: dict[str, str], body: str) -> tuple[int, str]:
    """Status and text of one HTTP exchange, bounded in size and time; RouterRefused."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        with trio.fail_after(_CALL_S):
            async with await trio.open_tcp_stream(host, port) as stream:
                await stream.send_all(_request(method, parts.netloc, parts.path or "/", parts.query, headers, body))
                answer = await _read_answer(stream)
    except (OSError, ValueError, trio.BrokenResourceError, trio.TooSlowError) as error:
        raise RouterRefused(f"the router does not answer: {type(error).__name__} {error}") from None
    found = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
    if found is None:
        raise RouterRefused("the router does not answer in HTTP")
    return int(found[1]), answer.partition(b"\r\n\r\n")[2].decode("utf-8", "replace")


def _request(method: str, netloc: str, path: str, query: str, headers: dict[str, str], body: str) -> bytes:
    """HTTP/1.0 in substance: no chunks come back, and the connection closes."""
    data = body.encode()
    lines = [f"{method} {path}{'?' + query if query else ''} HTTP/1.0", f"Host: {netloc}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(data)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode() + data


async def _read_answer(stream: trio.SocketStream) -> bytes:
    """Until the end of the announced body, or of the connection: some routers keep it open."""
    answer, end = bytearray(), 0
    while len(answer) < (end or _DOCUMENT_BYTES):
        part = await stream.receive_some(65536)
        if not part:
            break
        answer += part
        if not end:
            end = _end_of(answer)
    return bytes(answer)


def _end_of(answer: bytearray) -> int:
    """Length of the whole answer, 0 when it is not known (yet)."""
    gap = answer.find(b"\r\n\r\n", 0, _HEAD_BYTES)
    length = re.search(rb"(?im)^content-length:[ \t]*(\d{1,9})[ \t]*\r?$", answer[:gap]) if gap >= 0 else None
    return min(gap + 4 + int(length[1]), _DOCUMENT_BYTES) if length else 0
