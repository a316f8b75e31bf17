"""Who earns what in an epoch. Integers only: every member of the committee must come to the same planck.

The network's formulas (docs.kaisar.io), with times in milliseconds and factors in permille, because only ratios of
scores matter:

* worker: (uptime + job time · Wj) · (1 + stake / largest stake) · hardware. The uptime part shares the proof-of-compute
  pool, the job-time part the proof-of-delivery pool.
* checker: work · stake · (1 − error rate), where work is the number of verdict certificates that hold its signature.

Shares are rounded down; what is left over, and a pool that nobody has a claim on, is not minted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protocols.adverts import GPU_CLASS, Spec
from protocols.committees import check_committee
from protocols.deploy import GONE, UP
from protocols.epochs import MAX_LEAVES, RewardLeaf
from protocols.interpreter.state import ACTIVE, State, WorkerState
from protocols.params import PERMILLE, Params
from protocols.popw import PASS
from protocols.quorum import QuorumCertificate, VerdictCore, WitnessCore

CPU_WEIGHT, GPU_WEIGHT, DISK_WEIGHT, MEMORY_WEIGHT = 1, 3, 1, 1
JOB_TIME_WEIGHT = 3
PROVEN_GPU_PERMILLE = 250
"""GPU score that a PASS proves: the lowest row of the network's GPU table (GTX 1080 to RTX 4070).

All workers of a network run the same job, so a certificate says "at least this fast" and no more. What a machine claims
to be never raises its score; neither does bandwidth, which no certificate measures.
"""
LOWEST_TIER_PERMILLE = 200
"""Cores, memory and disk: no certificate measures them yet, so whatever a worker claims counts as the lowest tier."""

Scores = dict[bytes, int]
"""Score by account."""


def checker_score(work: int, stake: int, error_permille: int) -> int:
    """Work · stake · (1 − error rate): 50 certificates, stake 2 and 10 % errors make 90."""
    return work * stake * max(0, PERMILLE - error_permille) // PERMILLE


def hardware_permille(spec: Spec) -> int:
    """The hardware term of a worker whose registration was certified: only what a certificate measured raises it."""
    gpu = PROVEN_GPU_PERMILLE if spec.device_class == GPU_CLASS and spec.gpus else 0
    return LOWEST_TIER_PERMILLE * (CPU_WEIGHT + DISK_WEIGHT + MEMORY_WEIGHT) + gpu * GPU_WEIGHT


@dataclass(frozen=True)
class Pools:
    """A body's reward in planck: for checkers, for uptime (proof of compute), for leases (proof of delivery)."""

    checkers: int
    compute: int
    delivery: int

    @classmethod
    def of(cls, params: Params, epochs: int) -> Pools:
        """Split the reward of so many epochs by the network's parameters; the three always add up to it."""
        total = params.epoch_reward_planck * epochs
        checkers = total * params.checker_share_permille // PERMILLE
        providers = total - checkers
        delivery = providers * params.delivery_ratio_permille // PERMILLE
        return cls(checkers, providers - delivery, delivery)


