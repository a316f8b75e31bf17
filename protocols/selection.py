"""Whom a client asks for an offer: a draw that anybody can repeat, weighted by certified score, price and latency.

Everything is integers, and the seed is the order's nonce with a beacon that the client does not choose, so that neither
the client nor a worker can bend the draw unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kaisar_p2p.wire.crypto import domain_hash
from kaisar_p2p.wire.money import planck_to_kai
from protocols.adverts import Spec, WorkerAdvert, fits
from protocols.interpreter.state import ACTIVE, State
from protocols.params import PERMILLE

UNKNOWN_LATENCY_MS = 150
LATENCY_UNIT_MS = 50
"""A worker this far away gets half the weight of one next door."""
_NOTHING: Mapping[bytes, int] = {}


def match(spec: Spec, advert: WorkerAdvert) -> bool:
    """Whether what the worker says is free covers `spec`; an empty GPU model, and class 0, mean any."""
    return fits(spec, advert.free)


def choose(
    adverts: Iterable[WorkerAdvert],
    spec: Spec,
    max_price_planck_per_hour: int,
    nonce: bytes,
    beacon: bytes,
    state: State,
    *,
    scores_permille: Mapping[bytes, int] = _NOTHING,
    latencies_ms: Mapping[bytes, int] = _NOTHING,
) -> list[WorkerAdvert]:
    """All workers that may serve, in the order in which to ask them; the same on every machine for the same arguments.

    Args:
        adverts: valid adverts, in any order.
        spec: resources asked for.
        max_price_planck_per_hour: dearer workers are left out.
        nonce: 32 bytes of the order.
        beacon: 32 bytes that the client did not choose, usually of the current slot.
        state: the ledger; only workers that are active there are asked.
        scores_permille: certified score of a worker, 0 to 1000; 1 for those that are not in it.
        latencies_ms: measured round trips; UNKNOWN_LATENCY_MS for those that are not in it.
    """
    able = [advert for advert in adverts if _active(advert, state) and match(spec, advert)]
    able = [advert for advert in able if advert.price_planck_per_hour <= max_price_planck_per_hour]
    cheapest = min((advert.price_planck_per_hour for advert in able), default=0)
    weights = {
        advert.worker: _weight(advert, cheapest, scores_permille.get(advert.worker, 1), latencies_ms) for advert in able
    }
    pool = sorted({advert.worker: advert for advert in able}.values(), key=lambda advert: advert.worker)
    chosen: list[WorkerAdvert] = []
    while pool:
        seed = domain_hash("kaisar/choose", state.network, nonce, beacon, len(chosen).to_bytes(4, "little"))
        point = int.from_bytes(seed, "little") % sum(weights[advert.worker] for advert in pool)
        chosen.append(pool.pop(_index_of(point, [weights[advert.worker] for advert in pool])))
    return chosen


def _index_of(point: int, weights: list[int]) -> int:
    for index, weight in enumerate(weights):
        if point < weight:
            return index
        point -= weight
    raise AssertionError("a point beyond the sum of the weights")


def _weight(advert: WorkerAdvert, cheapest: int, score_permille: int, latencies_ms: Mapping[bytes, int]) -> int:
    """Score × relative price × nearness, each up to a thousand; at least 1, so that nobody is left out for ever."""
    price = PERMILLE * max(1, cheapest) // max(1, advert.price_planck_per_hour)
    latency_ms = max(0, latencies_ms.get(advert.worker, UNKNOWN_LATENCY_MS))
    near = PERMILLE * LATENCY_UNIT_MS // (LATENCY_UNIT_MS + latency_ms)
    return max(1, min(max(1, score_permille), PERMILLE) * price * near)


def why_nobody(adverts: Iterable[WorkerAdvert], spec: Spec, max_price_planck_per_hour: int, state: State) -> str:
    """Why no worker can serve the order, for people; "" if one can."""
    known = list(adverts)
    active = [advert for advert in known if _active(advert, state)]
    if not active:
        return "no worker is active" if not known else "no worker that was heard of is certified yet"
    large = [advert for advert in active if fits(spec, advert.spec)]
    if not large:
        return _what_is_missing(active, spec)
    free = [advert for advert in large if match(spec, advert)]
    if not free:
        return f"all {len(large)} workers that are large enough are busy"
    cheapest = min(advert.price_planck_per_hour for advert in free)
    if cheapest > max_price_planck_per_hour:
        asked, most = planck_to_kai(cheapest), planck_to_kai(max_price_planck_per_hour)
        return f"the cheapest worker asks {asked} KAI per hour, more than {most}"
    return ""


def _what_is_missing(active: list[WorkerAdvert], spec: Spec) -> str:
    specs = [advert.spec for advert in active]
    for name, unit in (
        ("gpus", "GPUs"),
        ("cpu_cores", "CPU cores"),
        ("memory_mb", "MB of memory"),
        ("disk_mb", "MB of disk"),
    ):
        wanted, most = getattr(spec, name), max(getattr(each, name) for each in specs)
        if wanted > most:
            return f"no worker has {wanted} {unit}; the largest has {most}"
    if spec.gpus and spec.gpu_model and all(each.gpu_model != spec.gpu_model for each in specs):
        return f"no worker has the GPU model {spec.gpu_model}"
    return "no single worker has all that is asked for"


def _active(advert: WorkerAdvert, state: State) -> bool:
    worker = state.workers.get(advert.worker)
    return worker is not None and worker.status == ACTIVE
