"""What each call does when it is allowed. (What is refused: test_refusals.py.)"""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocols import deploy
from protocols.committees import check_committee
from protocols.epochs import LEASES, LeaseLeaf
from protocols.interpreter import calls
from protocols.interpreter.apply import apply
from protocols.interpreter.audit import state_root
from protocols.interpreter.events import (
    Anchored,
    CallApplied,
    CallIgnored,
    EpochStarted,
    LeaseSettled,
    OrderEnded,
    OrderPlaced,
    RewardClaimed,
    SlotStarted,
    WorkerActivated,
    WorkerRegistered,
    WorkerRetired,
)
from protocols.interpreter.rounds import genesis_mix
from protocols.interpreter.state import ACTIVE, ORDER_CANCELLED, ORDER_CLOSED, ORDER_OPEN, RETIRED, Unbonding
from protocols.params import KAI

MINUTE_PLANCK = 36 * KAI // 60


# blocks


def test_a_block_must_continue_the_state(chain):
    chain.block()
    block = chain.blocks[-1]
    for wrong in (block, replace(block, number=1), replace(block, number=2, parent=block.hash)):
        with pytest.raises(ValueError, match="does not continue"):
            apply(chain.state, wrong)


def test_slots_and_epochs_start_with_their_first_block(chain):
    started = []
    for _ in range(9):
        started.append(tuple(event for event in chain.block() if isinstance(event, EpochStarted | SlotStarted)))
    assert started[0] == (EpochStarted(0), SlotStarted(0))
    assert started[1] == started[3] == started[5] == ()
    assert started[2] == (SlotStarted(1),)
    assert started[4] == (EpochStarted(1), SlotStarted(2))
    assert started[8] == (EpochStarted(2), SlotStarted(4))
    assert len({chain.state.beacons[slot] for slot in range(5)}) == 5
    assert set(chain.state.mixes.values()) == {genesis_mix(chain.state.network)}


def test_old_rounds_are_dropped(chain):
    chain.until_epoch(7)
    assert sorted(chain.state.registries) == sorted(chain.state.mixes) == [4, 5, 6, 7]
    assert sorted(chain.state.beacons) == [8, 9, 10, 11, 12, 13, 14]


def test_a_replay_gives_the_same_state(working, new_chain):
    working.place()
    other = new_chain()
    for block in working.blocks:
        other.state, _ = apply(other.state, block)
    assert other.state == working.state
    assert state_root(other.state) == state_root(working.state)


def test_the_state_root_sees_every_part(working):
    working.place()
    state = working.state
    roots = {state_root(state)}
    for changed in (
        replace(state, number=state.number + 1),
        replace(state, licences_sold=state.licences_sold + 1),
        replace(state, last_anchor=5),
        replace(state, totals=replace(state.totals, burnt_planck=1)),
        *(
            replace(state, **{part: getattr(state, part).delete(next(iter(getattr(state, part))))})
            for part in ("accounts", "machines", "workers", "orders", "open_orders", "used_offers", "registries")
        ),
    ):
        roots.add(state_root(changed))
    assert len(roots) == 12


# accounts


def test_transfer_moves_kai_to_a_new_account(chain):
    before = chain.account("alice").balance_planck
    outcome = chain.do("alice", calls.Transfer(bytes([7]) * 32, 3))
    assert outcome.call == "Transfer" and outcome.subject == bytes([7]) * 32
    assert chain.account("alice").balance_planck == before - 3
    assert chain.state.accounts[bytes([7]) * 32].balance_planck == 3


def test_licences_cost_their_price(chain):
    before, treasury = chain.account("alice").balance_planck, chain.state.totals.treasury_planck
    chain.do("alice", calls.LicenceBuy(3, bytes(32)))
    assert chain.account("alice").licences == chain.state.licences_sold == 3
    assert chain.account("alice").balance_planck == before - 300 * KAI
    assert chain.state.totals.treasury_planck == treasury + 300 * KAI


def test_a_referrer_gets_a_tenth(chain):
    before, treasury = chain.account("bob").balance_planck, chain.state.totals.treasury_planck
    chain.do("alice", calls.LicenceBuy(2, chain.owner("bob")))
    assert chain.account("bob").balance_planck == before + 20 * KAI
    assert chain.state.totals.treasury_planck == treasury + 180 * KAI


def test_stake_is_unbonded_after_its_epochs(chain):
    before = chain.account("alice").balance_planck
    chain.do("alice", calls.StakeBond(10))
    chain.do("alice", calls.StakeUnbond(3))
    chain.do("alice", calls.StakeUnbond(2))
    assert chain.account("alice").stake_planck == 5
    assert chain.account("alice").unbonding == (Unbonding(5, 2),)
    chain.until_epoch(1)
    chain.do("alice", calls.StakeUnbond(1))
    chain.until_epoch(2)
    chain.do("alice", calls.StakeWithdraw())
    assert chain.account("alice").unbonding == (Unbonding(1, 3),)
    assert chain.account("alice").balance_planck == before - 5


