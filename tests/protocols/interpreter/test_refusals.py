"""Every reason for which the rules of accounts and machines refuse a call; a refused call changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from protocols import popw
from protocols.adverts import CPU_CLASS, GPU_CLASS, Spec
from protocols.interpreter import accounts, calls, draft, machines
from protocols.interpreter.events import CallIgnored
from protocols.params import KAI
from protocols.quorum import QuorumCertificate, ReadyCore

NOBODY = bytes(32)
STRANGER = bytes([9]) * 32
CASES: list[tuple[str, Callable]] = []


def refuses(reason: str) -> Callable[[Callable], Callable]:
    """The decorated function prepares a chain and returns (who calls, what)."""

    def register(case: Callable) -> Callable:
        CASES.append((reason, case))
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
    return "alice", calls.BootstrapAnnounce(chain.machine("alice"), ("/dns4/b\u00fccher.example",))


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


# ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("reason", "case"), CASES, ids=[f"{i}-{reason}" for i, (reason, _) in enumerate(CASES)])
def test_refused(reason, case, check_refusal):
    check_refusal(reason, case)


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


def test_every_reason_has_a_case(written_reasons):
    assert written_reasons(accounts, machines, draft) <= {reason for reason, _ in CASES}
