"""How a node becomes what its roles say: bound machine, licence and stake, registered and certified worker.

`protocols/README.md`, "Joining". Everything follows from ledger state, so that a restart at any point goes on where it
was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kaisar_p2p.wire.crypto import KeyPair
from protocols.actions import Action, BlockApplied, Event, Gossip, Incoming, Note, Submit
from protocols.adverts import Spec
from protocols.interpreter import calls
from protocols.interpreter.state import ACTIVE, REGISTERED, RETIRED, AccountState, State
from protocols.popw import CHALLENGE_PROTOCOL, PASS, VERDICT_NAMES
from protocols.quorum import QuorumCertificate, VerdictCore

REGISTRATION_STEPS = (
    "register",
    "request",
    "setup scripts",
    "run scripts",
    "wallet",
    "new peer node from blockchain",
    "connection",
    "benchmark job",
    "result",
    "registered",
)
"""The ten steps that a provider sees (P2); the node reports 1 to 7 while it starts, `Onboarding` the rest."""


def registration_note(step: int, text: str) -> Note:
    """Step 1 to 10 of a worker's registration, for people."""
    return Note("registration", (("step", step), ("name", REGISTRATION_STEPS[step - 1]), ("text", text)))


def bind_call(keys: KeyPair, owner: bytes, roles: int, network: bytes) -> calls.MachineBind:
    """The machine consents to its owner by signing the owner's account and the roles."""
    signature = keys.sign("kaisar/bind", network, owner + bytes([roles]))
    return calls.MachineBind(keys.public_key, roles, signature)


@dataclass
class Onboarding:
    """Submits the calls that are still missing, each until the ledger shows its effect; nothing while `hold` is set."""

    keys: KeyPair
    owner: bytes
    roles: int
    spec: Spec | None = None
    price_planck_per_hour: int = 0
    addrs: tuple[str, ...] = ()
    announce: bool = False
    hold: bool = False
    deadline: float | None = None
    _reported: set[int] = field(default_factory=set)
    _state: State | None = None

    def step(self, event: Event, now: float) -> list[Action]:
        """Blocks drive it; a challenge and a certificate about our worker are reported."""
        if isinstance(event, BlockApplied):
            self._state = event.state
            return self._missing(event.state) if event.live and not self.hold else []
        if isinstance(event, Incoming) and event.protocol == CHALLENGE_PROTOCOL:
            return self._report(8, "challenged by a committee, computing")
        if isinstance(event, Gossip) and event.topic == "certificate" and isinstance(event.message, QuorumCertificate):
            return self._certified(event.message)
        return []

    def _missing(self, state: State) -> list[Action]:
        machine = state.machines.get(self.keys.public_key)
        if machine is None or (machine.owner == self.owner and machine.roles & self.roles != self.roles):
            roles = self.roles | (machine.roles if machine else 0)
            bind = bind_call(self.keys, self.owner, roles, state.network)
            return [*self._checker_calls(state), Submit("machine.bind", calls.payload_of(bind))]
        actions = self._checker_calls(state)
        if self.roles & calls.PROVIDER:
            actions += self._worker_calls(state)
        if self.announce and self.addrs and state.bootstrap.get(self.keys.public_key) != self.addrs:
            announce = calls.BootstrapAnnounce(self.keys.public_key, self.addrs)
            actions.append(Submit("bootstrap.announce", calls.payload_of(announce)))
        return actions

    def _checker_calls(self, state: State) -> list[Action]:
        if not self.roles & calls.CHECKER:
            return []
        account = state.accounts.get(self.owner, AccountState())
        actions: list[Action] = []
        if account.licences < 1:
            actions.append(Submit("licence.buy", calls.payload_of(calls.LicenceBuy(1, bytes(32)))))
        lacking = state.params.min_stake_planck - account.stake_planck
        if lacking > 0:
            actions.append(Submit("stake.bond", calls.payload_of(calls.StakeBond(lacking))))
        return actions

    def _worker_calls(self, state: State) -> list[Action]:
        worker = state.workers.get(self.keys.public_key)
        if worker is None or worker.status == RETIRED:
            if self.spec is None:
                return []
            register = calls.WorkerRegister(self.keys.public_key, self.spec, self.price_planck_per_hour)
            return [Submit("worker.register", calls.payload_of(register))]
        if worker.status == ACTIVE:
            return self._report(10, "certified and registered: orders can come")
        return []

    def _certified(self, certificate: QuorumCertificate) -> list[Action]:
        core, state = certificate.core, self._state
        if state is None or not isinstance(core, VerdictCore) or core.worker != self.keys.public_key:
            return []
        worker = state.workers.get(core.worker)
        if worker is None or worker.status != REGISTERED:
            return []
        if core.verdict != PASS:
            name = VERDICT_NAMES.get(core.verdict, "?")
            return [registration_note(9, f"slot {core.slot}: {name}; checked again in the next slot")]
        report = self._report(9, f"PASS in slot {core.slot}, signed by {len(certificate.signatures)} checkers")
        return [*report, Submit("worker.activate", calls.payload_of(calls.WorkerActivate(certificate)))]

    def _report(self, step: int, text: str) -> list[Action]:
        if step in self._reported:
            return []
        self._reported.add(step)
        return [registration_note(step, text)]
