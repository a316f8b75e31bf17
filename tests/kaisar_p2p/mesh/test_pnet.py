"""Private swarms: the cipher against other implementations of it, key files, and who gets in."""

from __future__ import annotations

import os

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from nacl.bindings import crypto_secretbox

from kaisar_p2p.errors import ConfigError, PeerUnreachable
from kaisar_p2p.mesh import MeshStream
from kaisar_p2p.mesh.transport import pnet
from kaisar_p2p.mesh.transport.pnet import format_key, hsalsa20, parse_key, xsalsa20

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
MAC_BYTES = 16
WITHIN_S = 1.5  # a second, and something for a busy machine


# -- the cipher -------------------------------------------------------------------------------------------------------


def test_hsalsa20_of_the_nacl_paper() -> None:
    """Vectors of "Cryptography in NaCl", section 8."""
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    first = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    second = bytes.fromhex("dc908dda0b9344a953629b733820778880f3ceb421bb61b91cbd4c3e66256ce4")
    assert hsalsa20(shared, bytes(16)) == first
    assert hsalsa20(first, bytes.fromhex("69696ee955b62b73cd62bda875fc73d6")) == second


@pytest.fixture(params=["libsodium", "pycryptodome"], scope="module")
def cipher(request):
    """XSalsa20 by either library; the second is for where the first does not show its Salsa20."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "pycryptodome":
            patch.setattr(pnet, "libsodium_salsa20", lambda: None)
        else:
            assert pnet.libsodium_salsa20() is not None
        yield xsalsa20


@given(key=st.binary(min_size=32, max_size=32), nonce=st.binary(min_size=24, max_size=24), data=st.binary(max_size=300))
def test_the_stream_is_the_one_of_a_secret_box(cipher, key: bytes, nonce: bytes, data: bytes) -> None:
    """A secret box of NaCl encrypts with XSalsa20 from its byte 32 on."""
    assert cipher(key, nonce)(bytes(32) + data)[32:] == crypto_secretbox(data, nonce, key)[MAC_BYTES:]


@given(cuts=st.lists(st.integers(0, 200), max_size=20))
def test_the_stream_does_not_depend_on_how_it_is_cut(cipher, cuts: list[int]) -> None:
    data = bytes(range(256)) * 16
    encrypt, whole, parts, offset = cipher(KEY, bytes(24)), cipher(KEY, bytes(24))(data), b"", 0
    for cut in [*cuts, len(data)]:
        parts += encrypt(data[offset : offset + cut])
        offset += cut
    assert parts == whole


# -- key files --------------------------------------------------------------------------------------------------------


def test_a_key_file_is_read_back() -> None:
    assert parse_key(format_key(KEY)) == KEY
    assert format_key(KEY) == f"/key/swarm/psk/1.0.0/\n/base16/\n{KEY.hex()}\n"


@pytest.mark.parametrize("change", [str.strip, str.upper, lambda text: text.replace("\n", "\r\n")])
def test_a_key_file_may_be_written_differently(change) -> None:
    head, _, digits = format_key(KEY).partition("/base16/\n")
    assert parse_key(change(format_key(KEY)) if change is not str.upper else f"{head}/base16/\n{digits.upper()}") == KEY


@pytest.mark.parametrize(
    "text", ["", KEY.hex(), format_key(KEY)[:-2], format_key(KEY) + "00", "/key/swarm/psk/1.0.0/\n"]
)
def test_what_is_no_key_file_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_key(text)
    assert "64 hexadecimal digits" in caught.value.hint
    assert KEY.hex()[:8] not in str(caught.value)


def test_only_keys_of_32_bytes_are_written() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        format_key(KEY[1:])


# -- who gets in ------------------------------------------------------------------------------------------------------


async def test_members_reach_each_other(lab) -> None:
    first, second = await lab.mesh(key=KEY), await lab.mesh(key=KEY)

    async def echo(stream: MeshStream) -> None:
        while data := await stream.receive_some():
            await stream.send_some(data)

    first.serve("/echo", echo, max_frame_bytes=100)
    second.add_addresses(first.key, first.addrs)
    data = os.urandom(1_000_000)
    with trio.fail_after(20):
        stream = await second.open_stream(first.key, "/echo", timeout_s=5, max_frame_bytes=100)
        async with stream, trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_some, data)
            received = b""
            while len(received) < len(data):
                received += await stream.receive_some()
    assert received == data


@pytest.mark.parametrize(
    ("dialer_key", "listener_key", "says"),
    [
        (OTHER_KEY, KEY, "has another pre-shared key"),
        (None, KEY, "its network has a pre-shared key and ours has none"),
        (KEY, None, "had no pre-shared key"),
    ],
    ids=["another", "only the listener", "only the dialer"],
)
async def test_others_fail_at_once_and_hear_why(lab, dialer_key, listener_key, says: str) -> None:
    listener, dialer = await lab.mesh(key=listener_key), await lab.mesh(key=dialer_key)
    dialer.add_addresses(listener.key, listener.addrs)
    with trio.fail_after(WITHIN_S), pytest.raises(PeerUnreachable, match=says):
        await dialer.open_stream(listener.key, "/echo", timeout_s=10, max_frame_bytes=100)
    with trio.fail_after(WITHIN_S):
        while not listener.statistics().refused:  # noqa: ASYNC110  (a counter tells nobody)
            await trio.sleep(0.01)
    if listener_key is not None:
        assert listener.statistics().refused.keys() == {"pre-shared key"}
    assert not listener.peers()


async def test_a_silent_listener_is_given_up_within_a_second(lab) -> None:
    dialer = await lab.mesh(key=KEY)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    stranger = await lab.mesh()  # only its key is used
    port = listener.socket.getsockname()[1]
    async with listener:
        dialer.add_addresses(stranger.key, [f"/ip4/127.0.0.1/tcp/{port}"])
        with trio.fail_after(WITHIN_S), pytest.raises(PeerUnreachable, match="had no pre-shared key"):
            await dialer.open_stream(stranger.key, "/echo", timeout_s=10, max_frame_bytes=100)


async def test_wrong_keys_cost_no_reputation(lab) -> None:
    """Whoever configured the wrong key and then the right one gets in at once."""
    listener = await lab.mesh(key=KEY)
    wrong = await lab.mesh(key=OTHER_KEY)
    wrong.add_addresses(listener.key, listener.addrs)
    for _ in range(5):
        with trio.fail_after(10), pytest.raises(PeerUnreachable):
            await wrong._network.dial(listener.key, wrong._book.of(listener.key))
    right = await lab.mesh(key=KEY)
    right.keep_connected(listener.key, listener.addrs)
    with trio.fail_after(5):
        await right.wait_connected()
