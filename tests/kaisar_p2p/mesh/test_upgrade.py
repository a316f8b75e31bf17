"""From a raw connection to a muxer, over memory streams that count what is written."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.transport.exceptions import SecurityUpgradeFailure
from nacl.signing import SigningKey

from kaisar_p2p.mesh.ids import id_of, key_pair_of
from kaisar_p2p.mesh.limits import MeshLimits
from kaisar_p2p.mesh.transport.negotiation import proposal
from kaisar_p2p.mesh.transport.noise import BufferedRaw
from kaisar_p2p.mesh.transport.noise_handshake import Identity
from kaisar_p2p.mesh.transport.upgrade import Upgrader
from kaisar_p2p.mesh.transport.yamux import Muxer


class Raw:
    """A connection before it is encrypted."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.written: list[int] = []

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self.stream.receive_some(n))

    async def write(self, data: bytes) -> None:
        self.written.append(len(data))
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError:
            raise ConnectionClosedError("broken") from None

    async def close(self) -> None:
        await self.stream.aclose()

    def get_remote_address(self) -> tuple[str, int]:
        return "192.0.2.1", 1


class Side:
    def __init__(self, stream: trio.abc.Stream) -> None:
        seed = os.urandom(32)
        self.key = bytes(SigningKey(seed).verify_key)
        self.raw = Raw(stream)
        self.instead: list[bytes] = []
        self.upgrader = Upgrader(key_pair_of(seed), MeshLimits(), {"/instead": self._instead})
        self.muxer: Muxer | None = None
        self.is_old = False

    async def _instead(self, raw: BufferedRaw) -> None:
        self.instead.append(await raw.read(3))
        await raw.write(b"taken")

    async def upgrade(self, peer: bytes | None) -> None:
        session = await self.upgrader.upgrade_security(self.raw, peer is not None, id_of(peer) if peer else None)
        if self.is_old:
            session.remote_muxers = ()  # it does not look
        muxer = await self.upgrader.upgrade_connection(session, session.get_remote_peer())
        assert isinstance(muxer, Muxer)
        self.muxer = muxer

    def speaks_no_early_muxer(self) -> None:
        self.is_old = True
        noise = self.upgrader._noise
        noise._identity = Identity(noise._identity.static, without_extensions(noise._identity.payload))


def without_extensions(payload: bytes) -> bytes:
    from libp2p.security.noise.pb import noise_pb2

    message = noise_pb2.NoiseHandshakePayload.FromString(payload)
    message.ClearField("extensions")
    return message.SerializeToString()


@pytest.fixture
def sides() -> tuple[Side, Side]:
    left, right = trio.testing.memory_stream_pair()
    return Side(left), Side(right)


async def both(dialer: Side, listener: Side) -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialer.upgrade, listener.key)
            nursery.start_soon(listener.upgrade, None)


async def test_two_of_us_need_three_messages(sides: tuple[Side, Side]) -> None:
    dialer, listener = sides
    await both(dialer, listener)
    assert (len(dialer.raw.written), len(listener.raw.written)) == (2, 1)
    assert dialer.muxer is not None and dialer.muxer.is_initiator
    assert listener.muxer is not None and not listener.muxer.is_initiator
    assert listener.muxer.peer_id == id_of(dialer.key)


@pytest.mark.parametrize("old", [0, 1])
async def test_the_muxer_is_agreed_on_later_with_a_peer_that_cannot_earlier(sides: tuple[Side, Side], old: int) -> None:
    sides[old].speaks_no_early_muxer()
    await both(*sides)
    assert all(side.muxer is not None for side in sides)
    assert len(sides[0].raw.written) == 3


async def test_streams_begin_with_the_last_message(sides: tuple[Side, Side]) -> None:
    """What the dialer sends right behind the handshake is not lost."""
    dialer, listener = sides
    await both(dialer, listener)
    assert dialer.muxer is not None and listener.muxer is not None
    async with trio.open_nursery() as nursery:
        for side in sides:
            nursery.start_soon(side.muxer.start)
        await trio.testing.wait_all_tasks_blocked()
        stream = dialer.muxer.open_stream_nowait()
        await stream.write(b"first")
        with trio.fail_after(5):
            assert await (await listener.muxer.accept_stream()).read() == b"first"
        nursery.cancel_scope.cancel()


async def test_somebody_else_answers(sides: tuple[Side, Side]) -> None:
    dialer, listener = sides
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failing, listener.upgrade, None)
            with pytest.raises(SecurityUpgradeFailure, match="another peer"):
                await dialer.upgrade(os.urandom(32))
            await dialer.raw.close()


async def failing(function, *arguments: object) -> None:
    with pytest.raises(SecurityUpgradeFailure):
        await function(*arguments)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 40,
        proposal("/noise"),
        proposal("/noise") + b"\xff\xff" + bytes(70_000),
        proposal("/noise") + b"\x00\x20" + bytes(32),
        proposal("/plaintext/2.0.0") * 8,
    ],
)
async def test_garbage_fails_in_one_way(sides: tuple[Side, Side], data: bytes) -> None:
    dialer, listener = sides
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failing, listener.upgrade, None)
            await dialer.raw.write(data)
            await dialer.raw.close()


async def test_another_protocol_instead_of_a_handshake(sides: tuple[Side, Side]) -> None:
    dialer, listener = sides
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failing, listener.upgrade, None)
            await dialer.raw.write(proposal("/instead") + b"abc")
            expected, got = proposal("/instead") + b"taken", b""
            while len(got) < len(expected):
                got += await dialer.raw.read(100)
    assert got == expected
    assert listener.instead == [b"abc"]
