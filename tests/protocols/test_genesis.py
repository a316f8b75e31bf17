"""The genesis document: what it says, and every way in which it can be wrong."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaisar_p2p.errors import ConfigError
from protocols.genesis import Allocation, Genesis, genesis_state, parse_genesis, write_genesis
from protocols.interpreter.audit import conservation, state_root
from protocols.params import DEMO, KAI

ACCOUNT = "ab" * 32
GOOD = {
    "name": "demo-1",
    "preset": "demo",
    "params": {"epoch_slots": 6},
    "time_ms": 1_790_000_000_000,
    "treasury_kai": "1000",
    "allocations": [{"account": ACCOUNT, "balance_kai": "500.25", "points_kai": "10"}],
}


def document(**changes) -> bytes:
    plain = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return json.dumps(plain).encode()


def test_the_state_before_block_0():
    state = genesis_state(document())
    assert state.network == sha256(document()).digest()
    assert (state.number, state.block_hash, state.time_ms) == (-1, bytes(32), 1_790_000_000_000)
    assert state.params == DEMO.with_overrides({"epoch_slots": 6})
    owner = state.accounts[bytes.fromhex(ACCOUNT)]
    assert (owner.balance_planck, owner.points_planck) == (500 * KAI + KAI // 4, 10 * KAI)
    assert state.totals.treasury_planck == 1000 * KAI
    assert state.totals.issued_planck == 1500 * KAI + KAI // 4
    assert conservation(state) == 0
    assert len(state_root(state)) == 32


def test_optional_parts():
    genesis = parse_genesis(b'{"name": "a", "preset": "mainnet", "time_ms": 0}')
    assert genesis == Genesis("a", "mainnet", 0)


@given(
    st.lists(
        st.tuples(st.binary(min_size=32, max_size=32), st.integers(0, 10**28), st.integers(0, 10**20)),
        max_size=5,
        unique_by=lambda item: item[0],
    ),
    st.integers(10**21, 10**28),
    st.dictionaries(st.sampled_from(["bond_planck", "unbonding_epochs", "deadline_ms"]), st.integers(0, 10**24)),
)
def test_what_is_written_is_read_back(allocations, treasury, overrides):
    genesis = Genesis(
        "net",
        "testnet",
        5,
        tuple(Allocation(*item) for item in allocations),
        treasury,
        tuple(sorted(overrides.items())),
    )
    written = write_genesis(genesis)
    assert parse_genesis(written) == genesis
    assert write_genesis(parse_genesis(written)) == written


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (b"\xff", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"name": "a", "name": "b"}', "twice"),
        (b"[]", "must be an object"),
        (b" " * ((1 << 20) + 1), "at most"),
        (document(surprise=1), "unknown key 'surprise'"),
        (document(name=None), "name must be text"),
        (document(name="Demo net"), "name must be text"),
        (document(preset="moon"), "unknown preset 'moon'"),
        (document(preset=None), "preset must be text"),
        (document(params=[]), "params must be an object"),
        (document(params={"epoch_slot": 6}), "unknown parameter 'epoch_slot'"),
        (document(params={"epoch_slots": True}), "must be a non-negative integer"),
        (document(params={"epoch_slots": 1.5}), "must be a non-negative integer"),
        (document(params={"epoch_slots": 0}), "epoch_slots must be at least 1"),
        (document(params={"referral_permille": 1001}), "referral_permille is at most 1000"),
        (document(params={"delivery_ratio_permille": 1001}), "delivery_ratio_permille is at most 1000"),
        (document(params={"proposer_timeout_ms": 0}), "proposer_timeout_ms must be at least 1"),
        (document(params={"deploy_threshold": 3}), "a threshold of 3 out of 7"),
        (document(params={"committee_seats": 65, "committee_threshold": 40}), "out of 65 seats"),
        (document(time_ms=None), "time_ms must be"),
        (document(time_ms=-1), "time_ms must be"),
        (document(time_ms="now"), "time_ms must be"),
        (document(treasury_kai=1000), "treasury_kai must be text"),
        (document(treasury_kai="-1"), "not an amount"),
        (document(treasury_kai="9"), "hold KAI for all points"),
        (document(allocations={}), "allocations a list"),
        (document(allocations=[1]), "an allocation must be an object"),
        (document(allocations=[{"account": ACCOUNT, "kai": "1"}]), "unknown key 'kai'"),
        (document(allocations=[{"account": ACCOUNT[1:], "balance_kai": "1"}]), "account must be text"),
        (document(allocations=[{"account": ACCOUNT}, {"account": ACCOUNT}]), "two allocations"),
    ],
)
def test_what_is_wrong_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message) as caught:
        genesis_state(wrong)
    assert caught.value.hint
