"""Two votes of one member in one round are evidence, published once by whoever sees both."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire.codec import decode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import seal
from kaisar_p2p.wire.verdict import Verdict
from protocols.actions import Action, BlockApplied, Gossip, Note, Publish
from protocols.epoch_gossip import TOPIC, validate_epoch
from protocols.epoch_machine import EpochMachine
from protocols.epochs import HeaderVote
from protocols.equivocation import DoubleHeader, context_of, validate_evidence, verify_evidence
from protocols.interpreter.state import State
from protocols.params import DEMO

PARAMS = replace(DEMO, epoch_slots=4, slot_blocks=2)
NETWORK = sha256(b"network").digest()
EPOCH = 5
KEYS = [KeyPair.from_seed(sha256(b"%d" % index).digest()) for index in range(4)]
STATE = State(
    NETWORK,
    PARAMS,
    number=(EPOCH + 1) * PARAMS.epoch_blocks - 1,
    last_anchor=EPOCH - 1,
    registries=Map({EPOCH: tuple(sorted((keys.public_key, 10**20) for keys in KEYS))}),
    mixes=Map({EPOCH: bytes(32)}),
    beacons=Map({(EPOCH + 1) * PARAMS.epoch_slots - 1: bytes(32)}),
)


def machine() -> EpochMachine:
    watcher = EpochMachine(KeyPair.from_seed(bytes(32)), NETWORK)
    watcher.step(BlockApplied(STATE, ()), 100.0)
    return watcher


def told(watcher: EpochMachine, keys: KeyPair, round_: int, digest: bytes) -> list[Action]:
    data = seal(HeaderVote(EPOCH, round_, digest), keys, NETWORK)
    verdict, reason, message = validate_epoch(data, 100.0, STATE)
    assert verdict is Verdict.ACCEPT, reason
    return watcher.step(Gossip(TOPIC, message, keys.public_key, 100.0), 100.0)


def test_two_votes_in_one_round_are_evidence_once() -> None:
    watcher, cheat = machine(), KEYS[1]
    assert told(watcher, cheat, 3, b"\x01" * 32) == []
    publish, note = told(watcher, cheat, 3, b"\x00" * 32)
    assert isinstance(publish, Publish) and isinstance(note, Note)
    verdict, reason, evidence = validate_evidence(publish.payload, 0.0, STATE)
    assert verdict is Verdict.ACCEPT, reason
    assert isinstance(evidence, DoubleHeader)
    assert verify_evidence(evidence, context_of(STATE)) == cheat.public_key
    assert told(watcher, cheat, 3, b"\x02" * 32) == []
    assert told(watcher, cheat, 4, b"\x01" * 32) == told(watcher, cheat, 4, b"\x00" * 32) == []


def test_whoever_sees_them_in_whatever_order_publishes_the_same() -> None:
    found = []
    for digests in ((b"\x01", b"\x00"), (b"\x00", b"\x01")):
        watcher = machine()
        actions = [action for digest in digests for action in told(watcher, KEYS[2], 0, digest * 32)]
        found.append([action.payload for action in actions if isinstance(action, Publish)])
    assert found[0] == found[1] and len(found[0]) == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 1)), max_size=20))
def test_only_those_who_voted_twice_are_accused(votes: list[tuple[int, int, int]]) -> None:
    watcher, seen, accused = machine(), {}, []
    guilty = set()
    for who, round_, choice in votes:
        if seen.setdefault((who, round_), choice) != choice:
            guilty.add(KEYS[who].public_key)
        for action in told(watcher, KEYS[who], round_, bytes([choice]) * 32):
            if isinstance(action, Publish) and action.topic == "evidence":
                accused.append(verify_evidence(decode(DoubleHeader, action.payload), context_of(STATE)))
    assert len(accused) == len(set(accused)) and set(accused) == guilty
