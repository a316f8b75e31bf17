"""What a node knows, as JSON-able dictionaries for the API and the pages. Pure: state and index in, dictionaries out.

Keys and hashes are hexadecimal, accounts also SS58. Every amount comes twice: `…_kai` as decimal text for people,
`…_planck` as exact text for programs (a planck amount does not fit in a JSON number).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from kaisar_p2p.identity import ss58_encode
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import sha256
from kaisar_p2p.wire.money import planck_to_kai
from node.index import Index
from node.store import NodeEvent
from protocols.adverts import Spec, WorkerAdvert
from protocols.deploy import (
    AUTHORISED,
    DEPLOYING,
    ENDED,
    OPEN,
    OUTCOME_NAMES,
    PLACED,
    RUNNING,
    STATE_NAMES,
    LeaseEvent,
)
from protocols.interpreter.state import (
    ACTIVE,
    ORDER_CANCELLED,
    ORDER_CLOSED,
    ORDER_OPEN,
    REGISTERED,
    RETIRED,
    AccountState,
    Anchor,
    OrderState,
    State,
    WorkerState,
)
from protocols.onboarding import REGISTRATION_STEPS
from protocols.params import PERMILLE
from protocols.popw import PASS, VERDICT_NAMES
from protocols.quorum import QuorumCertificate, ReadyCore, TicketCore, VerdictCore

View = dict[str, Any]

ROLE_BITS = ((1, "provider"), (2, "checker"), (4, "client"))
WORKER_STATUS = {REGISTERED: "registered", ACTIVE: "active", RETIRED: "retired"}
ORDER_STATUS = {ORDER_OPEN: "open", ORDER_CANCELLED: "cancelled", ORDER_CLOSED: "closed"}


def amount(name: str, planck: int) -> View:
    """An amount under two names: `<name>_kai` and `<name>_planck`."""
    return {f"{name}_kai": planck_to_kai(planck), f"{name}_planck": str(planck)}


def spec_view(spec: Spec) -> View:
    """Resources of a worker or an order."""
    return asdict(spec)


def chain_view(state: State) -> View:
    """Where the ledger stands, and how the network's time is cut."""
    params = state.params
    return {
        "network": state.network.hex(),
        "block": state.number,
        "block_hash": state.block_hash.hex(),
        "block_time_ms": state.time_ms,
        "slot": state.slot,
        "epoch": state.epoch,
        "last_anchor": state.last_anchor,
        "slot_ms": params.slot_ms,
        "epoch_slots": params.epoch_slots,
        "checkers": len(state.registries.get(state.epoch, ())),
        "workers": sum(worker.status == ACTIVE for worker in state.workers.values()),
        "open_orders": sum(order.status == ORDER_OPEN for order in state.orders.values()),
    }


def totals_view(state: State) -> View:
    """Where all KAI is that is not with an account."""
    totals = state.totals
    return {
        **amount("issued", totals.issued_planck),
        **amount("treasury", totals.treasury_planck),
        **amount("burnt", totals.burnt_planck),
        **amount("reward_pool", totals.reward_pool_planck),
    }


# ── accounts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def account_view(state: State, account: bytes) -> View:
    """One owner; an account that the ledger has never seen has nothing."""
    known = state.accounts.get(account, AccountState())
    machines = [_machine_view(key, state) for key, one in sorted(state.machines.items()) if one.owner == account]
    return {
        "address": ss58_encode(account),
        "account": account.hex(),
        **amount("balance", known.balance_planck),
        **amount("points", known.points_planck),
        **amount("stake", known.stake_planck),
        **amount("claimed", known.claimed_planck),
        "licences": known.licences,
        "unbonding": [
            {**amount("amount", each.amount_planck), "due_epoch": each.due_epoch} for each in known.unbonding
        ],
        "machines": machines,
    }


def _machine_view(key: bytes, state: State) -> View:
    machine = state.machines[key]
    return {"key": key.hex(), "roles": role_names(machine.roles), "bound_block": machine.bound_block}


def role_names(bits: int) -> list[str]:
    """The words for a bit set of roles."""
    return [name for bit, name in ROLE_BITS if bits & bit]


def peer_roles(state: State, key: bytes) -> list[str]:
    """What a machine does; one with a bootstrap record introduces peers, and is bound as a client if that is all."""
    machine = state.machines.get(key)
    names = role_names(machine.roles) if machine is not None else []
    if key not in state.bootstrap:
        return names
    return ["bootstrap", *(names if names != ["client"] else [])]


# ── workers and their checks ─────────────────────────────────────────────────────────────────────────────────────────


def workers_view(state: State, index: Index, now: float) -> list[View]:
    """All registered workers by key, with what their checks certified and what they advertise now."""
    live = {advert.worker: advert for advert in index.live_adverts(now, state.params.advert_ttl_ms)}
    verdicts = _verdicts(index)
    return [
        worker_view(key, worker, live.get(key), verdicts.get(key, ())) for key, worker in sorted(state.workers.items())
    ]


