"""Gossip on `epoch`: each rule, and any bytes."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.envelope import Signed, Verified, seal
from kaisar_p2p.wire.verdict import Verdict
from protocols.digests import registry_root
from protocols.epoch_body import mix_input
from protocols.epoch_gossip import MAX_ROUNDS, MESSAGE_BYTES_MAX, proposer_of, proposers, validate_epoch
from protocols.epochs import EpochHeader, FetchRequest, HeaderProposal, HeaderVote, MixReveal
from protocols.interpreter.state import State
from protocols.params import DEMO

PARAMS = replace(DEMO, epoch_slots=4, slot_blocks=2)
NETWORK = sha256(b"network").digest()
EPOCH = 5
KEYS = {keys.public_key: keys for keys in (KeyPair.from_seed(sha256(b"%d" % index).digest()) for index in range(6))}
MEMBERS = tuple(sorted(KEYS))[:4]
UNSTAKED, STRANGER = (KEYS[key] for key in sorted(KEYS)[4:])
REGISTRY = tuple(sorted([(key, 10**20) for key in MEMBERS] + [(UNSTAKED.public_key, 0)]))


def state_at(block: int, last_anchor: int = EPOCH - 1) -> State:
    epochs = range(EPOCH - 1, EPOCH + 2)
    slots = range((EPOCH - 1) * PARAMS.epoch_slots, PARAMS.slot_of(block) + 1)
    return State(
        NETWORK,
        PARAMS,
        number=block,
        last_anchor=last_anchor,
        registries=Map(dict.fromkeys(epochs, REGISTRY)),
        mixes=Map({epoch: sha256(b"mix").digest() for epoch in epochs}),
        beacons=Map({slot: sha256(b"beacon %d" % slot).digest() for slot in slots}),
    )


LAST_BLOCK = (EPOCH + 1) * PARAMS.epoch_blocks - 1
STATE = state_at(LAST_BLOCK + 1)
MEMBER = KEYS[MEMBERS[0]]


def reveal(keys: KeyPair = MEMBER, epoch: int = EPOCH) -> bytes:
    return seal(MixReveal(epoch, vrf.prove(keys.seed, mix_input(STATE, epoch))), keys, NETWORK)


def vote(keys: KeyPair = MEMBER, epoch: int = EPOCH, round_: int = 0) -> bytes:
    return seal(HeaderVote(epoch, round_, bytes(32)), keys, NETWORK)


def proposal(keys: KeyPair | None = None, **changes: object) -> bytes:
    header = EpochHeader(
        EPOCH, 0, 20, 23, bytes(32), bytes(32), registry_root(REGISTRY), *[bytes(32)] * 6, 1, 1, 1, 1, 1
    )  # fmt: skip
    header = replace(header, **changes)
    proposer = proposer_of(STATE, EPOCH, header.round)
    return seal(HeaderProposal(header), keys or KEYS[proposer], NETWORK)


def judged(data: bytes, state: State = STATE) -> tuple[Verdict, str]:
    verdict, reason, message = validate_epoch(data, 0.0, state)
    assert (message is not None) == (verdict is Verdict.ACCEPT) == (reason == "")
    return verdict, reason


@pytest.mark.parametrize(
    "data", [reveal(), vote(), vote(round_=3), proposal(), proposal(round=2), proposal(first_slot=4)]
)
def test_gossip_epoch__accept(data: bytes) -> None:
    verdict, _, message = validate_epoch(data, 0.0, STATE)
    assert verdict is Verdict.ACCEPT
    assert isinstance(message, Verified)
    assert message.envelope == data


def test_gossip_epoch__reject_what_is_not_a_message() -> None:
    assert judged(b"") == (Verdict.REJECT, "not msgpack: ValueError")
    assert judged(bytes(MESSAGE_BYTES_MAX + 1)) == (Verdict.REJECT, "too long")
    assert judged(reveal() + b"\0")[0] is Verdict.REJECT
    other = encode(Signed(encode(FetchRequest("body", bytes(32), 0)), MEMBER.public_key, bytes(64)))
    assert judged(other)[0] is Verdict.REJECT


@pytest.mark.parametrize("make", [reveal, vote])
def test_gossip_epoch__reject_who_is_not_in_the_registry(make) -> None:
    for keys in (STRANGER, UNSTAKED):
        assert judged(make(keys)) == (Verdict.REJECT, "the sender is not in the epoch's registry")


def test_gossip_epoch__reject_a_proposal_out_of_turn() -> None:
    wrong = next(keys for key, keys in KEYS.items() if key in MEMBERS and key != proposer_of(STATE, EPOCH, 0))
    assert judged(proposal(wrong)) == (Verdict.REJECT, "not the proposer of the round")


def test_gossip_epoch__reject_impossible_rounds_and_headers() -> None:
    assert judged(vote(round_=MAX_ROUNDS)) == (Verdict.REJECT, "impossible round")
    assert judged(proposal(round=MAX_ROUNDS)) == (Verdict.REJECT, "impossible round")
    for change in ({"last_slot": 22}, {"first_slot": 24}, {"registry_root": bytes(32)}):
        assert judged(proposal(**change)) == (Verdict.REJECT, "impossible header")


def test_gossip_epoch__reject_false_signatures_and_proofs() -> None:
    for data in (reveal(), vote(), proposal()):
        signed = decode(Signed, data)
        assert "bad signature" in judged(encode(replace(signed, signature=bytes(64))))[1]
    stolen = seal(MixReveal(EPOCH, vrf.prove(KEYS[MEMBERS[1]].seed, mix_input(STATE, EPOCH))), MEMBER, NETWORK)
    assert judged(stolen) == (Verdict.REJECT, "false VRF proof")
    foreign = seal(HeaderVote(EPOCH, 0, bytes(32)), MEMBER, bytes(32))
    assert judged(foreign)[0] is Verdict.REJECT


@pytest.mark.parametrize("data", [reveal(), vote(), proposal()])
def test_gossip_epoch__ignore_what_is_not_now(data: bytes) -> None:
    assert judged(data, state_at(LAST_BLOCK - PARAMS.slot_blocks)) == (Verdict.IGNORE, "the epoch has not ended here")
    assert judged(data, state_at(LAST_BLOCK - 1))[0] is Verdict.ACCEPT, "the sender may be a block ahead"
    assert judged(data, state_at(LAST_BLOCK + 1, last_anchor=EPOCH)) == (Verdict.IGNORE, "the epoch is over")
    assert judged(data, state_at(LAST_BLOCK + 1 + PARAMS.epoch_blocks)) == (Verdict.IGNORE, "the epoch is over")
    assert judged(data, State(NETWORK, PARAMS))[0] is Verdict.IGNORE
    assert judged(data, replace(STATE, beacons=Map())) == (Verdict.IGNORE, "nothing is known of the epoch")
    assert judged(data, replace(STATE, registries=Map()))[0] is Verdict.IGNORE


def test_everybody_with_stake_has_a_turn_in_an_order_that_the_beacon_picks() -> None:
    order = proposers(STATE, EPOCH)
    assert sorted(order) == list(MEMBERS)
    assert proposer_of(STATE, EPOCH, 1) == order[1] == proposer_of(STATE, EPOCH, 1 + len(order))
    orders = {
        proposers(replace(STATE, beacons=STATE.beacons.set(23, sha256(b"%d" % index).digest())), EPOCH)
        for index in range(20)
    }
    assert len({order[0] for order in orders}) == len(MEMBERS)
    assert proposer_of(replace(STATE, beacons=Map()), EPOCH, 0) is None


@given(st.binary(max_size=300))
def test_gossip_epoch__any_bytes_have_a_verdict(data: bytes) -> None:
    assert judged(data)[0] in (Verdict.REJECT, Verdict.IGNORE)


@given(st.sampled_from([reveal(), vote(), proposal()]), st.integers(0, 2000), st.integers(0, 255), st.integers(-1, 60))
def test_gossip_epoch__a_changed_byte_is_never_accepted(data: bytes, at: int, value: int, block: int) -> None:
    changed = bytearray(data)
    changed[at % len(data)] = value
    verdict, _ = judged(bytes(changed), state_at(block) if block >= 0 else State(NETWORK, PARAMS))
    assert verdict is not Verdict.ACCEPT or bytes(changed) == data


@given(
    st.sampled_from([MixReveal, HeaderVote]), st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1), st.integers(0, 5)
)
def test_gossip_epoch__any_numbers_have_a_verdict(cls: type, epoch: int, round_: int, who: int) -> None:
    message = MixReveal(epoch, bytes(80)) if cls is MixReveal else HeaderVote(epoch, round_, bytes(32))
    judged(seal(message, list(KEYS.values())[who], NETWORK))
