"""Joining, against the real ledger rules: calls go out until the ledger shows their effect, in any order of luck."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest

from kaisar_p2p.wire.crypto import KeyPair
from protocols.actions import Action, BlockApplied, Gossip, Incoming, Note, Submit
from protocols.adverts import CPU_CLASS, Spec
from protocols.genesis import Allocation, Genesis, genesis_state, write_genesis
from protocols.interpreter import calls
from protocols.interpreter.apply import apply
from protocols.interpreter.state import REGISTERED, State
from protocols.onboarding import REGISTRATION_STEPS, Onboarding
from protocols.params import KAI
from protocols.popw import CHALLENGE_PROTOCOL, PASS, WRONG
from protocols.quorum import QuorumCertificate, VerdictCore
from tests.protocols.interpreter.conftest import OneBlock, OneCall

KEYS = KeyPair.from_seed(bytes(range(32)))
OWNER = sha256(b"owner").digest()
SPEC = Spec(CPU_CLASS, 8, 16_000, 100_000, 0, 0, "")


class Ledger:
    def __init__(self, balance_planck: int = 1_000 * KAI) -> None:
        document = write_genesis(Genesis("test", "demo", 0, (Allocation(OWNER, balance_planck),)))
        self.state: State = genesis_state(document)
        self.next(())

    def next(self, payloads: tuple[bytes, ...], signer: bytes = OWNER) -> BlockApplied:
        number = self.state.number + 1
        block_calls = tuple(
            OneCall(signer, payload, sha256(bytes([index]) + number.to_bytes(4, "big") + payload).digest())
            for index, payload in enumerate(payloads)
        )
        block = OneBlock(
            number, sha256(str(number).encode()).digest(), self.state.block_hash, number * 500, block_calls
        )
        self.state, events = apply(self.state, block)
        return BlockApplied(self.state, events)


def submitted(actions: list[Action]) -> tuple[bytes, ...]:
    return tuple(action.payload for action in actions if isinstance(action, Submit))


def names(actions: list[Action]) -> list[str]:
    return [type(calls.parse_payload(payload)).__name__ for payload in submitted(actions)]


def run(machine: Onboarding, ledger: Ledger, blocks: int = 6) -> list[list[str]]:
    history, pending = [], ()
    for _ in range(blocks):
        actions = machine.step(ledger.next(pending), 0.0)
        history.append(names(actions))
        pending = submitted(actions)
    return history


def test_a_checker_buys_stakes_and_binds_then_is_quiet() -> None:
    ledger = Ledger()
    history = run(Onboarding(KEYS, OWNER, calls.CHECKER), ledger)
    assert sorted(history[0]) == ["LicenceBuy", "MachineBind", "StakeBond"]
    assert history[1:] == [[]] * 5
    account = ledger.state.accounts[OWNER]
    assert (account.licences, account.stake_planck) == (1, ledger.state.params.min_stake_planck)
    assert ledger.state.machines[KEYS.public_key].roles == calls.CHECKER


def test_a_worker_binds_first_and_registers_then() -> None:
    ledger = Ledger()
    history = run(Onboarding(KEYS, OWNER, calls.PROVIDER, SPEC, 3 * KAI), ledger)
    assert history[:3] == [["MachineBind"], ["WorkerRegister"], []]
    assert ledger.state.workers[KEYS.public_key].status == REGISTERED


def test_a_role_that_is_added_later_binds_again_and_keeps_the_old_one() -> None:
    ledger = Ledger()
    run(Onboarding(KEYS, OWNER, calls.CLIENT), ledger)
    run(Onboarding(KEYS, OWNER, calls.CHECKER), ledger)
    assert ledger.state.machines[KEYS.public_key].roles == calls.CHECKER | calls.CLIENT


def test_without_funds_it_goes_on_asking_and_nothing_is_lost() -> None:
    ledger = Ledger(balance_planck=0)
    history = run(Onboarding(KEYS, OWNER, calls.CHECKER), ledger)
    assert history[-1] == ["LicenceBuy", "StakeBond"]


def test_nothing_is_submitted_while_held_or_while_catching_up() -> None:
    ledger = Ledger()
    machine = Onboarding(KEYS, OWNER, calls.CHECKER, hold=True)
    assert machine.step(ledger.next(()), 0.0) == []
    machine.hold = False
    assert machine.step(replace(ledger.next(()), live=False), 0.0) == []
    assert machine.step(ledger.next(()), 0.0)


def test_a_bootstrap_node_announces_once_and_again_when_its_addresses_change() -> None:
    ledger = Ledger()
    first = ("/ip4/127.0.0.1/tcp/4001",)
    history = run(Onboarding(KEYS, OWNER, calls.CLIENT, addrs=first, announce=True), ledger)
    assert history[:3] == [["MachineBind"], ["BootstrapAnnounce"], []]
    moved = ("/ip4/127.0.0.1/tcp/4002",)
    run(Onboarding(KEYS, OWNER, calls.CLIENT, addrs=moved, announce=True), ledger)
    assert ledger.state.bootstrap[KEYS.public_key] == moved


def certificate(worker: bytes, verdict: int) -> Gossip:
    core = VerdictCore(0, 0, worker, bytes(32), verdict)
    return Gossip("certificate", QuorumCertificate(core, 1, (bytes(64),)), bytes(32), 0.0)


@pytest.mark.parametrize(
    ("worker", "verdict", "expected"),
    [(KEYS.public_key, PASS, ["WorkerActivate"]), (KEYS.public_key, WRONG, []), (bytes(32), PASS, [])],
)
def test_only_a_pass_of_our_own_worker_activates(worker: bytes, verdict: int, expected: list[str]) -> None:
    ledger = Ledger()
    machine = Onboarding(KEYS, OWNER, calls.PROVIDER, SPEC, 3 * KAI)
    run(machine, ledger)
    assert names(machine.step(certificate(worker, verdict), 0.0)) == expected


def test_the_steps_are_ten_and_each_is_reported_once() -> None:
    ledger = Ledger()
    machine = Onboarding(KEYS, OWNER, calls.PROVIDER, SPEC, 3 * KAI)
    run(machine, ledger)
    challenge = Incoming(1, bytes(32), CHALLENGE_PROTOCOL, b"", 0.0)
    (note,) = machine.step(challenge, 0.0)
    assert isinstance(note, Note) and dict(note.data)["name"] == "benchmark job"
    assert machine.step(challenge, 0.0) == []
    assert len(REGISTRATION_STEPS) == 10