# machines and registries


def test_binding_again_changes_roles_and_keeps_the_block(chain):
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    first = chain.state.machines[chain.machine("alice")]
    chain.do("alice", chain.bind_call("alice", calls.CLIENT | calls.CHECKER))
    assert chain.state.machines[chain.machine("alice")] == replace(first, roles=calls.CLIENT | calls.CHECKER)


def test_the_registry_has_checkers_with_licence_and_stake(chain):
    chain.add_checkers(2)
    expected = sorted([(chain.machine("checker0"), 100 * KAI), (chain.machine("checker1"), 101 * KAI)])
    epoch = chain.state.epoch
    assert chain.state.registries[epoch] == tuple(expected)
    assert chain.state.registries[epoch - 1] == ()
    chain.do("checker1", calls.StakeUnbond(2 * KAI))
    assert chain.state.registries[epoch] == tuple(expected)
    chain.until_epoch(epoch + 1)
    assert chain.state.registries[epoch + 1] == ((chain.machine("checker0"), 100 * KAI),)


def test_a_second_machine_adds_no_seat(chain):
    chain.do("checker0", calls.LicenceBuy(1, bytes(32)))
    chain.do("checker0", calls.StakeBond(100 * KAI))
    chain.do("checker0", chain.bind_call("checker0", calls.CHECKER))
    chain.do("checker0", chain.bind_call("checker0", calls.CHECKER, machine="bob"))
    chain.until_epoch(chain.state.epoch + 1)
    assert chain.state.registries[chain.state.epoch] == ((chain.machine("checker0"), 100 * KAI),)


def test_no_licence_no_seat(chain):
    chain.do("checker0", calls.StakeBond(100 * KAI))
    chain.do("checker0", chain.bind_call("checker0", calls.CHECKER))
    chain.until_epoch(1)
    assert chain.state.registries[1] == ()


def test_addresses_are_published_once_each_and_taken_back(chain):
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    machine = chain.machine("alice")
    chain.do("alice", calls.BootstrapAnnounce(machine, ("/ip4/10.0.0.1/tcp/1", "/dns/x/tcp/2", "/dns/x/tcp/2")))
    assert chain.state.bootstrap[machine] == ("/ip4/10.0.0.1/tcp/1", "/dns/x/tcp/2")
    chain.do("alice", calls.BootstrapAnnounce(machine, ()))
    assert machine not in chain.state.bootstrap


# workers


def test_a_worker_registers_is_certified_and_retires(chain):
    chain.add_checkers()
    before, burnt = chain.account("provider").balance_planck, chain.state.totals.burnt_planck
    chain.register()
    worker = chain.machine("provider")
    assert WorkerRegistered(worker) in chain.events
    assert chain.account("provider").balance_planck == before - 51 * KAI
    assert chain.state.totals.burnt_planck == burnt + 1 * KAI
    slot = chain.state.slot + 1
    chain.blocks_until(lambda state: state.slot == slot)
    assert check_committee(chain.state, slot, worker).threshold == 3
    chain.do("bob", calls.WorkerActivate(chain.verdict(slot, signers=3)))
    assert WorkerActivated(worker) in chain.events
    assert chain.state.workers[worker].status == ACTIVE
    assert chain.state.workers[worker].activated_block == chain.state.number
    chain.do("provider", calls.WorkerRetire(worker))
    assert WorkerRetired(worker) in chain.events
    assert chain.state.workers[worker].status == RETIRED
    assert chain.account("provider").balance_planck == before - 1 * KAI
    chain.do("provider", chain.register_call())


# orders


def test_an_order_locks_its_price_and_draws_its_seats(working):
    before = working.account("alice").balance_planck
    order_id = working.place()
    assert OrderPlaced(order_id) in working.events
    order = working.order(order_id)
    assert order.status == ORDER_OPEN
    assert order.escrow_planck == order.locked_planck == MINUTE_PLANCK
    assert working.account("alice").balance_planck == before - MINUTE_PLANCK
    assert len(set(order.seats)) == 4 and order.threshold == 3
    assert order_id == working.blocks[-1].calls[0].call_hash
    assert working.state.open_orders[order.worker] == (order_id,)


def test_two_orders_have_other_seats_by_their_ids(working):
    seats = set()
    for nonce in range(2):
        seats.add(working.order(working.place(nonce)).seats)
    assert len(seats) == 2


