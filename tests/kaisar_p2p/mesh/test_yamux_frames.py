from __future__ import annotations

import contextlib
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.mesh.transport.yamux_frames import DATA, PING, WINDOW, FrameParser, ProtocolViolation

_HEADER = struct.Struct("!BBHII")


class Events:
    """What a parser told, bodies of one frame in one piece."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_frame(self, *frame: int) -> None:
        self.told.append(frame)

    def on_body(self, body: memoryview) -> None:
        if isinstance(self.told[-1], bytes):
            self.told[-1] += bytes(body)
        else:
            self.told.append(bytes(body))

    def on_body_end(self) -> None:
        self.told.append("end")


def parsed(data: bytes, cuts: list[int]) -> list[object]:
    events = Events()
    parser = FrameParser(events)
    start = 0
    for cut in [*cuts, len(data)]:
        parser.feed(memoryview(data)[start : start + cut])
        start += cut
    return events.told


_FRAMES = st.lists(
    st.one_of(
        st.tuples(st.just(DATA), st.integers(0, 15), st.integers(0, 2**32 - 1), st.binary(max_size=40)),
        st.tuples(st.sampled_from([WINDOW, PING]), st.integers(0, 15), st.integers(0, 9), st.integers(0, 2**32 - 1)),
    ),
    max_size=8,
)


@given(_FRAMES, st.lists(st.integers(0, 30), max_size=20))
def test_the_same_whatever_the_pieces(frames: list[tuple[int, int, int, bytes | int]], cuts: list[int]) -> None:
    stream, expected = b"", []
    for kind, flags, stream_id, rest in frames:
        length = len(rest) if isinstance(rest, bytes) else rest
        stream += _HEADER.pack(0, kind, flags, stream_id, length)
        expected.append((kind, flags, stream_id, length))
        if isinstance(rest, bytes):
            stream += rest
            expected += [rest, "end"] if rest else ["end"]
    assert parsed(stream, cuts) == expected


@given(st.binary(max_size=200), st.lists(st.integers(0, 30), max_size=10))
def test_any_bytes_raise_nothing_else(data: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(ProtocolViolation):
        parsed(data, cuts)


@pytest.mark.parametrize(("version", "kind"), [(1, DATA), (255, DATA), (0, 4), (0, 255)])
def test_unknown_versions_and_types(version: int, kind: int) -> None:
    with pytest.raises(ProtocolViolation):
        parsed(_HEADER.pack(version, kind, 0, 1, 0), [])


def test_an_announced_length_allocates_nothing() -> None:
    events = Events()
    parser = FrameParser(events)
    tracemalloc.start()
    try:
        parser.feed(memoryview(_HEADER.pack(0, DATA, 0, 1, 2**32 - 1) + b"ab"))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert events.told == [(DATA, 0, 1, 2**32 - 1), b"ab"]
