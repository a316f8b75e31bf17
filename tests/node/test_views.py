"""Views: pure functions of state and index that JSON can carry."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from immutables import Map

from kaisar_p2p.wire.money import kai_to_planck
from node import views
from node.store import NodeEvent
from protocols.deploy import CANCELLED, COMPLETED, DEGRADED, ENDED, FAILED, OPEN, RUNNING, LeaseEvent
from protocols.interpreter import calls
from protocols.interpreter.state import ORDER_CLOSED, MachineState
from protocols.lease_client import ClientLease
from protocols.orders import Workload
from protocols.params import KAI
from protocols.quorum import QuorumCertificate, ReadyCore, TicketCore, VerdictCore
from tests.node.conftest import KEY, NOW_S, ORDER, OWNER, STRANGER, WORKER


@pytest.fixture
def state(sample: Any) -> Any:
    return sample.state


@pytest.fixture
def index(sample: Any) -> Any:
    return sample.index


def test_every_view_is_json_with_exact_amounts(state: Any, index: Any) -> None:
    everything = [
        views.chain_view(state), views.totals_view(state), views.account_view(state, OWNER),
        views.workers_view(state, index, NOW_S), views.checks_view(index), views.epochs_view(state),
        views.orders_view(state, index, None, KEY), views.leases_view(state, index, KEY),
        views.registration_view([], None), views.event_view(NodeEvent(1, 2, "lease", {"order": "x"})),
    ]  # fmt: skip
    assert json.loads(json.dumps(everything)) == everything
    _check_amounts(everything)


def _check_amounts(value: object) -> None:
    if isinstance(value, list):
        for item in value:
            _check_amounts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_amounts(item)
            if name.endswith("_kai"):
                assert str(kai_to_planck(item)) == value[name.removesuffix("_kai") + "_planck"]


@pytest.mark.parametrize(
    ("roles", "announced", "named"),
    [
        (calls.CLIENT, True, ["bootstrap"]),
        (calls.CLIENT, False, ["client"]),
        (calls.PROVIDER, True, ["bootstrap", "provider"]),
        (None, True, ["bootstrap"]),
        (None, False, []),
    ],
)
def test_who_introduces_peers_is_named_so(state: Any, roles: int | None, announced: bool, named: list[str]) -> None:
    key = b"\x77" * 32
    machines = state.machines if roles is None else state.machines.set(key, MachineState(OWNER, roles, 1))
    bootstrap = Map({key: ("/ip4/192.0.2.1/tcp/4001",)}) if announced else Map()
    assert views.peer_roles(replace(state, machines=machines, bootstrap=bootstrap), key) == named


def test_an_account_that_was_never_seen_has_nothing(state: Any) -> None:
    view = views.account_view(state, b"\x55" * 32)
    assert (view["balance_kai"], view["licences"], view["machines"]) == ("0", 0, [])


def test_an_account_with_everything(state: Any) -> None:
    view = views.account_view(state, OWNER)
    assert view["unbonding"] == [{"amount_kai": "1", "amount_planck": str(KAI), "due_epoch": 9}]
    assert view["machines"] == [{"key": KEY.hex(), "roles": ["checker", "client"], "bound_block": 3}]


def test_a_worker_whose_advert_expired_is_offline(state: Any, index: Any) -> None:
    late_s = NOW_S + state.params.advert_ttl_ms / 1000
    [worker] = views.workers_view(state, index, late_s)
    assert (worker["online"], worker["advert"]) == (False, None)


def test_a_worker_that_nobody_checked_has_no_score(state: Any, index: Any) -> None:
    index.certificates.clear()
    [worker] = views.workers_view(state, index, NOW_S)
    assert (worker["checks"], worker["score_permille"], worker["last_verdict"]) == (0, None, None)


def test_a_check_counts_once_however_many_aggregators_certify_it(index: Any) -> None:
    newest, oldest = views.checks_view(index)
    assert (newest["slot"], newest["signatures"], newest["verdict"]) == (4, 3, "LATE")
    assert (oldest["slot"], oldest["verdict"]) == (3, "PASS")
    assert views.checks_view(index, KEY) == []
    assert len(views.checks_view(index, WORKER, 1)) == 1


# ── the state of a lease ─────────────────────────────────────────────────────────────────────────────────────────────


def event(sequence: int, state: int, outcome: int = OPEN, reason: str = "") -> LeaseEvent:
    return LeaseEvent(ORDER, WORKER, sequence, state, outcome, reason, "", 0, 8080)


def certified(*cores: Any) -> deque[Any]:
    return deque((0.0, QuorumCertificate(core, 1, (bytes(64),))) for core in cores)


TICKET, READY = TicketCore(ORDER, WORKER, KEY, bytes(32)), ReadyCore(ORDER, WORKER)


@pytest.mark.parametrize(
    ("events", "cores", "expected"),
    [
        ([], [], ("PLACED", "open", "")),
        ([], [VerdictCore(0, 1, WORKER, bytes(32), 1)], ("PLACED", "open", "")),
        ([], [TICKET], ("AUTHORISED", "open", "")),
        ([event(1, 3)], [TICKET], ("DEPLOYING", "open", "")),
        ([event(1, 3)], [TICKET, READY], ("RUNNING", "open", "")),
        ([event(2, RUNNING), event(1, 3)], [], ("RUNNING", "open", "")),
        ([event(1, RUNNING), event(2, DEGRADED, OPEN, "slow")], [], ("DEGRADED", "open", "slow")),
        ([event(1, RUNNING), event(2, ENDED, FAILED, "exited")], [READY], ("ENDED", "failed", "exited")),
    ],
)
def test_the_state_of_an_open_order(
    state: Any, index: Any, events: list[LeaseEvent], cores: list[Any], expected: tuple[str, str, str]
) -> None:
    index.lease_events[ORDER] = deque(events)
    index.certificates = certified(*cores)
    assert views.lease_state(ORDER, state.orders[ORDER], index) == expected


def test_after_a_restart_the_node_remembers_its_own_orders(state: Any, index: Any) -> None:
    """Nobody gossips again what it has told: what the client stored, and the ledger, are all there is."""
    order = state.orders[ORDER]
    index.lease_events.clear()
    assert views.lease_state(ORDER, replace(order, paid_seconds=0), index) == ("PLACED", "open", "")
    assert views.lease_state(ORDER, replace(order, paid_seconds=9), index) == ("RUNNING", "open", "")
    assert views.announced_port(ORDER, index) == 0
    own = ClientLease(ORDER, order, workload=Workload("", ("serve",), (), (8081, 1)), state=DEGRADED, reason="slow")
    index.own_lease = {ORDER: own}.get
    assert views.lease_state(ORDER, order, index) == ("DEGRADED", "open", "slow")
    assert views.announced_port(ORDER, index) == 8081


def test_the_ledger_has_the_last_word_on_the_end(state: Any, index: Any) -> None:
    closed = replace(state.orders[ORDER], status=ORDER_CLOSED, outcome=COMPLETED)
    assert views.lease_state(ORDER, closed, index) == ("ENDED", "completed", "closed")
    index.lease_events[ORDER] = deque([event(1, ENDED, CANCELLED, "cancelled")])
    assert views.lease_state(ORDER, replace(closed, outcome=0), index) == ("ENDED", "cancelled", "cancelled")


def test_a_port_is_the_one_that_the_worker_announced(index: Any) -> None:
    assert views.announced_port(ORDER, index) == 8080
    assert views.announced_port(b"\x00" * 32, index) == 0


def test_orders_are_newest_first_and_only_ones_own(state: Any, index: Any) -> None:
    older = replace(state.orders[ORDER], placed_block=1)
    foreign = replace(older, client=STRANGER, client_key=b"\x66" * 32, worker=b"\x67" * 32)
    orders = Map({ORDER: state.orders[ORDER], b"\x01" * 32: older, b"\x02" * 32: foreign})
    state = replace(state, orders=orders)
    assert [view["order"][:2] for view in views.orders_view(state, index, OWNER, KEY)] == ["ab", "01"]
    assert len(views.orders_view(state, index, None, KEY)) == 3
    assert [view["side"] for view in views.leases_view(state, index, WORKER)] == ["worker", "worker"]
