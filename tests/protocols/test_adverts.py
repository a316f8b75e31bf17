"""Adverts and heartbeats: rules of the topics."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from kaisar_p2p.wire.verdict import Verdict
from protocols.adverts import (
    GPU_CLASS,
    Heartbeat,
    Spec,
    WorkerAdvert,
    fits,
    validate_advert,
    validate_heartbeat,
)
from protocols.interpreter.calls import CHECKER, PROVIDER
from protocols.interpreter.state import ACTIVE, RETIRED, MachineState, State, WorkerState
from protocols.params import MAINNET

NETWORK = sha256(b"adverts").digest()
NOW = 1_700_000_000.0
NOW_MS = int(NOW * 1000)
OWNER, OTHER = bytes([1] * 32), bytes([2] * 32)
SPEC = Spec(GPU_CLASS, 8, 32_000, 100_000, 1, 24_000, "RTX 4090")
KEYS = [KeyPair.from_seed(sha256(b"a%d" % i).digest()) for i in range(4)]
STATE = State(
    NETWORK,
    MAINNET,
    machines=Map(
        {
            KEYS[0].public_key: MachineState(OWNER, PROVIDER, 1),
            KEYS[1].public_key: MachineState(OWNER, PROVIDER, 1),
            KEYS[2].public_key: MachineState(OWNER, CHECKER, 1),
        }
    ),
    workers=Map({KEYS[0].public_key: WorkerState(OWNER, SPEC, 1, 0, ACTIVE, 1)}),
)


def advert(keys: KeyPair = KEYS[0], issued_ms: int = NOW_MS) -> WorkerAdvert:
    return WorkerAdvert(keys.public_key, OWNER, issued_ms, ("/ip4/1.2.3.4/tcp/1",), SPEC, SPEC, 5, 0, 0, "docker")


def judge(one: WorkerAdvert, keys: KeyPair = KEYS[0], state: State = STATE) -> Verdict:
    return validate_advert(seal(one, keys, NETWORK), NOW, state)[0]


@pytest.mark.parametrize("keys", KEYS[:2])  # a registered worker, and a bound machine that is about to register
def test_gossip_advert__accept(keys: KeyPair) -> None:
    assert judge(advert(keys), keys) is Verdict.ACCEPT


@pytest.mark.parametrize(
    ("one", "keys"),
    [
        (advert(issued_ms=NOW_MS + 60_001), KEYS[0]),
        (advert(issued_ms=NOW_MS - MAINNET.advert_ttl_ms - 1), KEYS[0]),
        (replace(advert(), owner=OTHER), KEYS[0]),
        (advert(KEYS[2]), KEYS[2]),
        (advert(KEYS[3]), KEYS[3]),
    ],
)
def test_gossip_advert__ignore(one: WorkerAdvert, keys: KeyPair) -> None:
    assert judge(one, keys) is Verdict.IGNORE


def test_gossip_advert__ignore_a_worker_that_left() -> None:
    retired = WorkerState(OWNER, SPEC, 1, 0, RETIRED, 1)
    assert judge(advert(), state=replace(STATE, workers=Map({KEYS[0].public_key: retired}))) is Verdict.IGNORE


@pytest.mark.parametrize(
    "one",
    [
        replace(advert(), worker=KEYS[1].public_key),
        replace(advert(), free=replace(SPEC, cpu_cores=9)),
        replace(advert(), workload_permille=1001),
        replace(advert(), runtime="lxc"),
        replace(advert(), spec=replace(SPEC, device_class=0)),
    ],
)
def test_gossip_advert__reject(one: WorkerAdvert) -> None:
    assert judge(one) is Verdict.REJECT


def test_gossip_advert__reject_another_network_and_size() -> None:
    assert validate_advert(seal(advert(), KEYS[0], bytes(32)), NOW, STATE)[0] is Verdict.REJECT
    assert validate_advert(bytes(5000), NOW, STATE)[0] is Verdict.REJECT


@pytest.mark.parametrize(
    ("beat", "keys", "verdict"),
    [
        (Heartbeat(KEYS[2].public_key, NOW_MS, 2, 0, 0), KEYS[2], Verdict.ACCEPT),
        (Heartbeat(KEYS[2].public_key, NOW_MS + 61_000, 2, 0, 0), KEYS[2], Verdict.IGNORE),
        (Heartbeat(KEYS[2].public_key, 0, 2, 0, 0), KEYS[2], Verdict.IGNORE),
        (Heartbeat(KEYS[3].public_key, NOW_MS, 2, 0, 0), KEYS[3], Verdict.IGNORE),
        (Heartbeat(KEYS[2].public_key, NOW_MS, 2, 0, 0), KEYS[1], Verdict.REJECT),
        (Heartbeat(KEYS[2].public_key, NOW_MS, 2, 2000, 0), KEYS[2], Verdict.REJECT),
    ],
)
def test_gossip_heartbeat(beat: Heartbeat, keys: KeyPair, verdict: Verdict) -> None:
    assert validate_heartbeat(seal(beat, keys, NETWORK), NOW, STATE)[0] is verdict


RIGHT = seal(advert(), KEYS[0], NETWORK)


@given(st.binary(max_size=300) | st.just(RIGHT), st.integers(0, 2**32), st.integers(1, 255))
def test_no_bytes_raise_and_no_changed_byte_is_accepted(data: bytes, position: int, value: int) -> None:
    changed = bytearray(data)
    if changed:
        changed[position % len(changed)] ^= value
    assert validate_advert(bytes(changed), NOW, STATE)[0] is not Verdict.ACCEPT
    assert validate_advert(data[: position % (len(data) + 1)], NOW, STATE)[0] in Verdict
    assert validate_heartbeat(bytes(changed), NOW, STATE)[0] is not Verdict.ACCEPT


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (SPEC, True),
        (Spec(0, 1, 1, 1, 0, 0, ""), True),
        (replace(SPEC, gpu_model="A100"), False),
        (replace(SPEC, gpu_memory_mb=25_000), False),
        (replace(SPEC, memory_mb=33_000), False),
        (replace(SPEC, disk_mb=100_001), False),
        (replace(SPEC, device_class=2), False),
    ],
)
def test_fits(wanted: Spec, expected: bool) -> None:
    assert fits(wanted, SPEC) is expected
