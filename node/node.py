"""A running node: the parts that the API, the command line and the boot sequence share."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from kaisar_p2p.identity import MachineKey, Wallet
from kaisar_p2p.mesh import Mesh
from kaisar_p2p.runtime.interface import ContainerRuntime
from node import earnings, ordering
from node.chain import Chain
from node.clock import Clock
from node.config import Config
from node.effects import NodeEffects
from node.inbox import Inbox
from node.index import Index
from node.store import NodeStore
from node.tunnels import TunnelClient
from protocols.actions import Note
from protocols.interpreter.calls import CallBody, payload_of
from protocols.lease_client import LeaseClientMachine

FINAL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class CallResult:
    """A call that is final. `reason` is empty when it had effect, else why it had none."""

    call_hash: bytes
    reason: str


@dataclass
class Node:
    """Everything that one process is."""

    config: Config
    roles: tuple[str, ...]
    machine_key: MachineKey
    wallet: Wallet
    chain: Chain
    mesh: Mesh
    store: NodeStore
    index: Index
    inbox: Inbox
    clock: Clock
    effects: NodeEffects
    tunnels: TunnelClient
    runtime: ContainerRuntime | None
    lease_client: LeaseClientMachine
    started_at: float
    stopping: trio.Event = field(default_factory=trio.Event)

    @property
    def key(self) -> bytes:
        """The machine key."""
        return self.machine_key.public_key

    def stop(self) -> None:
        """Ask the node to end cleanly: containers keep running, state is flushed."""
        self.stopping.set()

    async def note(self, *notes: Note) -> None:
        """Tell the node's user."""
        await self.effects.perform(list(notes), self.clock.now())

    async def call(self, body: CallBody, timeout_s: float = FINAL_TIMEOUT_S) -> CallResult:
        """Sign a call with the owner wallet, hand it in, and wait until it is final.

        Raises CallRejected when the ledger refuses it, LedgerError when it is not final in time.
        """
        receipt = await self.chain.ledger.submit(payload_of(body), self.wallet)
        return CallResult(receipt.call_hash, await self.chain.outcome(receipt, timeout_s))

    async def place_order(self, request: ordering.PlaceOrder) -> ordering.PlacedOrder:
        """Find a worker, get an offer, lock the escrow. Nothing is locked when it raises."""
        return await ordering.place(self, request)

    def reward_proof(self) -> str:
        """A self-contained proof (JSON) of what the owner has earned, for `kaisar proof verify`."""
        return earnings.export_proof(self)

    async def claim_reward(self) -> earnings.Claimed:
        """Draw all rewards up to the newest anchored epoch whose leaves this node holds."""
        return await earnings.claim(self)
