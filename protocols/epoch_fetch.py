"""Fetching large objects by pages on `/kaisar/fetch/1`: the asking and the serving side, without IO.

Each page is one request, so a peer that stops in the middle costs one timeout; then the next peer is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire.codec import decode, encode
from protocols.actions import Request
from protocols.epochs import FETCH_PROTOCOL, FetchReply, FetchRequest

BODY, ANCHORED, CERTIFICATE = "body", "anchored", "certificate"
PAGE_BYTES = 1 << 18
OBJECT_BYTES_MAX = 32 << 20
MAX_DOWNLOADS = 4
MAX_PEERS = 4
PAGE_TIMEOUT_S = 10.0


@dataclass
class _Download:
    kind: str
    key: bytes
    peers: list[bytes]
    buffer: bytearray = field(default_factory=bytearray)
    length: int = 0


@dataclass(frozen=True)
class Fetched:
    """A download is over: `data` is the object, or None when no peer had it."""

    kind: str
    key: bytes
    peer: bytes
    data: bytes | None


class Downloads:
    """At most MAX_DOWNLOADS at once, of at most OBJECT_BYTES_MAX each; `prefix` tells their requests from others'."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._counter = 0
        self._running: dict[str, _Download] = {}

    def is_fetching(self, kind: str, key: bytes) -> bool:
        """Whether this object is on its way."""
        return any((download.kind, download.key) == (kind, key) for download in self._running.values())

    def start(self, kind: str, key: bytes, peers: Iterable[bytes]) -> list[Request]:
        """Ask these peers one after the other; nothing when it is already being fetched or too much is."""
        candidates = list(dict.fromkeys(peers))[:MAX_PEERS]
        if not candidates or self.is_fetching(kind, key) or len(self._running) >= MAX_DOWNLOADS:
            return []
        return [self._ask(_Download(kind, key, candidates))]

    def answer(self, request_id: str, payload: bytes) -> tuple[list[Request], Fetched | None]:
        """Take a page: the next request, or the whole object, or the next peer when this one is of no use."""
        download = self._running.pop(request_id, None)
        if download is None:
            return [], None
        if not _take(download, payload):
            return self._next_peer(download)
        if len(download.buffer) < download.length:
            return [self._ask(download)], None
        return [], Fetched(download.kind, download.key, download.peers[0], bytes(download.buffer))

    def ended(self, request_id: str) -> tuple[list[Request], Fetched | None]:
        """The stream is over; that of an answered request no longer matters."""
        download = self._running.pop(request_id, None)
        return ([], None) if download is None else self._next_peer(download)

    def _ask(self, download: _Download) -> Request:
        self._counter += 1
        request_id = f"{self._prefix}/{download.kind}/{download.key.hex()}/{self._counter}"
        self._running[request_id] = download
        request = FetchRequest(download.kind, download.key, len(download.buffer))
        return Request(
            request_id,
            download.peers[0],
            FETCH_PROTOCOL,
            encode(request),
            PAGE_TIMEOUT_S,
            max_reply_bytes=PAGE_BYTES + 64,
        )

    def _next_peer(self, download: _Download) -> tuple[list[Request], Fetched | None]:
        peer, *others = download.peers
        if not others:
            return [], Fetched(download.kind, download.key, peer, None)
        return [self._ask(_Download(download.kind, download.key, others))], None


def _take(download: _Download, payload: bytes) -> bool:
    try:
        page = decode(FetchReply, payload)
    except DecodeError:
        return False
    fits = 0 < page.length <= OBJECT_BYTES_MAX and page.length == (download.length or page.length)
    # Whole pages only: who sends a byte at a time would hold the download for ever.
    if not fits or len(page.data) != min(PAGE_BYTES, page.length - len(download.buffer)):
        return False
    download.length = page.length
    download.buffer += page.data
    return True


def parse_request(payload: bytes) -> FetchRequest | None:
    """The request in a frame, None if it is none."""
    try:
        return decode(FetchRequest, payload)
    except DecodeError:
        return None


def page_of(data: bytes | None, offset: int) -> bytes:
    """The frame that answers a request; "not here" without data."""
    if data is None:
        return encode(FetchReply(0, b""))
    return encode(FetchReply(len(data), data[offset : offset + PAGE_BYTES]))