def test_resources_are_free_again_when_the_time_is_over(working):
    working.place(1)
    working.place(2)
    assert isinstance(working.run("alice", working.place_call(3)), CallIgnored)
    end = working.state.time_ms + 65_000
    working.blocks_until(lambda state: state.time_ms >= end)
    working.place(4)


def test_cancelling_frees_resources_but_not_money(working):
    order_id = working.place()
    working.place(2)
    working.do("alice", calls.OrderCancel(order_id))
    assert OrderEnded(order_id) in working.events
    order = working.order(order_id)
    assert order.status == ORDER_CANCELLED and order.ended_block == working.state.number
    assert order.escrow_planck == MINUTE_PLANCK
    working.place(3)


def test_a_lease_that_never_ran_is_given_back_whole(working):
    before = working.account("alice")
    order_id = working.place()
    working.do("alice", calls.OrderCancel(order_id))
    working.settle(order_id, 0, deploy.CANCELLED)
    assert working.account("alice") == before
    order = working.order(order_id)
    assert order.status == ORDER_CLOSED and order.refunded_planck == MINUTE_PLANCK and order.escrow_planck == 0
    assert not working.state.open_orders
    settled = [event for event in working.events if isinstance(event, LeaseSettled)]
    assert settled == [LeaseSettled(order_id, 0, MINUTE_PLANCK, 0, True, 0)]


def test_a_failed_start_costs_the_worker_nothing(working):
    order_id = working.place()
    working.settle(order_id, 0, deploy.FAILED)
    assert working.state.workers[working.machine("provider")].bond_planck == 50 * KAI
    assert OrderEnded(order_id) in working.events


def test_witnessed_seconds_are_paid_and_the_rest_becomes_points(working):
    order_id = working.place()
    before, provider = working.account("alice"), working.account("provider").balance_planck
    treasury = working.state.totals.treasury_planck
    working.settle(order_id, 20, deploy.OPEN)
    assert working.account("provider").balance_planck == provider + MINUTE_PLANCK // 3
    assert working.order(order_id).escrow_planck == MINUTE_PLANCK * 2 // 3
    working.settle(order_id, 30, deploy.CANCELLED)
    assert working.account("provider").balance_planck == provider + MINUTE_PLANCK // 2
    assert working.account("alice").points_planck == MINUTE_PLANCK // 2
    assert working.account("alice").balance_planck == before.balance_planck
    assert working.state.totals.treasury_planck == treasury + MINUTE_PLANCK // 2


def test_the_rest_can_be_kai(new_chain):
    chain = new_chain(refund_as_points=0)
    chain.add_worker()
    before = chain.account("alice").balance_planck
    order_id = chain.place()
    chain.settle(order_id, 30, deploy.CANCELLED)
    assert chain.account("alice").balance_planck == before - MINUTE_PLANCK // 2
    assert chain.account("alice").points_planck == 0


def test_more_seconds_than_ordered_pay_no_more(working):
    order_id = working.place()
    provider = working.account("provider").balance_planck
    working.settle(order_id, 61, deploy.COMPLETED)
    assert working.account("provider").balance_planck == provider + MINUTE_PLANCK
    assert working.order(order_id).paid_seconds == 60
    assert working.account("alice").points_planck == 0


