"""Rewards: the network's formulas, and what must hold for any input."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from protocols import rewards
from protocols.adverts import CPU_CLASS, GPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.deploy import DOWN, GONE, UP
from protocols.epochs import RewardLeaf
from protocols.interpreter.state import ACTIVE, REGISTERED, RETIRED, MachineState, OrderState, State, WorkerState
from protocols.params import DEMO, KAI
from protocols.popw import LATE, PASS
from protocols.quorum import QuorumCertificate, VerdictCore, WitnessCore
from protocols.rewards import (
    Pools,
    checker_score,
    checker_scores,
    cumulative_leaves,
    epoch_rewards,
    hardware_permille,
    share,
    worker_scores,
)

PARAMS = replace(DEMO, epoch_slots=4, slot_blocks=2, block_ms=1000)
EPOCH = 2
SLOTS = range(8, 12)
CPU = Spec(CPU_CLASS, 8, 16 * 1024, 100 * 1024, 0, 0, "")
amounts = st.integers(0, 10**30)


def name(text: str) -> bytes:
    return sha256(text.encode()).digest()


def state_of(stakes: dict[str, int], workers: dict[str, WorkerState] | None = None, **orders: OrderState) -> State:
    registry = tuple(sorted((name(key), stake) for key, stake in stakes.items()))
    return State(
        name("network"),
        PARAMS,
        number=SLOTS.stop * PARAMS.slot_blocks - 1,
        machines=Map({name(key): MachineState(name(f"owner of {key}"), 2, 0) for key in stakes}),
        workers=Map({name(key): worker for key, worker in (workers or {}).items()}),
        orders=Map({name(key): order for key, order in orders.items()}),
        registries=Map({EPOCH: registry}),
        beacons=Map({slot: name(f"beacon {slot}") for slot in SLOTS}),
    )


def worker_of(
    owner: str, spec: Spec = CPU, bond: int = 50 * KAI, status: int = ACTIVE, activated: int = 1
) -> WorkerState:
    return WorkerState(name(owner), spec, KAI, bond, status, 0, activated)


def order_of(worker: str, client: str, owner: str) -> OrderState:
    return OrderState(
        name(client), name(client), name(worker), name(owner), b"", CPU, b"", KAI, 60, 0, 0, 0, 16, 0, (), 1
    )


def verdict(worker: str, slot: int, verdict: int = PASS, mask: int = 1) -> QuorumCertificate:
    return QuorumCertificate(VerdictCore(EPOCH, slot, name(worker), bytes(32), verdict), mask, ())


def witness(order: str, worker: str, slot: int, status: int = UP) -> QuorumCertificate:
    return QuorumCertificate(WitnessCore(name(order), name(worker), slot, status), 1, ())


# ── formulas ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_worked_example_of_the_network() -> None:
    assert checker_score(50, 2, 100) == 90


@pytest.mark.parametrize(
    ("spec", "permille"),
    [
        (Spec(CPU_CLASS, 8, 16 * 1024, 100 * 1024, 0, 0, ""), 200 + 200 + 200),
        (Spec(CPU_CLASS, 65_535, 2**32 - 1, 2**32 - 1, 0, 0, ""), 200 + 200 + 200),
        (Spec(GPU_CLASS, 8, 16 * 1024, 100 * 1024, 1, 24_000, "RTX 4090"), 600 + 3 * 250),
        (Spec(GPU_CLASS, 65_535, 2**32 - 1, 2**32 - 1, 255, 80_000, "H100 SXM"), 600 + 3 * 250),
    ],
)
def test_what_no_certificate_measured_scores_its_lowest_tier(spec: Spec, permille: int) -> None:
    assert hardware_permille(spec) == permille


def test_a_claimed_model_changes_nothing() -> None:
    spec = Spec(GPU_CLASS, 8, 16 * 1024, 100 * 1024, 1, 80_000, "RTX 3060")
    assert hardware_permille(replace(spec, gpu_model="H100 SXM")) == hardware_permille(spec)


def test_a_worker_is_paid_for_the_time_in_which_it_was_seen() -> None:
    state = state_of({"c": KAI}, {"good": worker_of("a"), "half": worker_of("b"), "late": worker_of("c", activated=20)})
    certificates = [verdict("good", 8), verdict("half", 8), verdict("half", 9, LATE), verdict("late", 11)]
    compute, delivery = worker_scores(state, SLOTS, certificates, {})
    assert compute[name("a")] == 2 * compute[name("b")] == 2 * compute[name("c")]
    assert not any(delivery.values())


def test_a_worker_that_only_failed_or_is_not_certified_gets_nothing() -> None:
    state = state_of({"c": KAI}, {"bad": worker_of("a"), "new": worker_of("b", status=REGISTERED)})
    compute, _ = worker_scores(state, SLOTS, [verdict("bad", 8, LATE), verdict("new", 8)], {})
    assert not any(compute.values())


def test_a_worker_that_left_before_the_end_is_not_paid_for_the_rest() -> None:
    """Otherwise one card would register, pass and retire under many names, each of them paid for the whole epoch."""
    state = state_of({"c": KAI}, {"left": worker_of("a", bond=0, status=RETIRED), "stays": worker_of("b")})
    compute, _ = worker_scores(state, SLOTS, [verdict("left", 8), verdict("stays", 8)], {})
    assert compute.get(name("a"), 0) == 0 < compute[name("b")]


def test_checks_up_to_the_activation_say_nothing_about_the_time_after_it() -> None:
    """Activated in slot 9: neither the failed attempts nor the pass that ended them count."""
    state = state_of({"c": KAI}, {"w": worker_of("a", activated=18), "gone": worker_of("b", activated=18)})
    tries = [verdict("w", 8, LATE), verdict("w", 9), verdict("w", 10), verdict("gone", 9), verdict("gone", 10, LATE)]
    compute, _ = worker_scores(state, SLOTS, tries, {})
    always, _ = worker_scores(state, SLOTS, [verdict("w", 10)], {})
    assert compute[name("a")] == always[name("a")] > 0
    assert compute[name("b")] == 0


def test_windows_of_a_lease_count_as_uptime_and_its_seconds_as_delivery() -> None:
    order = order_of("w", "client", "a")
    state = state_of({"c": KAI}, {"w": worker_of("a"), "idle": worker_of("b")}, order=order)
    certificates = [witness("order", "w", 8), witness("order", "w", 9, GONE), verdict("idle", 8)]
    compute, delivery = worker_scores(state, SLOTS, certificates, {name("order"): 2})
    assert 2 * compute[name("a")] == compute[name("b")]
    assert delivery[name("a")] > 0
    assert delivery.get(name("b"), 0) == 0


def test_a_window_in_which_only_the_program_was_down_is_not_the_workers_absence() -> None:
    order = order_of("w", "client", "a")
    state = state_of({"c": KAI}, {"w": worker_of("a"), "idle": worker_of("b")}, order=order)
    certificates = [witness("order", "w", 8), witness("order", "w", 9, DOWN), verdict("idle", 8)]
    compute, _ = worker_scores(state, SLOTS, certificates, {})
    assert compute[name("a")] == compute[name("b")]
    assert not any(worker_scores(state, SLOTS, [witness("order", "w", 9, DOWN)], {})[0].values())


def test_renting_from_oneself_delivers_nothing() -> None:
    state = state_of({"c": KAI}, {"w": worker_of("a")}, order=order_of("w", "a", "a"))
    _, delivery = worker_scores(state, SLOTS, [witness("order", "w", 8)], {name("order"): 2})
    assert not any(delivery.values())


def test_a_larger_bond_weighs_up_to_twice() -> None:
    state = state_of({"c": KAI}, {"w": worker_of("a", bond=100), "v": worker_of("b", bond=0)})
    compute, _ = worker_scores(state, SLOTS, [verdict("w", 8), verdict("v", 8)], {})
    assert compute[name("a")] == 2 * compute[name("b")]


def test_only_checkers_in_the_mask_score() -> None:
    state = state_of({"x": 10, "y": 20, "z": 30}, {"w": worker_of("a")})
    seats = check_committee(state, 8, name("w")).seats
    scores = checker_scores(state, EPOCH, [verdict("w", 8, mask=0b011)])
    stakes = dict(state.registries[EPOCH])
    owners = {key: state.machines[key].owner for key in seats}
    assert scores == {owners[seat]: stakes[seat] for seat in seats[:2]}


# ── for any input ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 10**24), st.dictionaries(st.binary(min_size=1, max_size=3), amounts, max_size=20))
def test_shares_never_exceed_the_pool_and_lose_less_than_one_each(total: int, scores: dict[bytes, int]) -> None:
    shares = share(total, scores)
    assert sum(shares.values()) <= total
    if sum(scores.values()):
        assert total - sum(shares.values()) < max(1, len(scores))


@given(st.integers(1, 10**24), amounts, amounts, st.integers(1, 10**30))
def test_more_score_never_means_less(total: int, own: int, rest: int, more: int) -> None:
    before = share(total, {b"a": own, b"b": rest}).get(b"a", 0)
    assert share(total, {b"a": own + more, b"b": rest})[b"a"] >= before


@given(st.integers(0, 10**24), st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 5))
def test_pools_add_up(total: int, checkers: int, ratio: int, epochs: int) -> None:
    params = replace(PARAMS, epoch_reward_planck=total, checker_share_permille=checkers, delivery_ratio_permille=ratio)
    pools = Pools.of(params, epochs)
    assert pools.checkers + pools.compute + pools.delivery == total * epochs
    assert min(pools.checkers, pools.compute, pools.delivery) >= 0


epochs = st.fixed_dictionaries(
    {
        "stakes": st.lists(st.integers(1, 10**24), min_size=1, max_size=6),
        "bonds": st.lists(st.integers(0, 10**21), min_size=1, max_size=4),
        "checks": st.lists(
            st.tuples(
                st.integers(0, 3), st.sampled_from(list(SLOTS)), st.sampled_from([PASS, LATE]), st.integers(1, 63)
            ),
            max_size=20,
            unique_by=lambda check: check[:2],
        ),
        "windows": st.lists(st.sampled_from(list(SLOTS)), unique=True),
    }
)


def epoch_of(drawn: dict) -> tuple[State, list[QuorumCertificate], dict[bytes, int]]:
    workers = {f"w{index}": worker_of(f"p{index}", bond=bond) for index, bond in enumerate(drawn["bonds"])}
    stakes = {f"c{index}": stake for index, stake in enumerate(drawn["stakes"])}
    state = state_of(stakes, workers, order=order_of("w0", "client", "p0"))
    certificates = [verdict(f"w{each}", slot, outcome, mask) for each, slot, outcome, mask in drawn["checks"]]
    certificates += [witness("order", "w0", slot) for slot in drawn["windows"]]
    return state, certificates, {name("order"): 2 * len(drawn["windows"])}


@given(epochs, st.randoms(use_true_random=False))
def test_an_epoch_never_mints_above_its_reward_and_order_does_not_matter(drawn: dict, random: object) -> None:
    state, certificates, seconds = epoch_of(drawn)
    earned = epoch_rewards(state, EPOCH, SLOTS, certificates, seconds)
    assert sum(earned.values()) <= PARAMS.epoch_reward_planck
    assert all(amount > 0 for amount in earned.values())
    random.shuffle(certificates)
    assert epoch_rewards(state, EPOCH, SLOTS, certificates, seconds) == earned


def test_epochs_of_which_nothing_is_certified_mint_nothing() -> None:
    """Otherwise who is there after a long stop is paid for all of it: a third of the stake can bring one about."""
    state = state_of({"c": KAI}, {"w": worker_of("a")})
    state = replace(state, beacons=Map({slot: name(f"beacon {slot}") for slot in range(12)}))
    state = replace(state, registries=Map(dict.fromkeys(range(3), state.registries[EPOCH])))
    once = epoch_rewards(state, EPOCH, SLOTS, [verdict("w", 8)], {})
    assert epoch_rewards(state, EPOCH, range(12), [verdict("w", 8), verdict("w", 9)], {}) == once
    assert sum(epoch_rewards(state, EPOCH, range(12), [verdict("w", 8), verdict("w", 4)], {}).values()) > sum(
        once.values()
    )
    assert epoch_rewards(state, EPOCH, SLOTS, [verdict("w", 7)], {}) == {}


@given(epochs, st.integers(0, 5), st.integers(1, 10**24))
def test_more_stake_for_the_same_work_never_earns_less(drawn: dict, which: int, more: int) -> None:
    state, certificates, _ = epoch_of({**drawn, "bonds": [0]})
    key, stake = state.registries[EPOCH][which % len(drawn["stakes"])]
    owner = state.machines[key].owner
    work = checker_scores(state, EPOCH, certificates)
    before = share(10**20, work).get(owner, 0)
    after = {**work, owner: work.get(owner, 0) // stake * (stake + more)}
    assert share(10**20, after).get(owner, 0) >= before


@given(
    st.dictionaries(st.binary(min_size=32, max_size=32), amounts),
    st.dictionaries(st.binary(min_size=32, max_size=32), amounts),
)
def test_leaves_are_cumulative_sorted_and_lose_nobody(old: dict[bytes, int], new: dict[bytes, int]) -> None:
    previous = [RewardLeaf(account, amount) for account, amount in old.items()]
    leaves = cumulative_leaves(previous, new)
    assert [leaf.account for leaf in leaves] == sorted(old.keys() | new.keys())
    assert all(leaf.cumulative_planck == old.get(leaf.account, 0) + new.get(leaf.account, 0) for leaf in leaves)


def test_a_full_tree_of_rewards_takes_no_more_accounts_and_drops_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "MAX_LEAVES", 3)
    leaves = cumulative_leaves([RewardLeaf(b"a", 5), RewardLeaf(b"d", 1)], {b"a": 1, b"b": 2, b"c": 2, b"e": 1})
    assert leaves == (RewardLeaf(b"a", 6), RewardLeaf(b"b", 2), RewardLeaf(b"d", 1))
