"""Machine keys, workers, and where machines can be reached."""

from __future__ import annotations

from dataclasses import replace

from kaisar_p2p.wire.crypto import verify
from protocols.adverts import GPU_CLASS, MOBILE_CLASS, Spec
from protocols.committees import verify_certificate
from protocols.interpreter.calls import (
    BIND_DOMAIN,
    CHECKER,
    CLIENT,
    PROVIDER,
    BootstrapAnnounce,
    MachineBind,
    WorkerActivate,
    WorkerRegister,
    WorkerRetire,
    bind_body,
)
from protocols.interpreter.draft import Draft, Refused
from protocols.interpreter.events import WorkerActivated, WorkerRegistered, WorkerRetired
from protocols.interpreter.state import ACTIVE, REGISTERED, RETIRED, MachineState, WorkerState
from protocols.popw import PASS
from protocols.quorum import QuorumCertificate, VerdictCore


def bind(draft: Draft, signer: bytes, call: MachineBind) -> bytes:
    """Bind a machine key to its owner, or change the roles of one's own. A key never changes owner."""
    if not 0 < call.roles <= PROVIDER | CHECKER | CLIENT:
        raise Refused("no such roles")
    known = draft.machines.get(call.machine)
    if known is not None and known.owner != signer:
        raise Refused("the machine is bound to another account")
    if known is not None and known.roles == call.roles:
        raise Refused("the machine is bound already")
    if not verify(call.machine, BIND_DOMAIN, draft.network, bind_body(signer, call.roles), call.signature):
        raise Refused("the machine's signature is wrong")
    bound_block = draft.base.number if known is None else known.bound_block
    draft.machines[call.machine] = MachineState(signer, call.roles, bound_block)
    return call.machine


def register(draft: Draft, signer: bytes, call: WorkerRegister) -> bytes:
    """Register a machine as a worker: the fee is burnt, the bond locked. A retired worker may come back."""
    params = draft.params
    if not draft.machine_of(signer, call.worker).roles & PROVIDER:
        raise Refused("the machine is not bound as a provider")
    known = draft.workers.get(call.worker)
    if known is not None and known.status != RETIRED:
        raise Refused("the worker is registered already")
    if not is_plausible(call.spec):
        raise Refused("the specification makes no sense")
    if call.price_planck_per_hour == 0:
        raise Refused("a price of nothing")
    account = draft.payer(signer, params.registration_fee_planck + params.bond_planck)
    paid = params.registration_fee_planck + params.bond_planck
    draft.accounts[signer] = replace(account, balance_planck=account.balance_planck - paid)
    draft.burnt_planck += params.registration_fee_planck
    draft.workers[call.worker] = WorkerState(
        signer, call.spec, call.price_planck_per_hour, params.bond_planck, REGISTERED, draft.base.number
    )
    draft.events.append(WorkerRegistered(call.worker))
    return call.worker


def is_plausible(spec: Spec) -> bool:
    """A known device class, at least one core and some memory, and GPUs with memory or none at all."""
    if not GPU_CLASS <= spec.device_class <= MOBILE_CLASS or not spec.cpu_cores or not spec.memory_mb:
        return False
    if spec.device_class == GPU_CLASS and not spec.gpus:
        return False
    return (spec.gpus > 0) == (spec.gpu_memory_mb > 0)


def activate(draft: Draft, call: WorkerActivate) -> bytes:
    """A certificate that the registered worker passed a check of a slot after its registration; anyone may send it."""
    core = call.certificate.core
    if not isinstance(core, VerdictCore):
        raise Refused("not a certificate of a check")
    worker = draft.worker(core.worker)
    if worker.status != REGISTERED:
        raise Refused("the worker does not wait for activation")
    if core.verdict != PASS:
        raise Refused("the check was not passed")
    if core.slot <= draft.params.slot_of(worker.registered_block):
        raise Refused("the check is older than the registration")
    _require_quorum(draft, core, call.certificate)
    draft.workers[core.worker] = replace(worker, status=ACTIVE, activated_block=draft.base.number)
    draft.events.append(WorkerActivated(core.worker))
    return core.worker


def _require_quorum(draft: Draft, core: VerdictCore, certificate: QuorumCertificate) -> None:
    if core.epoch != draft.params.epoch_of_slot(core.slot):
        raise Refused("the slot is not of that epoch")
    committee = draft.check_committee(core.slot, core.worker)
    if committee is None:
        raise Refused("the slot's committee is not known")
    if not verify_certificate(certificate, committee, draft.network):
        raise Refused("the certificate is not by a quorum of the committee")


def retire(draft: Draft, signer: bytes, call: WorkerRetire) -> bytes:
    """Leave: the bond returns at once, so every order must be settled first."""
    worker = draft.worker(call.worker)
    if worker.owner != signer:
        raise Refused("the worker is another account's")
    if worker.status == RETIRED:
        raise Refused("the worker has retired already")
    if call.worker in draft.open_orders:
        raise Refused("an order of the worker is not settled")
    draft.workers[call.worker] = replace(worker, status=RETIRED, bond_planck=0)
    draft.add_balance(signer, worker.bond_planck)
    draft.events.append(WorkerRetired(call.worker))
    return call.worker


def announce(draft: Draft, signer: bytes, call: BootstrapAnnounce) -> bytes:
    """Publish multiaddrs of one's own machine; an empty list takes them back. Repeated ones count once."""
    draft.machine_of(signer, call.machine)
    addrs = tuple(dict.fromkeys(call.addrs))
    if len(addrs) > draft.params.max_announced_addresses:
        raise Refused("too many addresses")
    if not all(addr.startswith("/") and addr.isascii() and addr.isprintable() for addr in addrs):
        raise Refused("not a multiaddr")
    if addrs == draft.bootstrap.get(call.machine, ()):
        raise Refused("announced already")
    if addrs:
        draft.bootstrap[call.machine] = addrs
    else:
        del draft.bootstrap[call.machine]
    return call.machine