def worker_view(key: bytes, worker: WorkerState, advert: WorkerAdvert | None, verdicts: Iterable[VerdictCore]) -> View:
    """One worker. `score_permille` is the part of its certified checks that passed, as far as this node has heard."""
    cores = list(verdicts)
    passed = sum(core.verdict == PASS for core in cores)
    last = max(cores, key=lambda core: core.slot, default=None)
    return {
        "worker": key.hex(),
        "owner": ss58_encode(worker.owner),
        "status": WORKER_STATUS[worker.status],
        **amount("price_per_hour", worker.price_planck_per_hour),
        **amount("bond", worker.bond_planck),
        "spec": spec_view(worker.spec),
        "registered_block": worker.registered_block,
        "activated_block": worker.activated_block,
        "checks": len(cores),
        "checks_passed": passed,
        "score_permille": passed * PERMILLE // len(cores) if cores else None,
        "last_verdict": VERDICT_NAMES[last.verdict] if last else None,
        "last_verdict_slot": last.slot if last else None,
        "online": advert is not None,
        "advert": _advert_view(advert) if advert else None,
    }


def _advert_view(advert: WorkerAdvert) -> View:
    return {
        "issued_ms": advert.issued_ms,
        "addrs": list(advert.addrs),
        "free": spec_view(advert.free),
        **amount("price_per_hour", advert.price_planck_per_hour),
        "workload_permille": advert.workload_permille,
        "leases": advert.leases,
        "runtime": advert.runtime,
    }


def _verdicts(index: Index) -> dict[bytes, list[VerdictCore]]:
    found: dict[bytes, dict[int, VerdictCore]] = {}
    for _, certificate in index.certificates:
        core = certificate.core
        if isinstance(core, VerdictCore):
            found.setdefault(core.worker, {})[core.slot] = core
    return {worker: list(by_slot.values()) for worker, by_slot in found.items()}


def checks_view(index: Index, worker: bytes | None = None, limit: int = 100) -> list[View]:
    """Verdict certificates, newest first; several of one check (as other aggregators made them) count once."""
    seen: set[tuple[int, bytes]] = set()
    views: list[View] = []
    for received_at, certificate in reversed(index.certificates):
        core = certificate.core
        if not isinstance(core, VerdictCore) or worker not in (None, core.worker):
            continue
        if (core.slot, core.worker) in seen:
            continue
        seen.add((core.slot, core.worker))
        views.append(_check_view(received_at, certificate, core))
        if len(views) >= limit:
            break
    return views


def _check_view(received_at: float, certificate: QuorumCertificate, core: VerdictCore) -> View:
    encoded = encode(certificate)
    return {
        "epoch": core.epoch,
        "slot": core.slot,
        "worker": core.worker.hex(),
        "verdict": VERDICT_NAMES.get(core.verdict, "?"),
        "commit": core.commit.hex(),
        "signatures": len(certificate.signatures),
        "received_ms": int(received_at * 1000),
        "certificate": sha256(encoded).hex(),
        "certificate_bytes": len(encoded),
    }


# ── epochs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def epochs_view(state: State, limit: int = 100) -> list[View]:
    """Anchored epochs, newest first."""
    return [_epoch_view(state.anchors[epoch]) for epoch in sorted(state.anchors, reverse=True)[:limit]]


def _epoch_view(anchor: Anchor) -> View:
    header = anchor.header
    return {
        "epoch": header.epoch,
        "round": header.round,
        "first_slot": header.first_slot,
        "last_slot": header.last_slot,
        "header_hash": anchor.header_hash.hex(),
        "previous": header.previous.hex(),
        "verdicts": header.verdicts,
        "rewards": header.rewards,
        "leases": header.leases,
        "evidence": header.evidence,
        **amount("minted", header.minted_planck),
        "signed_stake_planck": str(anchor.signed_stake),
        "total_stake_planck": str(anchor.total_stake),
        "anchor_block": anchor.block,
        "anchor_bytes": anchor.anchor_bytes,
    }


# ── orders and leases ────────────────────────────────────────────────────────────────────────────────────────────────


