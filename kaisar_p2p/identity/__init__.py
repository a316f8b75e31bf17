"""Who a node and its owner are: a machine key, owner wallets, and the keystore that keeps both on disk.

- A *machine key* (ed25519) is the libp2p peer id, signs votes, and proves VRF outputs.
- An *owner wallet* (ed25519 or sr25519) holds funds; it is a full Substrate account with an SS58 address.

Importing this package loads PyNaCl only; the sr25519 and BIP-39 bindings (1 MB together) load on first use, and
substrate-interface (40 MB) never.
"""

from __future__ import annotations

from kaisar_p2p.identity.keys import MachineKey, Scheme, SecretKey, Wallet
from kaisar_p2p.identity.keystore import Keystore, WalletInfo
from kaisar_p2p.identity.mnemonic import generate_mnemonic
from kaisar_p2p.identity.sealed import INTERACTIVE, KdfCost
from kaisar_p2p.identity.ss58 import KAISAR_PREFIX, ss58_decode, ss58_encode

__all__ = [
    "INTERACTIVE",
    "KAISAR_PREFIX",
    "KdfCost",
    "Keystore",
    "MachineKey",
    "Scheme",
    "SecretKey",
    "Wallet",
    "WalletInfo",
    "generate_mnemonic",
    "ss58_decode",
    "ss58_encode",
]
