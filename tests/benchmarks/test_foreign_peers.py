"""What drives foreign peers, without the foreign peers: their messages, and what is said when they cannot be had."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers import install, protobuf
from benchmarks.peers.interface import PERIOD, content, digest_of

FIELDS = st.lists(
    st.tuples(st.integers(1, 500), st.one_of(st.integers(0, 2**63), st.binary(max_size=200))), max_size=10
)


@given(FIELDS)
def test_messages_are_read_back(fields) -> None:
    expected: dict[int, list[int | bytes]] = {}
    for number, value in fields:
        expected.setdefault(number, []).append(value)
    assert protobuf.decode(protobuf.encode(*fields)) == expected


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(0, 400))
def test_messages_are_split_wherever_the_stream_is_cut(messages: list[bytes], cut: int) -> None:
    data = b"".join(protobuf.varint(len(message)) + message for message in messages)
    first, rest = protobuf.split(data[:cut])
    second, rest = protobuf.split(rest + data[cut:])
    assert (first + second, rest) == (messages, b"")


def test_an_undelimited_message_has_exactly_its_length() -> None:
    assert protobuf.undelimited(b"\x03abc") == b"abc"
    for wrong in (b"\x03ab", b"\x03abcd"):
        with pytest.raises(ValueError, match="3 bytes"):
            protobuf.undelimited(wrong)


@given(size=st.integers(0, 5000), chunk=st.integers(1, 2000))
def test_content_does_not_depend_on_the_chunks(size: int, chunk: int) -> None:
    data = b"".join(content(size, chunk))
    assert data == bytes(i % PERIOD for i in range(size))
    assert digest_of(size) == hashlib.sha256(data).hexdigest()


def test_without_npm_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "PLACE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(install.Unavailable, match=r"needs npm.*install Node\.js"):
        install.js()


def test_a_failing_installation_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no such registry' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr(install, "PLACE", tmp_path / "place")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(install.Unavailable, match=r"npm failed(.|\n)*no such registry"):
        install.js()
    assert not (tmp_path / "place" / "js" / ".stamp").exists()
