"""The ledger adapter: signed calls in finalized order.

`Ledger` is the interface. `open_embedded` opens the default implementation, an SQLite file.
"""

from __future__ import annotations

from kaisar_p2p.ledger.calls import ED25519, PAYLOAD_BYTES, SR25519, SignedCall, open_call, read_call, sign_call
from kaisar_p2p.ledger.embedded import EmbeddedLedger, open_embedded
from kaisar_p2p.ledger.faults import FaultyLedger
from kaisar_p2p.ledger.format import ChainParameters
from kaisar_p2p.ledger.interface import Block, Call, CallSigner, Checkpoint, Ledger, Receipt

__all__ = [
    "ED25519",
    "PAYLOAD_BYTES",
    "SR25519",
    "Block",
    "Call",
    "CallSigner",
    "ChainParameters",
    "Checkpoint",
    "EmbeddedLedger",
    "FaultyLedger",
    "Ledger",
    "Receipt",
    "SignedCall",
    "open_call",
    "open_embedded",
    "read_call",
    "sign_call",
]
