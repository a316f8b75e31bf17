from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import RequestFailed
from kaisar_p2p.mesh.transport.negotiation import BrokenNegotiation, confirm, parse_line, proposal, respond

_HEADER = b"\x13/multistream/1.0.0\n"


class Wire:
    """Gives prepared pieces, notes what is written and how much had been read by then."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.written: list[bytes] = []
        self.left_when_written: list[int] = []

    async def read(self, n: int | None = None) -> bytes:
        if not self.pieces:
            return b""
        piece = self.pieces.pop(0)
        if n is not None and len(piece) > n:
            self.pieces.insert(0, piece[n:])
            piece = piece[:n]
        return piece

    async def write(self, data: bytes) -> None:
        self.written.append(data)
        self.left_when_written.append(len(self.pieces))

    def unread(self, data: bytes) -> None:
        self.pieces.insert(0, data)


def speaks(protocol: str) -> bool:
    return protocol in ("/echo", "/x" * 100)


def answered(*pieces: bytes) -> tuple[str, Wire]:
    wire = Wire(*pieces)
    return trio.run(respond, wire, speaks), wire


def test_header_and_proposal_together_get_one_answer() -> None:
    protocol, wire = answered(proposal("/echo") + b"and the request")
    assert protocol == "/echo"
    assert wire.written == [proposal("/echo")]
    assert wire.pieces == [b"and the request"]


def test_a_peer_that_waits_for_our_header_gets_it() -> None:
    protocol, wire = answered(_HEADER, b"\x06/echo\n")
    assert protocol == "/echo"
    assert wire.written == [_HEADER, b"\x06/echo\n"]
    assert wire.left_when_written[0] == 1  # before its proposal was read


def test_the_second_proposal_is_taken() -> None:
    protocol, wire = answered(_HEADER + b"\x06/none\n\x06/echo\n")
    assert protocol == "/echo"
    assert b"".join(wire.written) == _HEADER + b"\x03na\n\x06/echo\n"


def test_a_long_name_has_a_length_of_two_bytes() -> None:
    assert answered(proposal("/x" * 100))[0] == "/x" * 100


@given(st.lists(st.integers(1, 7), max_size=20))
def test_in_any_pieces(cuts: list[int]) -> None:
    data, pieces = proposal("/echo") + b"rest", []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    protocol, wire = answered(*[piece for piece in [*pieces, data] if piece])
    assert protocol == "/echo"
    assert b"".join(wire.pieces) == b"rest"


@pytest.mark.parametrize("data", [b"\x00", b"\xff\x7f", b"\x02ab", b"\x03\xff\xfe\n", b"\x06hello\n"])
def test_what_is_not_multistream_select(data: bytes) -> None:
    with pytest.raises(BrokenNegotiation):
        answered(data)


def test_proposals_without_end() -> None:
    with pytest.raises(RequestFailed):
        answered(_HEADER + b"\x06/none\n" * 1000)


@given(st.binary(max_size=60))
def test_any_line(data: bytes) -> None:
    try:
        found = parse_line(data)
    except BrokenNegotiation:
        return
    assert found is None or (0 < found[1] <= len(data) and found[0].isascii())


async def test_confirmation_gives_back_what_follows() -> None:
    wire = Wire(proposal("/echo") + b"reply")
    await confirm(wire, "/echo")
    assert wire.pieces == [b"reply"]


@pytest.mark.parametrize("answer", [_HEADER + b"\x03na\n", _HEADER, b"", b"\x03na\n"])
async def test_a_refusal(answer: bytes) -> None:
    with pytest.raises(RequestFailed):
        await confirm(Wire(answer), "/echo")
