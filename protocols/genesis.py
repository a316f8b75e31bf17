"""The genesis document: JSON that fixes a network's parameters and its first accounts. Its SHA-256 is the network id.

::

    {
      "name": "demo-1", "preset": "demo", "params": {"epoch_slots": 6}, "time_ms": 1790000000000,
      "treasury_kai": "1000",
      "allocations": [{"account": "<64 hex digits>", "balance_kai": "500.25", "points_kai": "10"}]
    }

`params` changes single numbers of the preset (`protocols/params.py`). Points are backed by the treasury.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from immutables import Map

from kaisar_p2p.errors import ConfigError
from kaisar_p2p.wire.crypto import sha256
from kaisar_p2p.wire.money import kai_to_planck, planck_to_kai
from protocols.interpreter.state import AccountState, State, Totals
from protocols.params import PERMILLE, PRESETS, Params
from protocols.quorum import MAX_SEATS

DOCUMENT_BYTES = 1 << 20
_KEYS = {"name", "preset", "params", "time_ms", "treasury_kai", "allocations"}
_ALLOCATION_KEYS = {"account", "balance_kai", "points_kai"}
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_ACCOUNT = re.compile(r"[0-9a-f]{64}")
_AT_LEAST_ONE = ("block_ms", "slot_blocks", "epoch_slots", "kept_epochs", "max_open_orders", "proposer_timeout_ms")
_SHARES = ("referral_permille", "provider_fault_permille", "checker_share_permille", "delivery_ratio_permille")
_HINT = "compare the genesis document with the example in protocols/README.md"


@dataclass(frozen=True)
class Allocation:
    """What an account (32 bytes) owns at the start."""

    account: bytes
    balance_planck: int
    points_planck: int = 0


@dataclass(frozen=True)
class Genesis:
    """A genesis document's content; `overrides` are (name, number) pairs that differ from the preset."""

    name: str
    preset: str
    time_ms: int
    allocations: tuple[Allocation, ...] = ()
    treasury_planck: int = 0
    overrides: tuple[tuple[str, int], ...] = ()

    @property
    def params(self) -> Params:
        """The network's parameters; ConfigError for an unknown preset or number, or one that cannot work."""
        preset = PRESETS.get(self.preset)
        if preset is None:
            raise _wrong(f"unknown preset {self.preset!r:.40}; there are {', '.join(sorted(PRESETS))}")
        params = preset.with_overrides(dict(self.overrides))
        for name in _AT_LEAST_ONE:
            if getattr(params, name) < 1:
                raise _wrong(f"parameter {name} must be at least 1")
        for name in _SHARES:
            if getattr(params, name) > PERMILLE:
                raise _wrong(f"parameter {name} is at most {PERMILLE}")
        for name in ("committee", "small_committee", "deploy"):
            seats, threshold = getattr(params, f"{name}_seats"), getattr(params, f"{name}_threshold")
            if not seats // 2 < threshold <= seats <= MAX_SEATS:
                raise _wrong(f"{name}: a threshold of {threshold} out of {seats} seats (at most {MAX_SEATS})")
        return params


def parse_genesis(document: bytes) -> Genesis:
    """Read a genesis document; ConfigError says what is wrong with it."""
    plain = _object(_load(document), _KEYS, "the genesis document")
    overrides = plain.get("params", {})
    allocations = plain.get("allocations", [])
    if type(overrides) is not dict or type(allocations) is not list:
        raise _wrong("params must be an object and allocations a list")
    genesis = Genesis(
        name=_text(plain, "name", _NAME),
        preset=_text(plain, "preset", _NAME),
        time_ms=_time(plain.get("time_ms")),
        allocations=tuple(_allocation(item) for item in allocations),
        treasury_planck=_amount(plain, "treasury_kai"),
        overrides=tuple(sorted(overrides.items())),
    )
    _check(genesis)
    return genesis


def write_genesis(genesis: Genesis) -> bytes:
    """The canonical document, which `parse_genesis` reads back: sorted keys, two spaces, a newline at the end."""
    _check(genesis)
    plain = {
        "name": genesis.name,
        "preset": genesis.preset,
        "time_ms": genesis.time_ms,
        "treasury_kai": planck_to_kai(genesis.treasury_planck),
        "params": dict(genesis.overrides),
        "allocations": [
            {
                "account": item.account.hex(),
                "balance_kai": planck_to_kai(item.balance_planck),
                "points_kai": planck_to_kai(item.points_planck),
            }
            for item in genesis.allocations
        ],
    }
    return json.dumps(plain, sort_keys=True, indent=2).encode() + b"\n"


def genesis_state(document: bytes) -> State:
    """The state before block 0; ConfigError says what is wrong with the document."""
    genesis = parse_genesis(document)
    balances = sum(item.balance_planck for item in genesis.allocations)
    return State(
        network=sha256(document),
        params=genesis.params,
        time_ms=genesis.time_ms,
        accounts=Map(
            {item.account: AccountState(item.balance_planck, item.points_planck) for item in genesis.allocations}
        ),
        totals=Totals(issued_planck=balances + genesis.treasury_planck, treasury_planck=genesis.treasury_planck),
    )


def _check(genesis: Genesis) -> None:
    """What must hold between the parts."""
    _ = genesis.params
    accounts = [item.account for item in genesis.allocations]
    if len(set(accounts)) != len(accounts):
        raise _wrong("an account has two allocations")
    if sum(item.points_planck for item in genesis.allocations) > genesis.treasury_planck:
        raise _wrong("the treasury must hold KAI for all points")


def _load(document: bytes) -> Any:
    if len(document) > DOCUMENT_BYTES:
        raise _wrong(f"a genesis document has at most {DOCUMENT_BYTES} bytes")
    try:
        return json.loads(document.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"the genesis document is not JSON in UTF-8: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) != len(pairs):
        raise ValueError("a key is there twice")
    return plain


def _object(plain: Any, known: set[str], what: str) -> dict[str, Any]:
    if type(plain) is not dict:
        raise _wrong(f"{what} must be an object")
    unknown = sorted(plain.keys() - known)
    if unknown:
        raise _wrong(f"{what} has an unknown key {unknown[0]!r:.40}; known are {', '.join(sorted(known))}")
    return plain


def _text(plain: dict[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    value = plain.get(key)
    if type(value) is not str or not pattern.fullmatch(value):
        raise _wrong(f"{key} must be text like {pattern.pattern}, not {value!r:.80}")
    return value


def _time(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _wrong(f"time_ms must be milliseconds since 1970, not {value!r:.40}")
    return value


def _amount(plain: dict[str, Any], key: str) -> int:
    value = plain.get(key, "0")
    if type(value) is not str:
        raise _wrong(f'{key} must be text such as "12.5", not {value!r:.40}')
    return kai_to_planck(value)


def _allocation(plain: Any) -> Allocation:
    item = _object(plain, _ALLOCATION_KEYS, "an allocation")
    account = bytes.fromhex(_text(item, "account", _ACCOUNT))
    return Allocation(account, _amount(item, "balance_kai"), _amount(item, "points_kai"))


def _wrong(message: str) -> ConfigError:
    return ConfigError(message, hint=_HINT)
