"""Mutated and random inputs for parsers, until one raises what it must not, hangs, or takes memory.

An input is made by `random.Random(seed)` from the valid examples of a target; the same seed gives the same inputs. What
is found is told as hex with the seed, to be run again by `just fuzz mesh --replay HEX --target NAME`.
"""

from __future__ import annotations

import faulthandler
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

MEMORY_BYTES = 32 * 1024 * 1024
"""How much one input may raise the high-water mark of the process."""
HANG_S = 10.0
_LARGEST = 1 << 17
_NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x10000,
    0xFFFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 64) - 1,
)


@dataclass(frozen=True)
class Target:
    """`run` takes an input, or raises one of `expected`; everything else is a finding. `share` of all inputs."""

    name: str
    seeds: Sequence[bytes]
    run: Callable[[bytes], Awaitable[None]]
    expected: tuple[type[BaseException], ...]
    share: float = 1.0
    random_share: float = 0.1  # of the inputs are nothing but random bytes


@dataclass
class Finding:
    """An input that broke a rule."""

    target: str
    data: bytes
    what: str

    def __str__(self) -> str:
        shown = self.data[:200].hex() + ("..." if len(self.data) > 200 else "")
        return f"{self.target}: {self.what}\n  input, {len(self.data)} bytes: {shown}"


@dataclass
class Tally:
    """What has been tried."""

    inputs: int = 0
    refused: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class FuzzFailure(AssertionError):
    """The run is over; it has a finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


# -- inputs -----------------------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(rng: random.Random) -> bytes:
    value = rng.choice(_NUMBERS)
    form = rng.randrange(3)
    if form == 0:
        return _varint(value)
    size = max(1, (value.bit_length() + 7) // 8)
    return value.to_bytes(
        rng.choice((size, 4, 8, 2, size)) if size <= 2 else max(size, 4), "big" if form == 1 else "little"
    )


def _flip(rng: random.Random, data: bytearray, _others: Sequence[bytes]) -> None:
    for _ in range(rng.randrange(1, 5)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at = rng.randrange(len(data))
    number = _number(rng)
    data[at : at + len(number)] = number


def _insert(rng: random.Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.randrange(1, 40)) if rng.random() < 0.5 else _number(rng)


def _remove(rng: random.Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 1 + min(64, len(data)))]


def _cut(rng: random.Random, data: bytearray, _others: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def _repeat(rng: random.Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at = rng.randrange(len(data))
    part = data[at : at + rng.randrange(1, 100)]
    data[at:at] = part * rng.choice((1, 2, 3, 10, 50))


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other) + 1) :]


def _append(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    data += rng.choice(others)


def _noise(rng: random.Random, data: bytearray, _others: Sequence[bytes]) -> None:
    at, size = rng.randrange(len(data)), rng.randrange(1, 33)
    data[at : at + size] = rng.randbytes(size)


_MUTATIONS = (_flip, _flip, _overwrite, _overwrite, _insert, _remove, _cut, _repeat, _splice, _append, _append, _noise)


def make_input(rng: random.Random, target: Target) -> bytes:
    """The next input of a target."""
    if rng.random() < target.random_share:
        return rng.randbytes(rng.choice((1, 4, 16, 60, 300, 2000)))
    data = bytearray(rng.choice(target.seeds))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        if not data:
            data += rng.choice(target.seeds)
        if data:
            rng.choice(_MUTATIONS)(rng, data, target.seeds)
    return bytes(data[:_LARGEST])


def chunks(data: bytes) -> Iterator[bytes]:
    """The input in the pieces in which a network delivers it; the same pieces for the same input."""
    rng, at = random.Random(len(data) ^ (data[-1] if data else 0)), 0
    while at < len(data):
        size = rng.choice((1, 2, 11, 13, 64, 1400, 65536, len(data)))
        yield data[at : at + size]
        at += size


# -- running ----------------------------------------------------------------------------------------------------------


class _Watchdog:
    """Ends the process, with the input, when one input takes too long; whatever it waits for."""

    def __init__(self) -> None:
        self.current: tuple[str, bytes] | None = None
        self._number = 0
        self._ended = threading.Event()

    def next(self, name: str, data: bytes) -> None:
        self.current, self._number = (name, data), self._number + 1

    def _watch(self) -> None:
        last, since = -1, time.monotonic()
        while not self._ended.wait(0.5):
            if self._number != last or self.current is None:
                last, since = self._number, time.monotonic()
            elif time.monotonic() - since > HANG_S:
                faulthandler.dump_traceback(file=sys.__stderr__)
                name, data = self.current
                print(f"{name} hangs\n  input: {data.hex()}", file=sys.__stderr__, flush=True)
                os._exit(3)

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()


def peak_bytes() -> int:
    """The high-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def try_one(target: Target, data: bytes, tally: Tally) -> None:
    """Run one input; raises FuzzFailure."""
    before = peak_bytes()
    tally.inputs += 1
    try:
        await target.run(data)
    except target.expected as error:
        tally.refused += 1
        kind = type(error).__name__
        tally.kinds[kind] = tally.kinds.get(kind, 0) + 1
    except Exception as error:
        raise FuzzFailure(Finding(target.name, data, f"raised {error!r}")) from error
    if (grown := peak_bytes() - before) > MEMORY_BYTES:
        raise FuzzFailure(Finding(target.name, data, f"took {grown >> 20} MiB"))


async def fuzz(
    targets: Sequence[Target], inputs: int, seed: int, progress: Callable[[int, float], None] | None = None
) -> dict[str, Tally]:
    """Try so many inputs, shared among the targets by their weights; raises FuzzFailure at the first finding."""
    tallies = {target.name: Tally() for target in targets}
    total, done, began = sum(target.share for target in targets), 0, time.monotonic()
    watchdog = _Watchdog()
    with watchdog.watching():
        for target in targets:
            rng, tally, started = random.Random(f"{seed} {target.name}"), tallies[target.name], time.monotonic()
            for _ in range(round(inputs * target.share / total)):
                data = make_input(rng, target)
                watchdog.next(target.name, data)
                await try_one(target, data, tally)
                done += 1
                if not done % 64:
                    await trio.lowlevel.checkpoint()
                if progress is not None and not done % 5000:
                    progress(done, time.monotonic() - began)
            tally.seconds = time.monotonic() - started
    return tallies


def save(finding: Finding, folder: Path) -> Path:
    """Keep an input for later."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{finding.target}-{abs(hash(finding.data)):x}.hex"
    path.write_text(finding.data.hex() + "\n", encoding="ascii")
    return path
