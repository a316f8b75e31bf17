"""The ledger's side of a node: follow finalized blocks through the interpreter, and hand in calls once."""

from __future__ import annotations

import logging
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

from kaisar_p2p.errors import CallRejected, LedgerError
from kaisar_p2p.identity import Wallet
from kaisar_p2p.ledger import Block, Ledger, Receipt
from kaisar_p2p.wire.ids import short
from node.clock import Clock
from node.inbox import Inbox, Lane
from protocols.actions import BlockApplied
from protocols.epochs import EpochCertificate, EpochHeader
from protocols.genesis import genesis_state
from protocols.interpreter.apply import apply
from protocols.interpreter.calls import AnchorPost, parse_payload
from protocols.interpreter.events import Anchored, CallApplied, CallIgnored, LedgerEvent
from protocols.interpreter.state import Registry, State

log = logging.getLogger(__name__)

LIVE_LAG_S = 30.0
REMEMBERED_EPOCHS = 2
ANCHOR_PROOFS = 64
RESUBMIT_BLOCKS = 12


@dataclass(frozen=True)
class AnchorProof:
    """What shows to anybody that an epoch's header was signed by two thirds of the stake."""

    header: EpochHeader
    certificate: EpochCertificate
    registry: Registry


class Chain:
    """The newest finalized state, and how it came about."""

    def __init__(self, ledger: Ledger, inbox: Inbox, clock: Clock) -> None:
        self.ledger = ledger
        self.state: State = genesis_state(ledger.genesis)
        self._inbox = inbox
        self._clock = clock
        self._advanced = trio.Event()
        self.call_outcomes: dict[bytes, str] = {}
        self.anchor_proofs: dict[int, AnchorProof] = {}

    async def run(self) -> None:
        """Apply every finalized block, from the beginning; until cancelled.

        What was final before we started is not live, however young it is: it happened to an earlier run of this node,
        and acting on a state that is not the newest would repeat what is done, such as buying a licence. Machines get
        the last epochs of it to resume; what is older is in the state.
        """
        tip = (await self.ledger.finalized()).number
        recent = tip - REMEMBERED_EPOCHS * self.state.params.epoch_blocks
        async with aclosing(self.ledger.follow(None)) as blocks:
            async for block in blocks:
                self.state, events = apply(self.state, block)
                self._remember_outcomes(events)
                self._remember_anchors(block, events)
                age_s = self._clock.now() - block.time_ms / 1000
                live = block.number >= tip and age_s < max(LIVE_LAG_S, 4 * self.state.params.slot_ms / 1000)
                if block.number > recent:
                    await self._inbox.put_patiently(Lane.BLOCK, BlockApplied(self.state, events, live))
                self._advanced.set()
                self._advanced = trio.Event()

    def _remember_outcomes(self, events: tuple[LedgerEvent, ...]) -> None:
        for event in events:
            if isinstance(event, CallApplied):
                self.call_outcomes[event.call_hash] = ""
            elif isinstance(event, CallIgnored):
                self.call_outcomes[event.call_hash] = event.reason
        while len(self.call_outcomes) > 4096:
            self.call_outcomes.pop(next(iter(self.call_outcomes)))

    def _remember_anchors(self, block: Block, events: tuple[LedgerEvent, ...]) -> None:
        """The state keeps headers only; who exports a proof needs the certificate and the registry as well."""
        if not any(isinstance(event, Anchored) for event in events):
            return
        payloads = {call.call_hash: call.payload for call in block.calls}
        for event in events:
            if isinstance(event, CallApplied) and event.call == AnchorPost.__name__:
                post = parse_payload(payloads[event.call_hash])
                assert isinstance(post, AnchorPost)
                registry = self.state.registries.get(post.header.epoch, ())
                self.anchor_proofs[post.header.epoch] = AnchorProof(post.header, post.certificate, registry)
        while len(self.anchor_proofs) > ANCHOR_PROOFS:
            self.anchor_proofs.pop(next(iter(self.anchor_proofs)))

    async def advanced(self) -> None:
        """Until the next block was applied."""
        await self._advanced.wait()

    async def caught_up(self) -> State:
        """The state once it includes everything that was final when this was called."""
        target = await self.ledger.finalized()
        while self.state.number < target.number:
            await self.advanced()
        return self.state

    async def outcome(self, receipt: Receipt, timeout_s: float) -> str:
        """Why a call had no effect, or "" if it had; LedgerError when it is not final in time."""
        with trio.move_on_after(timeout_s):
            while receipt.call_hash not in self.call_outcomes:
                await self.advanced()
            return self.call_outcomes[receipt.call_hash]
        raise LedgerError(
            f"call {short(receipt.call_hash)} is not final after {timeout_s:.0f} s",
            hint="it may still become final: look at `kaisar status` and try again later",
        )


@dataclass
class CallSubmitter:
    """Machines repeat a call until the ledger shows its effect; this hands it in once in a while only."""

    chain: Chain
    wallet: Wallet
    _sent: dict[str, tuple[bytes, int]] = field(default_factory=dict)

    async def submit_once(self, key: str, payload: bytes) -> None:
        """Ignored if the same call was handed in under this key less than RESUBMIT_BLOCKS blocks ago."""
        number = self.chain.state.number
        sent = self._sent.get(key)
        if sent is not None and sent[0] == payload and number < sent[1] + RESUBMIT_BLOCKS:
            return
        try:
            receipt = await self.chain.ledger.submit(payload, self.wallet)
        except CallRejected as error:
            log.warning("call %s was refused: %s", key, error)
            return
        except LedgerError as error:
            log.error("call %s could not be handed in: %s", key, error)
            return
        log.info("call %s handed in as %s", key, short(receipt.call_hash))
        self._sent[key] = (payload, number)
        if len(self._sent) > 1024:
            self._sent.pop(next(iter(self._sent)))
