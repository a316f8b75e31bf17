"""What selfish providers, colluding checkers and cheating clients try, and what it gets them: nothing."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from immutables import Map

from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import KeyPair
from protocols.adverts import CPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.deploy import UP
from protocols.due import is_grand_slot, may_be_checked, wins_standby_draw
from protocols.epoch_body import GENESIS, assemble
from protocols.interpreter.state import ACTIVE, ORDER_CLOSED, REGISTERED, MachineState, OrderState, State, WorkerState
from protocols.params import DEMO, KAI
from protocols.popw import PASS, recheck_slots
from protocols.quorum import QuorumCertificate, VerdictCore, WitnessCore
from protocols.recheck import MAX_RECHECKS, may_have_been_checked

PARAMS = replace(DEMO, slot_blocks=2, epoch_slots=40, block_ms=1000, deploy_timeout_ms=4_000, standby_check_permille=50)
NETWORK = sha256(b"network").digest()
SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 0, 0, "")
CHECKERS = {
    keys.public_key: keys for keys in (KeyPair.from_seed(sha256(b"checker %d" % index).digest()) for index in range(4))
}
WORKER, ORDER = sha256(b"worker").digest(), sha256(b"order").digest()
SLOTS = range(PARAMS.epoch_slots)


def state_of(worker: WorkerState, **order: int) -> State:
    """The end of epoch 0; the order was placed in slot 10, for ten seconds, which are five windows."""
    seats = tuple(sorted(CHECKERS))
    placed = OrderState(b"c" * 32, b"k" * 32, WORKER, b"p" * 32, b"", SPEC, b"", KAI, 10, 0, 0, 0, 20, 0, seats, 3)
    return State(
        NETWORK,
        PARAMS,
        number=PARAMS.epoch_blocks - 1,
        machines=Map({key: MachineState(sha256(key).digest(), 2, 0) for key in CHECKERS}),
        workers=Map({WORKER: worker}),
        orders=Map({ORDER: replace(placed, **order)}),
        registries=Map({0: tuple(sorted((key, 100 * KAI) for key in CHECKERS))}),
        mixes=Map({0: sha256(b"mix").digest()}),
        beacons=Map({slot: sha256(b"beacon %d" % slot).digest() for slot in SLOTS}),
    )


def worker_of(status: int = ACTIVE, registered: int = 0, activated: int = 1) -> WorkerState:
    return WorkerState(b"p" * 32, SPEC, KAI, 50 * KAI, status, registered, activated)


def signed(core: VerdictCore | WitnessCore, seats: tuple[bytes, ...]) -> QuorumCertificate:
    signatures = tuple(CHECKERS[key].sign(core.DOMAIN, NETWORK, encode(core)) for key in seats)
    return QuorumCertificate(core, (1 << len(seats)) - 1, signatures)


def counted(state: State, certificates: list[QuorumCertificate]) -> list[int]:
    """Slots of the certificates that a body takes, although the whole committee signed all of them."""
    return [each.core.slot for each in assemble(state, GENESIS, [], certificates).certificates]


def passes(state: State) -> list[QuorumCertificate]:
    cores = [VerdictCore(0, slot, WORKER, bytes(32), PASS) for slot in SLOTS]
    return [signed(core, check_committee(state, core.slot, WORKER).seats) for core in cores]


def ups(state: State) -> list[QuorumCertificate]:
    return [signed(WitnessCore(ORDER, WORKER, slot, UP), state.orders[ORDER].seats) for slot in SLOTS]


# ── certificates about what nobody was to look at ────────────────────────────────────────────────────────────────────


def test_windows_before_and_after_a_lease_do_not_count() -> None:
    """A committee that was drawn once cannot vouch for its worker for ever."""
    state = state_of(worker_of())
    last = 10 + 2 + 5 + PARAMS.certificate_grace_slots  # placement, deploy timeout, duration
    assert counted(state, ups(state)) == list(range(10, last + 1))


@pytest.mark.parametrize("status", [2, ORDER_CLOSED])
def test_windows_after_the_end_of_an_order_do_not_count(status: int) -> None:
    state = state_of(worker_of(), status=status, ended_block=2 * 13 + 1)
    assert counted(state, ups(state)) == [10, 11, 12, 13]


def test_checks_before_the_registration_do_not_count() -> None:
    """A key that is made after the beacon can have any committee."""
    state = state_of(worker_of(REGISTERED, registered=41, activated=0))
    assert counted(state, passes(state)) == list(range(21, 40))


def test_checks_that_were_not_due_do_not_count() -> None:
    """Otherwise a third of the checkers would get a friendly committee in some slot of every epoch."""
    state = state_of(worker_of())
    step = recheck_slots(PARAMS)
    due = [
        slot
        for slot in SLOTS[1:]
        if is_grand_slot(state, slot) or wins_standby_draw(state, state.beacons[slot], WORKER)
    ]
    possible = {slot + step * again for slot in due for again in range(MAX_RECHECKS + 1)}
    assert 0 < len(due) < 10
    found = counted(state, passes(state))
    assert found == [slot for slot in SLOTS if slot in possible]
    assert not may_have_been_checked(state, 0, WORKER)


def test_an_activation_ends_the_time_in_which_every_slot_is_due() -> None:
    state = state_of(worker_of(registered=0, activated=12))
    found = counted(state, passes(state))
    assert found[:5] == [1, 2, 3, 4, 5]
    assert len(found) < 30


# ── orders that hide a worker from its checks ────────────────────────────────────────────────────────────────────────


def checked(slot: int, **order: int) -> bool:
    """Whether an active worker with one order that is not settled is checked at the start of `slot`."""
    state = state_of(worker_of(), **order)
    state = replace(state, number=2 * slot, time_ms=2000 * slot, open_orders=Map({WORKER: (ORDER,)}))
    return may_be_checked(state, slot, WORKER)


def test_a_running_order_spares_its_worker_until_its_time_is_over() -> None:
    over = 10 + 2 + 5  # placement, deploy timeout, duration
    assert [slot for slot in range(10, 30) if not checked(slot, placed_ms=20_000)] == list(range(10, over + 2))


@pytest.mark.parametrize("ended_block", [24, 25])
def test_a_cancelled_order_that_nobody_settles_hides_nobody(ended_block: int) -> None:
    """Placing and cancelling is free: it must neither spare a worker its checks, nor keep it from earning."""
    found = [checked(slot, placed_ms=20_000, status=2, ended_block=ended_block) for slot in (13, 14, 15)]
    assert found == [False, True, True]
