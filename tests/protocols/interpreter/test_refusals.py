"""Every reason for which the ledger's rules refuse a call; a refused call changes nothing."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kaisar_p2p.wire import merkle
from protocols import deploy, popw
from protocols.adverts import CPU_CLASS, GPU_CLASS, Spec
from protocols.epochs import LEASES, REWARDS, EpochCertificate, LeafProof, LeaseLeaf, RewardLeaf
from protocols.interpreter import apply as rules
from protocols.interpreter import calls
from protocols.interpreter.events import CallIgnored
from protocols.orders import OrderSpec
from protocols.params import KAI
from protocols.quorum import QuorumCertificate, ReadyCore

CASES: dict[str, list[Callable]] = {}
NOBODY = bytes(32)
STRANGER = bytes([9]) * 32
PARTS = ("accounts", "machines", "workers", "orders", "open_orders", "used_offers", "bootstrap", "anchors", "totals",
         "last_anchor", "licences_sold")  # fmt: skip


def refuses(reason: str):
    """The decorated function prepares a chain and returns (who calls, what)."""

    def register(case: Callable) -> Callable:
        CASES.setdefault(reason, []).append(case)
        return case

    return register


# accounts


@refuses("the balance is too small")
def _(chain):
    return "alice", calls.Transfer(STRANGER, chain.account("alice").balance_planck + 1)


@refuses("the balance is too small")
def _(chain):
    return "alice", calls.LicenceBuy(101, NOBODY)


@refuses("the balance is too small")
def _(chain):
    return "alice", calls.StakeBond(10**30)


@refuses("the balance is too small")
def _(chain):
    chain.do("provider", chain.bind_call("provider", calls.PROVIDER))
    chain.do("provider", calls.StakeBond(9_950 * KAI))
    return "provider", chain.register_call()


@refuses("the balance is too small")
def _(chain):
    chain.add_worker()
    chain.do("alice", calls.StakeBond(10_000 * KAI))
    return "alice", chain.place_call()


@refuses("nothing to move")
def _(chain):
    return "alice", calls.Transfer(STRANGER, 0)


@refuses("a transfer to itself")
def _(chain):
    return "alice", calls.Transfer(chain.owner("alice"), 1)


@refuses("no licences asked for")
def _(chain):
    return "alice", calls.LicenceBuy(0, NOBODY)


@refuses("not so many licences are left")
def _(chain):
    return "alice", calls.LicenceBuy(29_999, NOBODY)


@refuses("an account cannot refer itself")
def _(chain):
    return "alice", calls.LicenceBuy(1, chain.owner("alice"))


@refuses("no such referrer")
def _(chain):
    return "alice", calls.LicenceBuy(1, STRANGER)


@refuses("nothing to bond")
def _(chain):
    return "alice", calls.StakeBond(0)


@refuses("nothing to unbond")
def _(chain):
    return "alice", calls.StakeUnbond(0)


@refuses("the stake is too small")
def _(chain):
    chain.do("alice", calls.StakeBond(5))
    return "alice", calls.StakeUnbond(6)


@refuses("nothing can be withdrawn yet")
def _(chain):
    chain.do("alice", calls.StakeBond(5))
    chain.do("alice", calls.StakeUnbond(5))
    chain.until_epoch(1)
    return "alice", calls.StakeWithdraw()


# machines


@refuses("no such roles")
def _(chain):
    return "alice", chain.bind_call("alice", 0)


@refuses("no such roles")
def _(chain):
    return "alice", chain.bind_call("alice", 8)


@refuses("the machine is bound to another account")
def _(chain):
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    return "bob", chain.bind_call("bob", calls.CLIENT, machine="alice")


@refuses("the machine is bound already")
def _(chain):
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    return "alice", chain.bind_call("alice", calls.CLIENT)


@refuses("the machine's signature is wrong")
def _(chain):
    return "alice", chain.bind_call("bob", calls.CLIENT)


@refuses("the machine's signature is wrong")
def _(chain):
    return "alice", replace(chain.bind_call("alice", calls.CLIENT), roles=calls.CHECKER)


@refuses("the machine's signature is wrong")
def _(chain):
    return "alice", calls.MachineBind(bytes(32), calls.CLIENT, bytes(64))


@refuses("the machine is not bound to the signer")
def _(chain):
    return "provider", chain.register_call()


@refuses("the machine is not bound to the signer")
def _(chain):
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    return "bob", calls.BootstrapAnnounce(chain.machine("alice"), ("/ip4/1.1.1.1/tcp/1",))


@refuses("the machine is not bound to the signer")
def _(chain):
    chain.add_worker()
    return "bob", chain.place_call()


@refuses("the machine is not bound as a provider")
def _(chain):
    chain.do("provider", chain.bind_call("provider", calls.CHECKER))
    return "provider", chain.register_call()


@refuses("too many addresses")
def _(new_chain):
    chain = new_chain(max_announced_addresses=2)
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    return chain, "alice", calls.BootstrapAnnounce(chain.machine("alice"), ("/a", "/b", "/c"))


@refuses("not a multiaddr")
def _(chain):
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    return "alice", calls.BootstrapAnnounce(chain.machine("alice"), ("http://example",))


@refuses("not a multiaddr")
def _(chain):
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    return "alice", calls.BootstrapAnnounce(chain.machine("alice"), ("/ip4/1.1.1.1\n",))


@refuses("announced already")
def _(chain):
    chain.do("alice", chain.bind_call("alice", calls.CLIENT))
    return "alice", calls.BootstrapAnnounce(chain.machine("alice"), ())


# workers


@refuses("the worker is registered already")
def _(chain):
    chain.register()
    return "provider", chain.register_call()


def _spec_case(spec: Spec) -> None:
    @refuses("the specification makes no sense")
    def _(chain):
        chain.do("provider", chain.bind_call("provider", calls.PROVIDER))
        return "provider", chain.register_call(spec)


for _spec in (
    Spec(0, 1, 1, 1, 0, 0, ""),
    Spec(4, 1, 1, 1, 0, 0, ""),
    Spec(CPU_CLASS, 0, 1, 1, 0, 0, ""),
    Spec(CPU_CLASS, 1, 0, 1, 0, 0, ""),
    Spec(GPU_CLASS, 1, 1, 1, 0, 0, ""),
    Spec(GPU_CLASS, 1, 1, 1, 1, 0, "H100"),
    Spec(CPU_CLASS, 1, 1, 1, 0, 80_000, ""),
):
    _spec_case(_spec)


@refuses("a price of nothing")
def _(chain):
    chain.do("provider", chain.bind_call("provider", calls.PROVIDER))
    return "provider", replace(chain.register_call(), price_planck_per_hour=0)


@refuses("a price of nothing")
def _(chain):
    chain.add_worker()
    return "alice", chain.place_call(price_planck_per_hour=0)


@refuses("not a certificate of a check")
def _(chain):
    return "bob", calls.WorkerActivate(QuorumCertificate(ReadyCore(NOBODY, NOBODY), 0, ()))


@refuses("no such worker")
def _(chain):
    chain.block()
    return "bob", calls.WorkerActivate(chain.verdict(0))


@refuses("no such worker")
def _(chain):
    return "bob", calls.WorkerRetire(NOBODY)


@refuses("the worker does not wait for activation")
def _(chain):
    chain.add_worker()
    return "bob", calls.WorkerActivate(chain.verdict(chain.state.slot))


def _registered(chain):
    """A registered worker in a slot after its registration."""
    chain.add_checkers()
    chain.register()
    slot = chain.state.slot + 1
    chain.blocks_until(lambda state: state.slot >= slot)


@refuses("the check was not passed")
def _(chain):
    _registered(chain)
    return "bob", calls.WorkerActivate(chain.verdict(chain.state.slot, popw.LATE))


@refuses("the check is older than the registration")
def _(chain):
    chain.add_checkers()
    chain.register()
    return "bob", calls.WorkerActivate(chain.verdict(chain.state.slot))


@refuses("the slot is not of that epoch")
def _(chain):
    _registered(chain)
    return "bob", calls.WorkerActivate(chain.verdict(chain.state.slot, epoch=99))


@refuses("the slot's committee is not known")
def _(chain):
    _registered(chain)
    return "bob", calls.WorkerActivate(chain.verdict(chain.state.slot + 5))


@refuses("the slot's committee is not known")
def _(chain):
    _registered(chain)
    certificate = chain.verdict(chain.state.slot)
    chain.until_epoch(chain.state.epoch + chain.params.kept_epochs)
    return "bob", calls.WorkerActivate(certificate)


@refuses("the certificate is not by a quorum of the committee")
def _(chain):
    _registered(chain)
    return "bob", calls.WorkerActivate(chain.verdict(chain.state.slot, signers=2))


@refuses("the certificate is not by a quorum of the committee")
def _(chain):
    _registered(chain)
    certificate = chain.verdict(chain.state.slot)
    swapped = replace(certificate, signatures=certificate.signatures[::-1])
    return "bob", calls.WorkerActivate(swapped)


@refuses("the certificate is not by a quorum of the committee")
def _(chain):
    _registered(chain)
    certificate = chain.verdict(chain.state.slot)
    shifted = replace(certificate, mask=certificate.mask << 1)
    return "bob", calls.WorkerActivate(shifted)


@refuses("the certificate is not by a quorum of the committee")
def _(chain):
    _registered(chain)
    certificate = chain.verdict(chain.state.slot)
    return "bob", calls.WorkerActivate(replace(certificate, mask=0b1011))


@refuses("the worker is another account's")
def _(chain):
    chain.register()
    return "bob", calls.WorkerRetire(chain.machine("provider"))


@refuses("the worker has retired already")
def _(chain):
    chain.register()
    chain.do("provider", calls.WorkerRetire(chain.machine("provider")))
    return "provider", calls.WorkerRetire(chain.machine("provider"))


@refuses("an order of the worker is not settled")
def _(chain):
    chain.add_worker()
    chain.do("alice", calls.OrderCancel(chain.place()))
    return "provider", calls.WorkerRetire(chain.machine("provider"))


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

ALL = [(reason, case) for reason, cases in CASES.items() for case in cases]


def _money_and_records(state):
    return {part: getattr(state, part) for part in PARTS}


@pytest.mark.parametrize(("reason", "case"), ALL, ids=[f"{reason}-{i}" for i, (reason, _) in enumerate(ALL)])
def test_refused(reason, case, new_chain):
    if case.__code__.co_varnames[0] == "new_chain":
        chain, name, body = case(new_chain)
    else:
        chain = new_chain()
        name, body = case(chain)
    before = _money_and_records(chain.state)
    outcome = chain.run(name, body)
    assert outcome == CallIgnored(chain.blocks[-1].calls[0].call_hash, chain.owner(name), type(body).__name__, reason)
    after = _money_and_records(chain.state)
    after["used_offers"] = before["used_offers"]  # an epoch's first block forgets expired offers
    assert after == before


def test_an_order_id_cannot_come_twice(working):
    first = working.place()
    working._calls -= 1  # a ledger that repeats a call's hash
    outcome = working.run("alice", working.place_call(2))
    assert isinstance(outcome, CallIgnored) and outcome.reason == "the order exists already"
    assert working.order(first).status == 1


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "not a call of this version"),
        (b"KSR\x01", "not a call of this version"),
        (b"KSR\x02\x50\x90", "not a call of this version"),
        (b"KSR\x01\x4f\x90", "unknown call 79"),
        (b"KSR\x01\x50\xc1", "not msgpack: FormatError"),
        (b"KSR\x01\x50\x90", "not a Transfer"),
        (b"KSR\x01\x50" + b"\x91" * 100_000, "not msgpack: StackError"),
    ],
)
def test_bytes_that_are_no_call_are_ignored(chain, payload, reason):
    outcome = chain.run("alice", payload)
    assert isinstance(outcome, CallIgnored)
    assert (outcome.call, outcome.reason) == ("", reason)


def test_every_reason_has_a_case():
    written = set()
    for path in Path(rules.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refused":
                written.add(node.args[0].value)
    assert written - CASES.keys() == {"the order exists already"}
    assert CASES.keys() <= written