def lease_state(order_id: bytes, order: OrderState, index: Index) -> tuple[str, str, str]:
    """(state, outcome, reason) of a lease, as far as this node has heard; the ledger's word on its end comes first."""
    events = sorted(index.lease_events.get(order_id, ()), key=lambda event: event.sequence)
    last: LeaseEvent | None = events[-1] if events else None
    ended = order.status != ORDER_OPEN or (last is not None and last.state == ENDED)
    if ended:
        outcome = order.outcome or (last.outcome if last is not None and last.state == ENDED else OPEN)
        reason = last.reason if last is not None and last.state == ENDED else ORDER_STATUS[order.status]
        return STATE_NAMES[ENDED], OUTCOME_NAMES.get(outcome, "?"), reason
    certified = {type(c.core) for _, c in index.certificates if getattr(c.core, "order_id", None) == order_id}
    if last is not None and last.state >= RUNNING:
        return STATE_NAMES[last.state], OUTCOME_NAMES[OPEN], last.reason
    own = index.own_lease(order_id)
    if own is not None and own.state >= RUNNING:
        return STATE_NAMES[own.state], OUTCOME_NAMES.get(own.outcome, "?"), own.reason
    if ReadyCore in certified or order.paid_seconds:
        return STATE_NAMES[RUNNING], OUTCOME_NAMES[OPEN], ""
    if last is not None:
        return STATE_NAMES.get(last.state, STATE_NAMES[DEPLOYING]), OUTCOME_NAMES[OPEN], last.reason
    return STATE_NAMES[AUTHORISED if TicketCore in certified else PLACED], OUTCOME_NAMES[OPEN], ""


def order_view(order_id: bytes, order: OrderState, index: Index) -> View:
    """One order: its money as the ledger has it, its lease as this node has heard."""
    state, outcome, reason = lease_state(order_id, order, index)
    return {
        "order": order_id.hex(),
        "status": ORDER_STATUS[order.status],
        "state": state,
        "outcome": outcome,
        "reason": reason,
        "client": ss58_encode(order.client),
        "client_key": order.client_key.hex(),
        "worker": order.worker.hex(),
        "worker_owner": ss58_encode(order.worker_owner),
        "resources": spec_view(order.resources),
        "duration_s": order.duration_s,
        **amount("price_per_hour", order.price_planck_per_hour),
        **amount("locked", order.locked_planck),
        **amount("escrow", order.escrow_planck),
        **amount("points", order.points_planck),
        **amount("paid", order.paid_planck),
        **amount("refunded", order.refunded_planck),
        **amount("refunded_points", order.refunded_points),
        **amount("penalty", order.penalty_planck),
        "paid_seconds": order.paid_seconds,
        "placed_block": order.placed_block,
        "placed_ms": order.placed_ms,
        "ended_block": order.ended_block,
        "committee": [key.hex() for key in order.seats],
        "threshold": order.threshold,
    }


def orders_view(state: State, index: Index, account: bytes | None, key: bytes) -> list[View]:
    """Orders that an account placed or that run on machine `key`, newest first; all orders when `account` is None."""
    mine = [
        (order_id, order)
        for order_id, order in state.orders.items()
        if account is None or account == order.client or key in (order.client_key, order.worker)
    ]
    mine.sort(key=lambda pair: (-pair[1].placed_block, pair[0]))
    return [order_view(order_id, order, index) for order_id, order in mine]


def leases_view(state: State, index: Index, key: bytes) -> list[View]:
    """Leases that this machine uses or serves: its orders with their life so far."""
    views = []
    for order_id, order in state.orders.items():
        if key not in (order.client_key, order.worker):
            continue
        view = order_view(order_id, order, index)
        view["side"] = "client" if key == order.client_key else "worker"
        view["events"] = [lease_event_view(event) for event in index.lease_events.get(order_id, ())]
        views.append(view)
    return sorted(views, key=lambda view: (-view["placed_block"], view["order"]))


def announced_port(order_id: bytes, index: Index) -> int:
    """The program's first port, as its worker announced it or as we ordered it; 0 when it has none or is unknown."""
    announced = max((event.port for event in index.lease_events.get(order_id, ())), default=0)
    own = index.own_lease(order_id)
    ordered = own.workload.ports if own is not None and own.workload is not None else ()
    return announced or (ordered[0] if ordered else 0)


def lease_event_view(event: LeaseEvent) -> View:
    """What a worker said about a lease."""
    return {
        "sequence": event.sequence,
        "state": STATE_NAMES.get(event.state, "?"),
        "outcome": OUTCOME_NAMES.get(event.outcome, "?"),
        "reason": event.reason,
        "text": event.text,
        "at_ms": event.at_ms,
        "port": event.port,
    }


# ── the node's own events ────────────────────────────────────────────────────────────────────────────────────────────


def event_view(event: NodeEvent) -> View:
    """One line of the node's event list."""
    return {"id": event.id, "at_ms": event.at_ms, "kind": event.kind, "data": event.data}


def registration_view(events: Iterable[NodeEvent], worker: WorkerState | None) -> View:
    """The ten steps of a provider's registration; the newest report of a step wins."""
    reports = {event.data.get("step"): event for event in events if event.kind == "registration"}
    steps = []
    for number, name in enumerate(REGISTRATION_STEPS, start=1):
        report = reports.get(number)
        steps.append(
            {
                "step": number,
                "name": name,
                "done": report is not None,
                "text": str(report.data.get("text", "")) if report else "",
                "at_ms": report.at_ms if report else None,
            }
        )
    return {"status": WORKER_STATUS[worker.status] if worker else "unregistered", "steps": steps}
