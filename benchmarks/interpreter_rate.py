"""Blocks of transfers through the ledger's rules, without signature checks; one core."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from statistics import median

from benchmarks import Figure
from protocols.genesis import Allocation, Genesis, genesis_state, write_genesis
from protocols.interpreter.apply import apply
from protocols.interpreter.audit import conservation, state_root
from protocols.interpreter.calls import Transfer, parse_payload, payload_of
from protocols.interpreter.state import State
from protocols.params import KAI

_ACCOUNTS = [sha256(b"%d" % index).digest() for index in range(1_000)]
_CALLS = 1_000
_BLOCKS = 20


@dataclass(frozen=True)
class _Call:
    signer: bytes
    payload: bytes
    call_hash: bytes


@dataclass(frozen=True)
class _Block:
    number: int
    hash: bytes
    parent: bytes
    time_ms: int
    calls: tuple[_Call, ...]


def figures() -> list[Figure]:
    """Applying, decoding alone for comparison, and the state's fingerprint."""
    blocks = _blocks()
    state, rates = _apply_rates(blocks)
    if conservation(state):
        raise AssertionError("money is not conserved")
    decoding = [_CALLS / _seconds(lambda block=block: _decode(block)) for block in blocks]  # type: ignore[misc]
    root_ms = 1000 * median(_seconds(lambda: state_root(state)) for _ in range(_BLOCKS))
    return [
        Figure(
            figure=f"transfers applied, blocks of {_CALLS}",
            value=median(rates),
            unit="calls/s",
            peer="decoding the same calls",
            ratio=median(rates) / median(decoding),
            target="≥ 20,000",
            ok=median(rates) >= 20_000,
        ),
        Figure(
            figure=f"state root of {len(_ACCOUNTS)} accounts",
            value=root_ms,
            unit="ms",
            target="≤ 50",
            ok=root_ms <= 50,
        ),
    ]


def _blocks() -> list[_Block]:
    parent, blocks = bytes(32), []
    for number in range(_BLOCKS):
        calls = tuple(_transfer(index, (index * 7 + number + 1) % len(_ACCOUNTS)) for index in range(_CALLS))
        block = _Block(number, sha256(b"block %d" % number).digest(), parent, 500 * number, calls)
        blocks.append(block)
        parent = block.hash
    return blocks


def _transfer(sender: int, receiver: int) -> _Call:
    payload = payload_of(Transfer(_ACCOUNTS[receiver], KAI + sender))
    return _Call(_ACCOUNTS[sender], payload, sha256(payload).digest())


def _apply_rates(blocks: list[_Block]) -> tuple[State, list[float]]:
    allocations = tuple(Allocation(account, 10_000 * KAI) for account in _ACCOUNTS)
    state = genesis_state(write_genesis(Genesis("benchmark", "demo", 0, allocations)))
    rates = []
    for block in blocks:
        start = time.perf_counter()
        state, _ = apply(state, block)
        rates.append(len(block.calls) / (time.perf_counter() - start))
    return state, rates


def _decode(block: _Block) -> None:
    for call in block.calls:
        parse_payload(call.payload)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
