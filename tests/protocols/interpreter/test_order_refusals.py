"""Every reason for which the rules of orders, leases and anchors refuse a call; a refused call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kaisar_p2p.wire import merkle
from protocols import deploy
from protocols.adverts import CPU_CLASS, GPU_CLASS, Spec
from protocols.epochs import LEASES, REWARDS, EpochCertificate, LeafProof, LeaseLeaf, RewardLeaf
from protocols.interpreter import anchors, calls, orders, proofs
from protocols.interpreter.events import CallIgnored
from protocols.orders import OrderSpec
from protocols.params import KAI

NOBODY = bytes(32)
STRANGER = bytes([9]) * 32
CASES: list[tuple[str, Callable]] = []


def refuses(reason: str) -> Callable[[Callable], Callable]:
    """The decorated function prepares a chain and returns (who calls, what)."""

    def register(case: Callable) -> Callable:
        CASES.append((reason, case))
        return case

    return register


# orders


@refuses("the offer is not a signed offer")
def _(chain):
    chain.add_worker()
    return "alice", replace(chain.place_call(), offer=b"no envelope")


@refuses("the offer is not a signed offer")
def _(chain):
    chain.add_worker()
    call = chain.place_call()
    return "alice", replace(call, offer=call.offer[:-1] + bytes([call.offer[-1] ^ 1]))


@refuses("the offer is not signed by its worker")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(signer="alice")


@refuses("no such worker")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(worker=chain.machine("bob"), signer="bob")


@refuses("the worker is not active")
def _(chain):
    chain.register()
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    return "alice", chain.place_call()


@refuses("the offer is for another specification")
def _(chain):
    chain.add_worker()
    call = chain.place_call()
    return "alice", replace(call, spec=replace(call.spec, workload_hash=STRANGER))


@refuses("the offer has expired")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(valid_until_ms=chain.state.time_ms)


@refuses("the offer was used already")
def _(chain):
    chain.add_worker()
    chain.place(7)
    return "alice", chain.place_call(7, price_planck_per_hour=10**18)


@refuses("the duration is out of bounds")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(spec=replace(chain.place_call().spec, duration_s=59))


@refuses("the duration is out of bounds")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(spec=replace(chain.place_call().spec, duration_s=90 * 86_400 + 1))


@refuses("an order needs at least a core and some memory")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(spec=OrderSpec(Spec(CPU_CLASS, 0, 1, 0, 0, 0, ""), 60, NOBODY))


@refuses("the worker's GPUs have less memory")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(spec=OrderSpec(Spec(GPU_CLASS, 1, 1, 0, 1, 80_000, ""), 60, NOBODY))


def _resources_case(spec: Spec) -> None:
    @refuses("the worker has not so much free")
    def _(chain):
        chain.add_worker()
        chain.place()
        return "alice", chain.place_call(2, spec=OrderSpec(spec, 60, NOBODY))


for _spec in (
    Spec(CPU_CLASS, 6, 1, 0, 0, 0, ""),
    Spec(CPU_CLASS, 1, 12_001, 0, 0, 0, ""),
    Spec(CPU_CLASS, 1, 1, 90_001, 0, 0, ""),
    Spec(GPU_CLASS, 1, 1, 0, 1, 0, ""),
):
    _resources_case(_spec)


@refuses("the worker has too many orders that are not settled")
def _(new_chain):
    chain = new_chain(max_open_orders=1)
    chain.add_worker()
    chain.do("alice", calls.OrderCancel(chain.place()))
    return chain, "alice", chain.place_call(2)


@refuses("escrow and points are not exactly the price of the duration")
def _(chain):
    chain.add_worker()
    call = chain.place_call()
    return "alice", replace(call, escrow_planck=call.escrow_planck + 1)


@refuses("escrow and points are not exactly the price of the duration")
def _(chain):
    chain.add_worker()
    call = chain.place_call(price_planck_per_hour=1)
    return "alice", replace(call, escrow_planck=0)


@refuses("not so many points")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(points_planck=1)


@refuses("no checker can watch over an order yet")
def _(chain):
    chain.add_worker()
    for index in range(4):
        chain.do(f"checker{index}", calls.StakeUnbond(100 * KAI))
    chain.until_epoch(chain.state.epoch + 1)
    return "alice", chain.place_call()


@refuses("no such order")
def _(chain):
    return "alice", calls.OrderCancel(NOBODY)


@refuses("the order is another account's")
def _(chain):
    chain.add_worker()
    return "bob", calls.OrderCancel(chain.place())


@refuses("the order is not open")
def _(chain):
    chain.add_worker()
    order_id = chain.place()
    chain.do("alice", calls.OrderCancel(order_id))
    return "alice", calls.OrderCancel(order_id)


@refuses("a price of nothing")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(price_planck_per_hour=0)


# leases


def _settle(chain, *leaves):
    epoch = chain.anchor(leases=leaves)
    return chain.proof(epoch, LEASES)


@refuses("no such order")
def _(chain):
    chain.add_checkers()
    return "bob", calls.LeaseSettle(_settle(chain, LeaseLeaf(NOBODY, 1, 1, deploy.OPEN)))


@refuses("the order is settled")
def _(chain):
    chain.add_worker()
    order_id = chain.place()
    chain.settle(order_id, 10, deploy.CANCELLED)
    return "bob", calls.LeaseSettle(_settle(chain, LeaseLeaf(order_id, 20, 1, deploy.COMPLETED)))


@refuses("no such outcome")
def _(chain):
    chain.add_worker()
    return "bob", calls.LeaseSettle(_settle(chain, LeaseLeaf(chain.place(), 20, 1, 5)))


@refuses("older than what was settled")
def _(chain):
    chain.add_worker()
    order_id = chain.place()
    chain.settle(order_id, 10, deploy.OPEN)
    return "bob", calls.LeaseSettle(_settle(chain, LeaseLeaf(order_id, 9, 1, deploy.CANCELLED)))


@refuses("nothing new to settle")
def _(chain):
    chain.add_worker()
    return "bob", calls.LeaseSettle(_settle(chain, LeaseLeaf(chain.place(), 0, 1, deploy.OPEN)))


@refuses("that epoch is not anchored")
def _(chain):
    return "bob", calls.LeaseSettle(LeafProof(0, LEASES, 0, b"", ()))


@refuses("a leaf of another tree")
def _(chain):
    chain.add_checkers()
    proof = _settle(chain, LeaseLeaf(NOBODY, 1, 1, deploy.OPEN))
    return "bob", calls.LeaseSettle(replace(proof, tree=REWARDS))


@refuses("the leaf is not in the anchored tree")
def _(chain):
    chain.add_checkers()
    proof = _settle(chain, LeaseLeaf(NOBODY, 1, 1, deploy.OPEN))
    return "bob", calls.LeaseSettle(replace(proof, leaf=proof.leaf + b"\0"))


@refuses("the leaf is malformed")
def _(chain):
    chain.add_checkers()
    return "bob", calls.LeaseSettle(_settle(chain, RewardLeaf(NOBODY, 1)))


# anchors


def _header(chain, **changes):
    """Checkers, and a header for the epoch that just ended."""
    chain.add_checkers()
    chain.until_epoch(chain.state.epoch + 1)
    return chain.header(**changes)


def _post(chain, **changes):
    header = _header(chain, **changes)
    return "carol", calls.AnchorPost(header, chain.certify(header))


@refuses("that epoch, or a later one, is anchored already")
def _(chain):
    chain.add_checkers()
    epoch = chain.anchor()
    header = chain.header(epoch=epoch)
    return "carol", calls.AnchorPost(header, chain.certify(header))


@refuses("that epoch is not over")
def _(chain):
    chain.add_checkers()
    header = chain.header(epoch=chain.state.epoch)
    return "carol", calls.AnchorPost(header, chain.certify(header))


@refuses("the header does not continue the last one")
def _(chain):
    return _post(chain, previous=STRANGER)


@refuses("the registry of that epoch is not known")
def _(chain):
    chain.until_epoch(2)
    header = chain.header()
    return "carol", calls.AnchorPost(header, chain.certify(header))


@refuses("the slots are not those of whole epochs")
def _(chain):
    return _post(chain, first_slot=1)


@refuses("the slots are not those of whole epochs")
def _(chain):
    return _post(chain, last_slot=99)


@refuses("the slots are not those since the last anchor")
def _(chain):
    chain.add_checkers()
    epoch = chain.anchor()
    chain.until_epoch(chain.state.epoch + 1)
    header = chain.header(first_slot=epoch * chain.params.epoch_slots)
    return "carol", calls.AnchorPost(header, chain.certify(header))


@refuses("the slots are not those since the last anchor")
def _(chain):
    return _post(chain, first_slot=40)


@refuses("another registry root")
def _(chain):
    return _post(chain, registry_root=merkle.EMPTY_ROOT)


@refuses("mints more than the reward of its epochs")
def _(chain):
    return _post(chain, minted_planck=100 * KAI + 1)


@refuses("signed by less than two thirds of the stake")
def _(chain):
    header = _header(chain)
    return "carol", calls.AnchorPost(header, chain.certify(header, signers=2))


@refuses("signed by less than two thirds of the stake")
def _(chain):
    header = _header(chain)
    certificate = chain.certify(header)
    wide = EpochCertificate(b"\x1f", (*certificate.signatures, certificate.signatures[0]))
    return "carol", calls.AnchorPost(header, wide)


@refuses("signed by less than two thirds of the stake")
def _(chain):
    header = _header(chain)
    return "carol", calls.AnchorPost(header, EpochCertificate(b"", ()))


@refuses("a signature of the certificate is wrong")
def _(chain):
    header = _header(chain)
    return "carol", calls.AnchorPost(replace(header, round=1), chain.certify(header))


@refuses("a signature of the certificate is wrong")
def _(chain):
    header = _header(chain)
    certificate = chain.certify(header)
    one = certificate.signatures[0]
    return "carol", calls.AnchorPost(header, replace(certificate, signatures=(one,) * 4))


@refuses("nothing left to claim")
def _(chain):
    chain.add_checkers()
    chain.claim("bob", 5, minted_planck=5)
    epoch = chain.anchor(rewards=(RewardLeaf(chain.owner("bob"), 4),))
    return "bob", calls.RewardClaim(chain.proof(epoch, REWARDS))


# ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("reason", "case"), CASES, ids=[f"{i}-{reason}" for i, (reason, _) in enumerate(CASES)])
def test_refused(reason, case, check_refusal):
    check_refusal(reason, case)


def test_an_order_id_cannot_come_twice(working):
    first = working.place()
    working._calls -= 1  # a ledger that repeats a call's hash
    outcome = working.run("alice", working.place_call(2))
    assert isinstance(outcome, CallIgnored) and outcome.reason == "the order exists already"
    assert working.order(first).status == 1


def test_every_reason_has_a_case(written_reasons):
    reasons = {reason for reason, _ in CASES} | {"the order exists already"}
    assert written_reasons(orders, anchors, proofs) <= reasons