def test_points_pay_for_an_order_and_come_back_as_points(new_chain):
    chain = new_chain(points_planck=MINUTE_PLANCK)
    chain.add_worker()
    before, treasury = chain.account("alice"), chain.state.totals.treasury_planck
    order_id = chain.place(points_planck=MINUTE_PLANCK // 3)
    assert chain.account("alice").points_planck == MINUTE_PLANCK * 2 // 3
    assert chain.state.totals.treasury_planck == treasury - MINUTE_PLANCK // 3
    chain.settle(order_id, 0, deploy.FAILED)
    assert chain.account("alice") == before
    assert chain.state.totals.treasury_planck == treasury


def test_points_are_spent_first_and_never_become_kai(new_chain):
    chain = new_chain(points_planck=MINUTE_PLANCK, refund_as_points=0)
    chain.add_worker()
    before = chain.account("alice")
    order_id = chain.place(points_planck=MINUTE_PLANCK // 2)
    chain.settle(order_id, 15, deploy.CANCELLED)
    after = chain.account("alice")
    assert after.points_planck == before.points_planck - MINUTE_PLANCK // 4
    assert after.balance_planck == before.balance_planck


def test_a_worker_that_failed_pays_the_client_from_its_bond(new_chain):
    chain = new_chain(bond_planck=KAI)
    chain.add_worker()
    order_id = chain.place()
    before = chain.account("alice")
    chain.settle(order_id, 15, deploy.FAILED)
    assert chain.state.workers[chain.machine("provider")].bond_planck == KAI - KAI // 10
    assert chain.account("alice").balance_planck == before.balance_planck + KAI // 10
    assert chain.account("alice").points_planck == MINUTE_PLANCK * 3 // 4
    assert chain.order(order_id).penalty_planck == KAI // 10


@pytest.mark.parametrize(
    ("seconds", "outcome", "fault"),
    [
        (15, deploy.FAILED, 0),  # only the program was down, or nobody witnessed
        (0, deploy.FAILED, 1),  # it never ran
        (15, deploy.CANCELLED, 1),
        (15, deploy.EXPIRED, 1),
        (60, deploy.COMPLETED, 1),
    ],
)
def test_a_bond_pays_only_for_a_worker_that_was_certified_as_gone(new_chain, seconds, outcome, fault):
    chain = new_chain(bond_planck=KAI)
    chain.add_worker()
    order_id = chain.place()
    before = chain.account("alice")
    chain.settle(order_id, seconds, outcome, fault)
    assert chain.state.workers[chain.machine("provider")].bond_planck == KAI
    assert chain.order(order_id).penalty_planck == 0
    rest = MINUTE_PLANCK * (60 - seconds) // 60
    points = rest if seconds else 0  # what was paid and not used comes back all the same
    assert chain.account("alice").points_planck == before.points_planck + points
    assert chain.account("alice").balance_planck == before.balance_planck + rest - points


def test_the_penalty_is_no_more_than_what_was_lost(working):
    order_id = working.place()
    before = working.account("alice").balance_planck
    working.settle(order_id, 45, deploy.FAILED)
    assert working.account("alice").balance_planck == before + MINUTE_PLANCK // 4


def test_a_settled_lease_cannot_be_settled_again(working):
    order_id = working.place()
    epoch = working.anchor(leases=(LeaseLeaf(order_id, 10, 0, deploy.OPEN), LeaseLeaf(bytes(32), 0, 0, deploy.OPEN)))
    proof = calls.LeaseSettle(working.proof(epoch, LEASES))
    assert isinstance(working.run("bob", proof), CallApplied)
    state = working.state
    assert isinstance(working.run("bob", proof), CallIgnored)
    assert (working.state.accounts, working.state.orders) == (state.accounts, state.orders)


# anchors and rewards


def test_an_anchor_mints_into_the_pool_and_brings_the_mix(chain):
    chain.add_checkers()
    issued = chain.state.totals.issued_planck
    epoch = chain.anchor(minted_planck=100 * KAI)
    assert Anchored(epoch) in chain.events
    anchor = chain.state.anchors[epoch]
    assert chain.state.last_anchor == epoch and anchor.signed_stake == anchor.total_stake == 406 * KAI
    assert chain.state.totals.reward_pool_planck == 100 * KAI
    assert chain.state.totals.issued_planck == issued + 100 * KAI
    assert anchor.anchor_bytes == len(chain.blocks[-1].calls[0].payload)
    now = chain.state.epoch
    chain.until_epoch(now + 1)
    assert chain.state.mixes[now + 1] == anchor.header.mix != chain.state.mixes[now]


def test_a_header_may_cover_epochs_that_nobody_anchored(chain):
    chain.add_checkers()
    chain.anchor(first_slot=0, minted_planck=100 * KAI)
    first = chain.state.last_anchor
    chain.until_epoch(first + 4)
    epoch = chain.anchor(first_slot=(first + 1) * chain.params.epoch_slots, minted_planck=300 * KAI)
    assert epoch == first + 3
    assert chain.state.totals.reward_pool_planck == 400 * KAI


def test_two_thirds_of_the_stake_are_enough(new_chain):
    chain = new_chain()
    chain.add_checkers(3)
    header = chain.header(epoch=chain.state.epoch)
    stakes = [stake for _, stake in chain.state.registries[header.epoch]]
    chain.until_epoch(header.epoch + 1)
    enough = 3 * sum(stakes[:2]) >= 2 * sum(stakes)
    outcome = chain.run("carol", calls.AnchorPost(header, chain.certify(header, signers=2)))
    assert isinstance(outcome, CallApplied) == enough


def test_rewards_are_cumulative(chain):
    chain.add_checkers()
    before = chain.account("checker0").balance_planck
    chain.claim("checker0", 30 * KAI, minted_planck=50 * KAI)
    assert RewardClaimed(chain.owner("checker0"), 30 * KAI) in chain.events
    assert chain.account("checker0").balance_planck == before + 30 * KAI
    assert isinstance(chain.claim("checker0", 30 * KAI), CallIgnored)
    chain.claim("checker0", 45 * KAI)
    assert chain.account("checker0").claimed_planck == 45 * KAI
    chain.claim("checker0", 60 * KAI)
    assert chain.account("checker0").claimed_planck == 50 * KAI
    assert chain.state.totals.reward_pool_planck == 0