def share(total_planck: int, scores: Mapping[bytes, int]) -> dict[bytes, int]:
    """Each account's part of a pool in proportion to its score, rounded down; nothing when nobody has a score."""
    everything = sum(scores.values())
    if everything <= 0:
        return {}
    return {account: total_planck * score // everything for account, score in scores.items()}


def epoch_rewards(
    state: State,
    epoch: int,
    slots: range,
    certificates: Iterable[QuorumCertificate],
    lease_seconds: Mapping[bytes, int],
) -> dict[bytes, int]:
    """What each owner account earned, in planck; the sum is never above `epoch_reward_planck` for each epoch covered.

    An epoch of which nothing was certified mints nothing: who is there after a long stop is not paid for all of it.

    Args:
        state: at the end of the epoch.
        epoch: whose registry the checkers' stakes are read from.
        slots: those that the body covers: of one epoch, or of several when the last ones were never anchored.
        certificates: those that count, already verified, in any order.
        lease_seconds: newly witnessed seconds by order id.
    """
    certificates = tuple(certificates)
    seen = {_slot_of(certificate) for certificate in certificates}
    pools = Pools.of(state.params, len({state.params.epoch_of_slot(slot) for slot in seen if slot in slots}))
    compute, delivery = worker_scores(state, slots, certificates, lease_seconds)
    earned: Counter[bytes] = Counter()
    earned.update(share(pools.checkers, checker_scores(state, epoch, certificates)))
    earned.update(share(pools.compute, compute))
    earned.update(share(pools.delivery, delivery))
    return {account: amount for account, amount in earned.items() if amount > 0}


def _slot_of(certificate: QuorumCertificate) -> int:
    core = certificate.core
    return core.slot if isinstance(core, VerdictCore | WitnessCore) else -1


def cumulative_leaves(previous: Iterable[RewardLeaf], earned: Mapping[bytes, int]) -> tuple[RewardLeaf, ...]:
    """The reward tree's leaves, sorted by account: what was earned before, plus this epoch's.

    Once MAX_LEAVES accounts have leaves, nobody gets a first one; those who earned most come before.
    """
    totals = Counter({leaf.account: leaf.cumulative_planck for leaf in previous})
    newcomers = sorted(earned.keys() - totals.keys(), key=lambda account: (-earned[account], account))
    refused = frozenset(newcomers[max(0, MAX_LEAVES - len(totals)) :])
    totals.update({account: amount for account, amount in earned.items() if account not in refused})
    return tuple(RewardLeaf(account, totals[account]) for account in sorted(totals))


def checker_scores(state: State, epoch: int, certificates: Iterable[QuorumCertificate]) -> Scores:
    """Scores of the checkers' owners.

    Only signatures in a certificate count. Who voted with a minority cannot be told from who was absent, so the error
    rate is zero here: a wrong vote earns nothing, and what it costs is decided on evidence.
    """
    work: Counter[bytes] = Counter()
    for certificate in certificates:
        core = certificate.core
        if isinstance(core, VerdictCore):
            committee = check_committee(state, core.slot, core.worker)
            seats = committee.seats if committee else ()
            work.update(key for seat, key in enumerate(seats) if certificate.mask >> seat & 1)
    stakes = dict(state.registries.get(epoch, ()))
    scores: Counter[bytes] = Counter()
    for key, count in work.items():
        machine = state.machines.get(key)
        if machine is not None:
            scores[machine.owner] += checker_score(count, stakes.get(key, 0), 0)
    return dict(scores)


def worker_scores(
    state: State, slots: range, certificates: Iterable[QuorumCertificate], lease_seconds: Mapping[bytes, int]
) -> tuple[Scores, Scores]:
    """(uptime scores, job-time scores) of the workers' owners.

    Only workers that are active at the end have any: who is paid to the end of the epoch must still be there then.
    """
    job_ms = _job_ms(state, lease_seconds)
    largest = max((worker.bond_planck for worker in state.workers.values()), default=0)
    compute: Counter[bytes] = Counter()
    delivery: Counter[bytes] = Counter()
    active = {key: worker for key, worker in state.workers.items() if worker.status == ACTIVE}
    since = {key: state.params.slot_of(worker.activated_block) + 1 for key, worker in active.items()}
    for key, (good, bad) in _windows(certificates, since).items():
        worker = active[key]
        factor = (largest + worker.bond_planck or 1) * hardware_permille(worker.spec)
        compute[worker.owner] += _uptime_ms(worker, slots, good, bad, state.params) * factor
        delivery[worker.owner] += job_ms.get(key, 0) * JOB_TIME_WEIGHT * factor
    return dict(compute), dict(delivery)


def _windows(certificates: Iterable[QuorumCertificate], since: Mapping[bytes, int]) -> dict[bytes, tuple[int, int]]:
    """Slots in which each worker was certified as present (PASS, UP), and slots in which it only failed.

    `since` has the workers that count, and their first slot: a registration's checks say nothing about the time after.
    """
    good: dict[bytes, set[int]] = {}
    bad: dict[bytes, set[int]] = {}
    for certificate in certificates:
        core = certificate.core
        if not isinstance(core, VerdictCore | WitnessCore) or core.slot < since.get(core.worker, core.slot + 1):
            continue
        if isinstance(core, VerdictCore):
            (good if core.verdict == PASS else bad).setdefault(core.worker, set()).add(core.slot)
        elif core.status in (UP, GONE):
            # DOWN says that the worker is there and the tenant's program is not, which the tenant can bring about.
            (good if core.status == UP else bad).setdefault(core.worker, set()).add(core.slot)
    nothing: set[int] = set()
    return {
        worker: (len(good.get(worker, nothing)), len(bad.get(worker, nothing) - good.get(worker, nothing)))
        for worker in good.keys() | bad.keys()
    }


def _uptime_ms(worker: WorkerState, slots: range, good: int, bad: int, params: Params) -> int:
    """The time since it was activated, times the part of its observed slots in which it was there."""
    since = max(slots.start, params.slot_of(worker.activated_block))
    return max(0, slots.stop - since) * params.slot_ms * good // (good + bad)


def _job_ms(state: State, lease_seconds: Mapping[bytes, int]) -> dict[bytes, int]:
    """Newly witnessed lease time by worker; renting from oneself earns nothing: it would mint for no service."""
    times: Counter[bytes] = Counter()
    for order_id, seconds in lease_seconds.items():
        order = state.orders.get(order_id)
        if order is not None and order.client != order.worker_owner:
            times[order.worker] += seconds * 1000
    return dict(times)
