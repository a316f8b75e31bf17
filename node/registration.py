"""Steps 1 to 7 of a provider's registration (requirement P2), as they really happen while the node starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from kaisar_p2p.errors import HardwareError
from kaisar_p2p.hardware.probe import Machine as Hardware
from kaisar_p2p.hardware.prove import Proof
from kaisar_p2p.identity import ss58_encode
from kaisar_p2p.wire.ids import short
from kaisar_p2p.wire.matproof import CheckResult, Job
from kaisar_p2p.wire.money import planck_to_kai
from node.compute import Computer
from node.config import Config
from node.node import Node
from protocols.actions import CheckTask, ProveTask
from protocols.adverts import CPU_CLASS, GPU_CLASS, Spec
from protocols.interpreter.state import AccountState
from protocols.onboarding import Onboarding, registration_note

log = logging.getLogger(__name__)

SELF_TEST = Job(256, 256, 128, 1)
SELF_TEST_SAMPLES = 16
MB = 1 << 20


def offered_spec(config: Config, hardware: Hardware) -> Spec:
    """What the configuration offers of what the probe found."""
    wanted = config.provider
    gpus = len(hardware.gpus) if wanted.gpus is None else wanted.gpus
    first = hardware.gpus[0] if hardware.gpus and gpus else None
    return Spec(
        device_class=GPU_CLASS if gpus else CPU_CLASS,
        cpu_cores=wanted.cpu_cores or hardware.cpu_cores,
        memory_mb=wanted.memory_mb or hardware.memory_bytes // MB,
        disk_mb=min(hardware.disk_free_bytes // MB, 2**32 - 1),
        gpus=gpus,
        gpu_memory_mb=first.memory_bytes // MB if first else 0,
        gpu_model=first.name[:64] if first else "",
    )


@dataclass
class Registration:
    """Reports each step when it has happened, and lets the on-ledger part go ahead once the wallet can pay."""

    spec: Spec
    hardware: Hardware

    async def run(self, node: Node, onboarding: Onboarding) -> None:
        """Until step 7; `Onboarding` reports the rest."""
        spec = self.spec
        address = ss58_encode(node.wallet.public_key)
        await node.note(registration_note(1, f"machine {short(node.key)} of owner {address}"))
        offer = f"{spec.cpu_cores} cores, {spec.memory_mb} MB memory, {spec.disk_mb} MB disk, {spec.gpus} GPUs"
        await node.note(registration_note(2, offer))
        await node.note(registration_note(3, self._runtime_text(node)))
        await self_test(node.effects.computer)
        await node.note(registration_note(4, f"self-test of the proof backend passed on {self.hardware.cpu_model}"))
        await self._wallet(node, onboarding)
        await self._peers(node)
        await node.mesh.wait_connected(1)
        await node.note(registration_note(7, f"connected with {len(node.mesh.peers())} peers"))

    def _runtime_text(self, node: Node) -> str:
        runtime = node.runtime
        if runtime is None:
            return "no container runtime"
        return f"runtime {runtime.name}" + (" (development only, tenants are not isolated)" * runtime.for_development)

    async def _wallet(self, node: Node, onboarding: Onboarding) -> None:
        state = await node.chain.caught_up()
        needed = state.params.registration_fee_planck + state.params.bond_planck
        while node.key not in node.chain.state.workers:
            account = node.chain.state.accounts.get(node.wallet.public_key, AccountState())
            if account.balance_planck >= needed:
                break
            log.warning(
                "the wallet has %s KAI, registration needs %s: send KAI to %s",
                planck_to_kai(account.balance_planck), planck_to_kai(needed), ss58_encode(node.wallet.public_key),
            )  # fmt: skip
            await trio.sleep(5)
        onboarding.hold = False
        await node.note(registration_note(5, f"{planck_to_kai(needed)} KAI for fee and bond"))

    async def _peers(self, node: Node) -> None:
        while not (node.chain.state.bootstrap or node.config.network.join or node.mesh.peers()):
            await node.chain.advanced()
        records = len(node.chain.state.bootstrap)
        await node.note(registration_note(6, f"{records} bootstrap records on the ledger"))


async def self_test(computer: Computer) -> None:
    """Prove a tiny job and check it as a committee would; HardwareError when the backend computes wrongly."""
    seed = bytes(32)
    proof = await computer.run(ProveTask(SELF_TEST, seed))
    assert isinstance(proof, Proof)
    tags = tuple(each.astype("<u4", copy=False).tobytes() for each in proof.tags)
    checked = await computer.run(CheckTask(SELF_TEST, seed, proof.roots, tags, bytes(32), SELF_TEST_SAMPLES))
    assert isinstance(checked, CheckResult)
    if not checked.ok:
        raise HardwareError(
            "the proof backend of this machine computes wrongly",
            hint="checks would find out: look at its memory and drivers before it is registered",
        )
