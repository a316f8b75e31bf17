"""Print test vectors as JSON: ``python tests/vectors/generate.py popw|vrf|merkle|messages``.

The files beside this script are compared with this output; a difference means that the protocol changed:
``generate.py popw | diff - popw.json``. Those of popw, vrf and merkle were made by an independent implementation.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np

from kaisar_p2p.hardware.prove import NumpyBackend
from kaisar_p2p.wire import matproof, merkle, vrf
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair, domain_hash
from kaisar_p2p.wire.envelope import seal
from protocols import sortition
from specimens import message_classes, specimen

# n, k, t, rounds: odd tile counts, several chunks of tags, several pieces of 65536 columns.
JOBS = [
    (64, 64, 4, 3),
    (96, 192, 32, 2),
    (256, 1024, 128, 2),
    (160, 128, 4, 2),
    (32, 131136, 16, 2),
    (16, 65536, 8, 1),
]


def noise(name: str, index: int, length: int = 32) -> bytes:
    """Bytes that look random and are the same everywhere."""
    blocks = range(-(-length // 32))
    return b"".join(sha256(f"{name}/{index}/{block}".encode()).digest() for block in blocks)[:length]


def popw() -> dict[str, Any]:
    """Rows, whole proofs, samples, digests, committees and lottery draws."""
    return {
        "rows": [_row(*case) for case in ((0, 0x41, 0, 256), (1, 0x42, 7, 256), (2, 0x41, 131071, 131136))],
        "proofs": [_proof(index, matproof.Job(*shape)) for index, shape in enumerate(JOBS)],
        "committees": [_committee(index, size, k) for index, (size, k) in enumerate(_COMMITTEES)],
        "draws": [_draw(index, *case) for index, case in enumerate(_DRAWS)],
    }


_COMMITTEES = [(1, 1), (5, 16), (16, 16), (99, 16), (100, 24), (1000, 24)]
_DRAWS = [(1, 24, 1000), (50, 24, 1000), (1000, 24, 1_000_000), (50_000, 24, 1_000_000)] + [
    (stake * 10**18, 400, 10**27) for stake in (1, 10**6, 10**7, 10**8, 2 * 10**8)
]


def _row(index: int, matrix: int, row: int, k: int) -> dict[str, Any]:
    entries = np.empty((1, k), np.float32)
    matproof.fill_rows(entries, noise("row", index), matrix, row)
    values = entries[0].astype(np.int8)
    return {
        "seed": noise("row", index).hex(),
        "matrix": matrix,
        "row": row,
        "k": k,
        "first": values[:16].tolist(),
        "sha256": sha256(values.tobytes()).hexdigest(),
    }


def _proof(index: int, job: matproof.Job) -> dict[str, Any]:
    seed, randomness = noise("seed", index), noise("randomness", index, 64)
    proof = NumpyBackend().prove(job, seed)
    result = matproof.check(job, seed, proof.roots, proof.tags, randomness, 5)
    return {
        "job": [job.n, job.k, job.t, job.rounds],
        "packed": job.pack().hex(),
        "seed": seed.hex(),
        "roots": [root.hex() for root in proof.roots],
        "first_tags": [tags[:8].tolist() for tags in proof.tags],
        "tags_sha256": [sha256(tags.astype("<u4").tobytes()).hexdigest() for tags in proof.tags],
        "randomness": randomness.hex(),
        "samples": [list(pick) for pick in matproof.samples(job, randomness, 5)],
        "digest": result.digest.hex(),
    }


def _committee(index: int, size: int, k: int) -> dict[str, Any]:
    prefix, beacon, subject = noise("prefix", index, 20), noise("beacon", index), noise("subject", index)
    stakes = stakes_of(index, size)
    return {
        "prefix": prefix.hex(),
        "beacon": beacon.hex(),
        "subject": subject.hex(),
        "size": size,
        "k": k,
        "seats": list(sortition.draw_committee(prefix, beacon, subject, stakes, k)),
    }


def stakes_of(index: int, size: int) -> list[int]:
    """Stakes of 0 to 65535 KAI in planck; the last member always has some."""
    numbers = (int.from_bytes(noise("stake", 1000 * index + i, 2), "big") for i in range(size - 1))
    return [number * 10**18 for number in numbers] + [10**22]


def _draw(index: int, stake: int, expected: int, total: int) -> dict[str, Any]:
    outputs = [noise("output", 100 * index + i, 64) for i in range(12)]
    votes = [sortition.draw(output, b"label", stake, expected, total) for output in outputs]
    return {"stake": str(stake), "expected": expected, "total": str(total), "votes": votes}


def vrf_vectors() -> list[dict[str, str]]:
    """Proofs and outputs; the RFC's own three stand in the test."""
    return [_vrf(noise("key", index), noise("alpha", index, 13 * index)) for index in range(8)]


def _vrf(seed: bytes, alpha: bytes) -> dict[str, str]:
    proof = vrf.prove(seed, alpha)
    return {
        "seed": seed.hex(),
        "public": vrf.public_key(seed).hex(),
        "alpha": alpha.hex(),
        "proof": proof.hex(),
        "output": vrf.proof_to_hash(proof).hex(),
    }


def merkle_vectors() -> list[dict[str, Any]]:
    """Roots and paths of trees of 1 to 33 leaves, leaf i being i as text."""
    return [_tree(count) for count in (0, 1, 2, 3, 5, 8, 13, 21, 33)]


def _tree(count: int) -> dict[str, Any]:
    tree = merkle.Tree(str(index).encode() for index in range(count))
    shown = sorted({0, count // 2, count - 1}) if count else []
    paths = {str(index): [node.hex() for node in tree.path(index)] for index in shown}
    return {"count": count, "root": tree.root.hex(), "paths": paths}


NETWORK = bytes(range(32))
KEYS = KeyPair.from_seed(bytes(range(32, 64)))


def message_vectors() -> list[dict[str, Any]]:
    """Two specimens of each message: canonical bytes, and for signed messages the envelope and the hash."""
    return [_message(cls, index) for cls in message_classes().values() for index in range(2)]


def _message(cls: type, index: int) -> dict[str, Any]:
    value = specimen(cls, index)
    vector: dict[str, Any] = {"message": cls.__name__, "tag": cls.TAG, "encoded": encode(value).hex()}  # type: ignore[attr-defined]
    tag = getattr(cls, "DOMAIN", None)
    if tag is not None:
        vector |= {
            "domain": tag,
            "envelope": seal(value, KEYS, NETWORK).hex(),
            "hash": domain_hash(tag, NETWORK, encode(value)).hex(),
        }
    return vector


RECIPES = {"popw": popw, "vrf": vrf_vectors, "merkle": merkle_vectors, "messages": message_vectors}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in RECIPES:
        sys.exit(__doc__)
    print(json.dumps(RECIPES[sys.argv[1]](), indent=1))
