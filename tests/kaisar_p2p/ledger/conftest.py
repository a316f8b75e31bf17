from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from nacl.signing import SigningKey

from kaisar_p2p.ledger import ED25519, ChainParameters, EmbeddedLedger

GENESIS = b"a genesis document"
FAST = ChainParameters(block_time_ms=20, finality_lag=2)


@dataclass
class Wallet:
    """An ed25519 wallet of a seed byte."""

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


@pytest.fixture
def wallet() -> Wallet:
    return Wallet()


@pytest.fixture
def other_wallet() -> Wallet:
    return Wallet(2)


@pytest.fixture
def ledger_path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite3"
    EmbeddedLedger.create(path, GENESIS, time_ms=1_700_000_000_000, parameters=FAST)
    return path
