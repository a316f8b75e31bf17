"""Hash-linked blocks: how a block gets its hash, and how a follower checks one.

hash = SHA-256(domain "kaisar/block" ‖ network id ‖ canonical `Header`). The header's root is the RFC 9162 root of the
signed calls; in block 0 it is the hash of the genesis document, which is also the network id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kaisar_p2p.errors import DecodeError, LedgerCorrupt, SignatureError
from kaisar_p2p.ledger.calls import open_call, read_call
from kaisar_p2p.ledger.interface import Block, Call
from kaisar_p2p.wire import merkle
from kaisar_p2p.wire.codec import U64, Bytes32, encode, message
from kaisar_p2p.wire.crypto import domain_hash, sha256

BLOCK_DOMAIN = "kaisar/block"
NO_PARENT = bytes(32)
_RESTORE = "the ledger file was damaged or tampered with: restore it from a copy, or follow another ledger"


@message(122)
@dataclass(frozen=True)
class Header:
    """What a block's hash covers; `time_ms` is Unix time."""

    number: U64
    parent: Bytes32
    time_ms: U64
    root: Bytes32


@dataclass(frozen=True)
class RawBlock:
    """A block as it is stored: nothing in it has been checked."""

    number: int
    hash: bytes
    parent: bytes
    time_ms: int
    signed_calls: tuple[bytes, ...]


def header_hash(network: bytes, number: int, parent: bytes, time_ms: int, root: bytes) -> bytes:
    """The 32-byte hash of a block."""
    return domain_hash(BLOCK_DOMAIN, network, encode(Header(number, parent, time_ms, root)))


def calls_root(signed_calls: Sequence[bytes]) -> bytes:
    """The 32-byte root of a block's calls, in order."""
    return merkle.root(signed_calls)


def corrupt(number: int, reason: str) -> LedgerCorrupt:
    """The error that names the block."""
    return LedgerCorrupt(f"ledger block {number}: {reason}", hint=_RESTORE)


def check_block(
    raw: RawBlock, parent: RawBlock | Block | None, network: bytes, *, verify_signatures: bool = True
) -> Block:
    """The block, once its number, link, time, hash and signatures hold; `parent` is None for block 0 only.

    Raises:
        LedgerCorrupt: one of them does not; names the block.
    """
    if parent is None:
        _check_first(raw)
    elif raw.number != parent.number + 1:
        raise corrupt(parent.number + 1, f"missing, block {raw.number} comes next")
    elif raw.parent != parent.hash:
        raise corrupt(raw.number, "does not link to its parent")
    elif raw.time_ms <= parent.time_ms:
        raise corrupt(raw.number, "is not later than its parent")
    if raw.hash != _expected_hash(raw, network):
        raise corrupt(raw.number, "its hash does not match its content")
    calls = (_check_call(raw.number, i, call, network, verify_signatures) for i, call in enumerate(raw.signed_calls))
    return Block(raw.number, raw.hash, raw.parent, raw.time_ms, tuple(calls))


def _expected_hash(raw: RawBlock, network: bytes) -> bytes:
    root = network if raw.number == 0 else calls_root(raw.signed_calls)
    try:
        return header_hash(network, raw.number, raw.parent, raw.time_ms, root)
    except ValueError:  # a damaged row may hold anything
        return b""


def _check_first(raw: RawBlock) -> None:
    if raw.number != 0 or raw.parent != NO_PARENT or raw.signed_calls:
        raise corrupt(raw.number, "is not a genesis block")


def _check_call(number: int, position: int, signed: bytes, network: bytes, verify_signatures: bool) -> Call:
    try:
        body = (open_call(signed, network) if verify_signatures else read_call(signed)).body
    except (DecodeError, SignatureError) as error:
        raise corrupt(number, f"call {position}: {error.message}") from error
    return Call(body.account, body.payload, (position,), sha256(signed))
