from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from kaisar_p2p.ledger import ED25519, ChainParameters, EmbeddedLedger

GENESIS = b"a genesis document"
GENESIS_TIME_MS = 1_700_000_000_000


@dataclass
class Wallet:
    """An ed25519 wallet made of a small number."""

    number: int = 1
    scheme: int = ED25519
    key: SigningKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = SigningKey(bytes([self.number]) * 32)

    @property
    def public_key(self) -> bytes:
        return bytes(self.key.verify_key)

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message).signature


@pytest.fixture(scope="session")
def make_wallet() -> type[Wallet]:
    return Wallet


@pytest.fixture(scope="session")
def wallet() -> Wallet:
    return Wallet()


@pytest.fixture
def make_ledger(tmp_path: Path) -> Callable[..., Path]:
    """Create a ledger file with short blocks; parameters as keywords."""

    def create(name: str = "ledger.sqlite3", genesis: bytes = GENESIS, **parameters: int) -> Path:
        parameters = {"block_time_ms": 20, "finality_lag": 2} | parameters
        EmbeddedLedger.create(
            tmp_path / name, genesis, time_ms=GENESIS_TIME_MS, parameters=ChainParameters(**parameters)
        )
        return tmp_path / name

    return create


@pytest.fixture
def ledger_path(make_ledger: Callable[..., Path]) -> Path:
    return make_ledger()
