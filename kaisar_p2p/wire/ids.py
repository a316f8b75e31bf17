"""How the names of things, which are bytes of fixed length, are shown to people.

A *machine key* is the ed25519 public key of a node: its libp2p identity, and the key of its votes and VRF proofs.
An *account* is the public key of an owner wallet (ed25519 or sr25519), as in Substrate.
"""

from __future__ import annotations


def short(name: bytes) -> str:
    """First eight hexadecimal digits, for people."""
    return name[:4].hex()
