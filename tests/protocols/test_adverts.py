"""Adverts and heartbeats: rules of the topics, and the book of the newest."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Verified, open_signed, seal
from kaisar_p2p.wire.verdict import Verdict
from protocols.adverts import (
    GPU_CLASS,
    AdvertBook,
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


def opened(one: WorkerAdvert, keys: KeyPair = KEYS[0]) -> Verified[WorkerAdvert]:
    return open_signed(WorkerAdvert, seal(one, keys, NETWORK), NETWORK)


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


def test_the_newest_advert_of_a_worker_wins_until_it_expires() -> None:
    book = AdvertBook(ttl_ms=1000)
    assert book.add(opened(advert()), NOW)
    assert not book.add(opened(advert()), NOW)
    assert book.add(opened(replace(advert(issued_ms=NOW_MS + 500), workload_permille=7)), NOW)
    assert not book.add(opened(advert(issued_ms=NOW_MS + 400)), NOW)
    held = book.get(KEYS[0].public_key, NOW + 1.4)
    assert held is not None and held.message.workload_permille == 7
    assert book.get(KEYS[0].public_key, NOW + 1.6) is None
    assert book.current(NOW + 1.6) == ()
    assert book.expire(NOW + 1.6) == 1 and len(book) == 0


def test_the_book_is_bounded_and_makes_room_for_the_living() -> None:
    book = AdvertBook(ttl_ms=1000, capacity=2)
    assert book.add(opened(advert()), NOW)
    assert book.add(opened(advert(KEYS[1]), KEYS[1]), NOW)
    assert not book.add(opened(advert(KEYS[2]), KEYS[2]), NOW)
    assert book.add(opened(advert(KEYS[2], NOW_MS + 2000), KEYS[2]), NOW + 2.0)
    assert len(book) == 1
    book.remove(KEYS[2].public_key)
    assert len(book) == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 50)), max_size=40))
def test_the_book_holds_the_maximum_of_each_worker(entries: list[tuple[int, int]]) -> None:
    book, newest = AdvertBook(ttl_ms=10**6), dict[int, int]()
    for index, offset in entries:
        added = book.add(opened(advert(KEYS[index], NOW_MS + offset), KEYS[index]), NOW)
        assert added == (offset > newest.get(index, -1))
        newest[index] = max(newest.get(index, -1), offset)
    assert {a.message.worker: a.message.issued_ms for a in book.current(NOW)} == {
        KEYS[index].public_key: NOW_MS + offset for index, offset in newest.items()
    }


def test_matching_looks_at_what_is_free() -> None:
    book = AdvertBook(ttl_ms=1000)
    book.add(opened(replace(advert(), free=replace(SPEC, gpus=0))), NOW)
    book.add(opened(advert(KEYS[1]), KEYS[1]), NOW)
    assert [found.message.worker for found in book.matching(SPEC, NOW)] == [KEYS[1].public_key]
    assert len(book.matching(replace(SPEC, gpus=0), NOW)) == 2


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
