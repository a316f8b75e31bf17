"""A node says that it is there: what it says passes validation, at start, in time, and when its situation changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from kaisar_p2p.wire.crypto import KeyPair
from kaisar_p2p.wire.verdict import Verdict
from protocols.actions import Action, BlockApplied, Publish, Wake
from protocols.adverts import CPU_CLASS, Heartbeat, Spec, WorkerAdvert, validate_advert, validate_heartbeat
from protocols.genesis import Genesis, genesis_state, write_genesis
from protocols.interpreter.calls import CLIENT, PROVIDER
from protocols.interpreter.state import (
    ACTIVE,
    ORDER_CLOSED,
    ORDER_OPEN,
    REGISTERED,
    RETIRED,
    MachineState,
    OrderState,
    State,
    WorkerState,
)
from protocols.params import KAI
from protocols.presence import Presence, free_of

KEYS, OWNER = KeyPair.from_seed(b"\x05" * 32), b"\x06" * 32
SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 2, 0, "")
EMPTY = genesis_state(write_genesis(Genesis("test", "demo", 0)))
INTERVAL_S = EMPTY.params.advert_interval_ms / 1000
NOW = 1_800_000_000.0
ADDRS = ("/ip4/127.0.0.1/tcp/4001",)


def order(cpu_cores: int = 2, **changes: Any) -> OrderState:
    made = OrderState(
        client=OWNER, client_key=OWNER, worker=KEYS.public_key, worker_owner=OWNER, spec_hash=bytes(32),
        resources=Spec(0, cpu_cores, 1_000, 10_000, 1, 0, ""), offer_hash=bytes(32), price_planck_per_hour=1,
        duration_s=60, escrow_planck=1, locked_planck=1, points_planck=0, placed_block=1, placed_ms=1, seats=(),
        threshold=1,
    )  # fmt: skip
    return replace(made, **changes)


def state_with(status: int = ACTIVE, *orders: OrderState, spec: Spec = SPEC) -> State:
    worker = WorkerState(OWNER, spec, KAI, 50 * KAI, status, 0, 0)
    return replace(
        EMPTY,
        number=1,
        machines=Map({KEYS.public_key: MachineState(OWNER, PROVIDER, 0)}),
        workers=Map({KEYS.public_key: worker}) if status else Map(),
        orders=Map({bytes([n]) * 32: each for n, each in enumerate(orders)}),
    )


def presence(runtime: str = "process") -> Presence:
    return Presence(KEYS, OWNER, PROVIDER, lambda: ADDRS, runtime)


def told(actions: list[Action], state: State, now: float = NOW) -> dict[str, Any]:
    """What was published, after the validation that every peer does."""
    found: dict[str, Any] = {}
    for action in actions:
        assert isinstance(action, Publish)
        validate: Any = {"advert": validate_advert, "heartbeat": validate_heartbeat}[action.topic]
        verdict, reason, message = validate(action.payload, now, state)
        assert verdict is Verdict.ACCEPT, reason
        found[action.topic] = message.message
    return found


def test_a_worker_says_what_is_free() -> None:
    state = state_with(ACTIVE, order(2), order(1))
    found = told(presence().step(BlockApplied(state, ()), NOW), state)
    advert = found["advert"]
    assert isinstance(advert, WorkerAdvert)
    assert (advert.worker, advert.owner, advert.addrs, advert.runtime) == (KEYS.public_key, OWNER, ADDRS, "process")
    assert (advert.spec, advert.leases, advert.workload_permille) == (SPEC, 2, 375)
    assert advert.free == replace(SPEC, cpu_cores=5, memory_mb=14_000, disk_mb=80_000, gpus=0)
    assert found["heartbeat"] == Heartbeat(KEYS.public_key, int(NOW * 1000), PROVIDER, 375, 2)


@pytest.mark.parametrize(("status", "runtime"), [(0, "process"), (RETIRED, "process"), (ACTIVE, "")])
def test_who_offers_nothing_sends_heartbeats_only(status: int, runtime: str) -> None:
    """A worker that runs without its role has no runtime: an advert of it would count as misbehaviour."""
    state = state_with(status)
    assert list(told(presence(runtime).step(BlockApplied(state, ()), NOW), state)) == ["heartbeat"]


def test_nothing_while_catching_up() -> None:
    machine = presence()
    assert machine.step(BlockApplied(state_with(), (), live=False), NOW) == []
    assert machine.deadline is None
    assert machine.step(Wake(), NOW) == []
    assert machine.step(BlockApplied(state_with(), ()), NOW) != []


def test_it_repeats_in_time_and_not_before() -> None:
    machine, state = presence(), state_with()
    assert machine.step(BlockApplied(state, ()), NOW)
    assert machine.deadline == NOW + INTERVAL_S
    assert machine.step(BlockApplied(state, ()), NOW + INTERVAL_S / 2) == []
    assert machine.step(Wake(), NOW + INTERVAL_S / 2) == []
    later = NOW + INTERVAL_S
    found = told(machine.step(Wake(), later), state, later)
    assert found["advert"].issued_ms == int(later * 1000)
    assert machine.deadline == later + INTERVAL_S
    assert machine.step(BlockApplied(state, ()), later + INTERVAL_S) != []  # the block comes before the timer


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (state_with(REGISTERED), state_with(ACTIVE)),
        (state_with(ACTIVE), state_with(ACTIVE, order())),
        (state_with(ACTIVE, order()), state_with(ACTIVE, order(status=ORDER_CLOSED))),
        (state_with(ACTIVE), state_with(RETIRED)),
        (state_with(0), state_with(REGISTERED)),
    ],
)
def test_a_change_on_the_ledger_is_told_at_once(before: State, after: State) -> None:
    machine = presence()
    assert machine.step(BlockApplied(before, ()), NOW)
    assert machine.step(BlockApplied(after, ()), NOW + 0.5)
    assert machine.step(BlockApplied(after, ()), NOW + 1.0) == []


def test_other_addresses_are_told_with_the_next_block() -> None:
    addrs = [ADDRS]
    machine = Presence(KEYS, OWNER, PROVIDER, lambda: addrs[0], "process")
    state = state_with(ACTIVE)
    assert machine.step(BlockApplied(state, ()), NOW)
    addrs[0] = ("/ip4/192.0.2.77/tcp/4001",)
    assert told(machine.step(BlockApplied(state, ()), NOW + 0.5), state, NOW + 0.5)["advert"].addrs == addrs[0]
    assert machine.step(BlockApplied(state, ()), NOW + 1.0) == []


def test_the_orders_of_others_change_nothing() -> None:
    machine = presence()
    assert machine.step(BlockApplied(state_with(), ()), NOW)
    assert machine.step(BlockApplied(state_with(ACTIVE, order(worker=OWNER)), ()), NOW + 0.5) == []


def test_a_worker_of_no_cores_is_idle() -> None:
    state = state_with(spec=replace(SPEC, cpu_cores=0))
    assert told(presence().step(BlockApplied(state, ()), NOW), state)["advert"].workload_permille == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12))
def test_what_is_free_is_never_negative_and_always_passes(orders: list[tuple[int, bool]]) -> None:
    made = [order(cores, status=ORDER_OPEN if is_open else ORDER_CLOSED) for cores, is_open in orders]
    state = state_with(ACTIVE, *made)
    taken = sum(each.resources.cpu_cores for each in made if each.status != ORDER_CLOSED)
    assert free_of(state, KEYS.public_key, SPEC).cpu_cores == max(0, SPEC.cpu_cores - taken)
    told(presence().step(BlockApplied(state, ()), NOW), state)


def test_a_machine_with_many_addresses_names_eight() -> None:
    many = tuple(f"/ip4/127.0.0.1/tcp/{port}" for port in range(4001, 4021))
    machine = Presence(KEYS, OWNER, CLIENT, lambda: many, "docker")
    state = state_with()
    assert told(machine.step(BlockApplied(state, ()), NOW), state)["advert"].addrs == many[:8]
