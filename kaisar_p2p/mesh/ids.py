"""Machine keys and libp2p peer ids: the same 32 bytes, once bare and once wrapped.

The peer id of an ed25519 key is the identity multihash of its protobuf encoding
(https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md).
"""

from __future__ import annotations

from kaisar_p2p.mesh import compat as _compat  # noqa: F401  (before libp2p)

from libp2p.crypto.ed25519 import create_new_key_pair  # isort: skip
from libp2p.crypto.keys import KeyPair  # isort: skip
from libp2p.peer.id import ID  # isort: skip

_ED25519_PREFIX = bytes.fromhex("002408011220")  # identity multihash, 36 bytes; key type 1, 32 bytes


def key_of(peer_id: bytes) -> bytes | None:
    """The ed25519 key inside the bytes of a peer id; None when the peer uses another kind of key."""
    if len(peer_id) != 38 or not peer_id.startswith(_ED25519_PREFIX):
        return None
    return peer_id[6:]


def id_of(key: bytes) -> ID:
    """The peer id of a 32-byte ed25519 public key."""
    return ID(_ED25519_PREFIX + key)


def id_bytes_of(key: bytes) -> bytes:
    """The bytes of the peer id of a 32-byte ed25519 public key."""
    return _ED25519_PREFIX + key


def key_pair_of(seed: bytes) -> KeyPair:
    """libp2p's form of the machine key with this 32-byte seed."""
    if len(seed) != 32:
        raise ValueError(f"a machine key's seed has 32 bytes, not {len(seed)}")
    return create_new_key_pair(seed)
