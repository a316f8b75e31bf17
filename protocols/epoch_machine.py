"""The epoch committee's member: reveal, propose in turn, judge, vote, anchor, keep and serve the bodies.

Nodes without stake run it too: they judge and keep bodies, so that anybody can prove a leaf, but sign nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from kaisar_p2p.errors import DecodeError
from kaisar_p2p.wire import vrf
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair, sha256
from kaisar_p2p.wire.envelope import Verified, seal
from protocols.actions import (
    Action,
    Answer,
    BlockApplied,
    Duty,
    Event,
    Gossip,
    Incoming,
    Note,
    Publish,
    Reply,
    RequestEnded,
    Store,
    Submit,
    Wake,
)
from protocols.committees import epoch_members
from protocols.digests import header_hash
from protocols.epoch_body import (
    Known,
    assemble,
    check_body,
    header_of,
    is_over,
    last_slot_of,
    mix_input,
)
from protocols.epoch_fetch import ANCHORED, BODY, CERTIFICATE, page_of, parse_request
from protocols.epoch_gossip import MAX_ROUNDS, TOPIC, proposers
from protocols.epoch_library import Library, parse_body
from protocols.epoch_pool import Pool
from protocols.epoch_tally import Ended, Quorum, Tally
from protocols.epochs import FETCH_PROTOCOL, EpochBody, EpochHeader, HeaderProposal, HeaderVote, MixReveal
from protocols.equivocation import EVIDENCE, EVIDENCE_TOPIC, accused, evidence_id
from protocols.interpreter.calls import AnchorPost, payload_of
from protocols.interpreter.events import Anchored
from protocols.interpreter.state import State
from protocols.popw_votes import CERTIFICATE_TOPIC
from protocols.quorum import QuorumCertificate

NOT_DUE = 1 << 32
"""Since when a restored certificate is known: not since any slot, so nobody is blamed for not having had it."""
EARLY = 0.5
"""Part of the reveal window after which a reveal may be missing from a proposal."""


class EpochMachine:
    """One node's part in closing epochs.

    Args:
        keys: the machine key.
        network: 32-byte network id.
        certificates: (hash, encoded certificate) of what was stored under "certificate".
        bodies: (header hash, encoded body) of what was stored under "body", oldest first.
    """

    def __init__(
        self,
        keys: KeyPair,
        network: bytes,
        *,
        certificates: Iterable[tuple[bytes, bytes]] = (),
        bodies: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        self._keys = keys
        self._network = network
        self._state: State | None = None
        self._tallies: dict[int, Tally] = {}
        self._pool = Pool(network)
        self._library = Library(keys.public_key, network, bodies)
        self._deadline: float | None = None
        for _, data in certificates:
            self._restore(data)

    @property
    def deadline(self) -> float | None:
        """The next round, or when to submit in the proposer's place."""
        return self._deadline

    def step(self, event: Event, now: float) -> list[Action]:
        """React to blocks, gossip on three topics, requests for bodies, and answers to its own requests."""
        actions: list[Action] = []
        match event:
            case BlockApplied():
                actions += self._on_block(event, now)
            case Gossip():
                if event.topic not in (TOPIC, CERTIFICATE_TOPIC, EVIDENCE_TOPIC):
                    return []
                actions += self._on_gossip(event)
            case Incoming(protocol=protocol) if protocol == FETCH_PROTOCOL:
                return self._serve(event)
            case Answer() | RequestEnded():
                actions += self._on_answer(event, now)
            case Wake():
                pass
            case _:
                return []
        return actions + self._advance(now)

    # ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_block(self, event: BlockApplied, now: float) -> list[Action]:
        state = self._state = event.state
        actions: list[Action] = []
        for each in event.events:
            if isinstance(each, Anchored):
                actions += self._on_anchored(state, each.epoch, now, live=event.live)
        self._follow_base(state)
        if state.params.ends_epoch(state.number):
            actions += self._on_epoch_end(state, now, live=event.live)
        return actions

    def _on_epoch_end(self, state: State, now: float, *, live: bool) -> list[Action]:
        epoch = state.epoch
        tally = self._tallies.get(epoch) or Tally(epoch)
        # While catching up, rounds are counted from the block's own time: the others are in a later round by now.
        tally.ended = Ended(state, now if live else min(now, state.time_ms / 1000))
        self._tallies = {epoch: tally}
        if not live or not self._is_member(state, epoch):
            return []
        reveal = MixReveal(epoch, vrf.prove(self._keys.seed, mix_input(state, epoch)))
        duty = Duty(f"reveal/{epoch}", sha256(reveal.proof))
        return [Publish(TOPIC, seal(reveal, self._keys, self._network), duty)]

    def _on_anchored(self, state: State, epoch: int, now: float, *, live: bool) -> list[Action]:
        self._tallies = {each: kept for each, kept in self._tallies.items() if each > epoch}
        anchor = state.anchors[epoch]
        actions: list[Action] = [_anchored(anchor.header)] if live else []
        if live and self._library.get(anchor.header_hash) is None:
            actions += self._library.fetch_anchored(state, epoch, now)
        return actions

    def _follow_base(self, state: State) -> None:
        """Build on the newest anchor, and drop what no body on top of it can hold."""
        if self._library.follow(state):
            base = self._library.base
            self._pool.forget(lambda subject: is_over(subject, base, state.params))
            self._pool.forget_evidence(base.body.evidence if base.body is not None else ())

    # ── gossip ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_gossip(self, event: Gossip) -> list[Action]:
        state, message = self._state, event.message
        if state is None:
            return []
        if event.topic == CERTIFICATE_TOPIC and isinstance(message, QuorumCertificate):
            return self._on_certificate(message, state)
        if event.topic == EVIDENCE_TOPIC and isinstance(message, EVIDENCE):
            self._pool.add_evidence(evidence_id(message, self._network), state.slot, accused(message))
        elif event.topic == TOPIC and isinstance(message, Verified):
            return self._on_epoch_message(message, event.received_at, state)
        return []

    def _on_certificate(self, certificate: QuorumCertificate, state: State) -> list[Action]:
        digest = self._pool.add(certificate, state.slot)
        return [] if digest is None else [Store("certificate", digest, encode(certificate))]

    def _on_epoch_message(self, verified: Verified[object], received_at: float, state: State) -> list[Action]:
        message = verified.message
        epoch = message.header.epoch if isinstance(message, HeaderProposal) else getattr(message, "epoch", -1)
        if epoch <= state.last_anchor or epoch > state.epoch or epoch < max(self._tallies, default=0):
            return []
        tally = self._tallies.setdefault(epoch, Tally(epoch))
        if isinstance(message, MixReveal):
            tally.add_reveal(verified.signer, message, received_at)
        elif isinstance(message, HeaderProposal):
            tally.add_proposal(message.header, self._network)
        elif isinstance(message, HeaderVote):
            evidence = tally.add_vote(verified.signer, message, verified.envelope)
            if evidence is not None:
                data = (("kind", "double header"), ("offender", verified.signer.hex()), ("epoch", epoch))
                return [Publish(EVIDENCE_TOPIC, encode(evidence)), Note("evidence", data)]
        return []

    # ── propose, judge, submit ───────────────────────────────────────────────────────────────────────────────────────

    def _advance(self, now: float) -> list[Action]:
        """Do what is due, and say when to be woken."""
        self._deadline = None
        tally = next((tally for tally in self._tallies.values() if tally.ended is not None), None)
        if tally is None or tally.ended is None or self._state is None:
            return []
        round_ = tally.ended.round_at(now)
        actions: list[Action] = []
        if round_ >= 0:
            actions += self._propose(tally, tally.ended, round_, now)
            for header, digest in tally.open_proposals(round_):
                actions += self._judge(tally, tally.ended, header, digest, now)
        actions += self._submit(tally, tally.ended, now)
        times = [tally.ended.starts(round_ + 1)] if round_ + 1 < MAX_ROUNDS else []
        self._deadline = min((*times, *([tally.submit_at] if tally.submit_at is not None else [])), default=None)
        return actions

    def _propose(self, tally: Tally, ended: Ended, round_: int, now: float) -> list[Action]:
        order = proposers(ended.state, tally.epoch)
        if tally.proposed_round >= round_ or not order or order[round_ % len(order)] != self._keys.public_key:
            return []
        if self._library.lacks_base:
            return self._library.fetch_base(self._state, now)
        tally.proposed_round = round_
        body = self._assemble(tally, ended, round_)
        header = header_of(body, round_, ended.state, self._library.base, ended.state_root)
        digest = header_hash(header, self._network)
        tally.keep_body(digest, encode(body))
        envelope = seal(HeaderProposal(header), self._keys, self._network)
        return [Publish(TOPIC, envelope, Duty(f"propose/{tally.epoch}/{round_}", digest))]

    def _assemble(self, tally: Tally, ended: Ended, round_: int) -> EpochBody:
        """What this node proposes; evidence in the first round only, as what others lack must not hold up money."""
        evidence = self._pool.evidence(self._grace_slot(ended.state)) if round_ == 0 else ()
        return assemble(ended.state, self._library.base, tally.reveals(), self._pool.certificates().values(), evidence)

    def _judge(self, tally: Tally, ended: Ended, header: EpochHeader, digest: bytes, now: float) -> list[Action]:
        """Vote for a proposal whose every leaf was rebuilt here; get what is missing first."""
        if header.round <= tally.voted_round or header.previous != self._library.base.header_hash:
            return []  # voted in a later round, or an anchor is missing here: asked again with the next block
        if self._library.lacks_base:
            return self._library.fetch_base(self._state, now)
        if self._library.is_fetching(digest):
            return []
        data = tally.bodies.get(digest)
        if data is None:
            own = self._assemble(tally, ended, header.round)
            if header_of(own, header.round, ended.state, self._library.base, ended.state_root) != header:
                order = proposers(ended.state, tally.epoch)
                return self._library.fetch_proposed(digest, order[header.round % len(order)])
            data = encode(own)
        else:
            problem = self._problem(tally, ended, header, parse_body(data))
            if problem:
                tally.refused.add(digest)
                return [_refusal(header, problem)]
        return self._vote(tally, header, digest, data)

    def _problem(self, tally: Tally, ended: Ended, header: EpochHeader, body: EpochBody | None) -> str:
        if body is None:
            return "the body is malformed"
        known = Known(
            certificates=self._pool.certificates(),
            verified=self._pool.verified,
            due=self._pool.due(self._grace_slot(ended.state)),
            due_reveals=tally.reveals_before(ended.at + EARLY * ended.window_s),
            evidence=self._pool.evidence(),
        )
        problem = check_body(header, body, ended.state, self._library.base, ended.state_root, known)
        for certificate in body.certificates if not problem else ():
            self._pool.add(certificate, NOT_DUE)  # verified now: not again in the next round
        return problem

    def _vote(self, tally: Tally, header: EpochHeader, digest: bytes, data: bytes) -> list[Action]:
        tally.voted_round = header.round
        actions = self._library.hold(digest, data)
        if self._state is None or not self._is_member(self._state, header.epoch):
            return actions
        vote = HeaderVote(header.epoch, header.round, digest)
        duty = Duty(f"epoch/{header.epoch}/{header.round}", digest)
        return [*actions, Publish(TOPIC, seal(vote, self._keys, self._network), duty)]

    def _submit(self, tally: Tally, ended: Ended, now: float) -> list[Action]:
        for round_ in sorted(tally.changed_rounds):
            if tally.quorum is None or round_ > tally.quorum.header.round:
                quorum = tally.find_quorum(ended.state.registries.get(tally.epoch, ()), round_)
                if quorum is not None:
                    self._library.expect(quorum.header_hash)
                    tally.quorum, tally.submit_at = quorum, self._submission_time(ended, quorum, now)
        tally.changed_rounds.clear()
        if tally.quorum is None or tally.submit_at is None or now < tally.submit_at:
            return []
        tally.submit_at = None
        if tally.quorum.header.previous != self._library.base.header_hash:
            return []
        post = AnchorPost(tally.quorum.header, tally.quorum.certificate)
        return [Submit(f"anchor/{tally.epoch}", payload_of(post))]

    def _submission_time(self, ended: Ended, quorum: Quorum, now: float) -> float | None:
        """At once for the proposer; the others follow one after the other, in case that it died."""
        order = proposers(ended.state, quorum.header.epoch)
        if self._keys.public_key not in order:
            return None
        place = (order.index(self._keys.public_key) - quorum.header.round) % len(order)
        if place == 0:
            return now
        return now + ended.timeout_s + (place - 1) * 2 * ended.state.params.block_ms / 1000

    # ── bodies ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _on_answer(self, event: Answer | RequestEnded, now: float) -> list[Action]:
        if self._state is None:
            return []
        actions, fetched = self._library.on_answer(event, self._state, now)
        self._follow_base(self._state)
        for tally in self._tallies.values() if fetched is not None else ():
            if fetched is not None and fetched.data is not None:
                tally.keep_body(fetched.key, fetched.data)
            elif fetched is not None:
                tally.refused.add(fetched.key)
        return actions

    def _serve(self, event: Incoming) -> list[Action]:
        request = parse_request(event.payload)
        if request is None or request.kind not in (BODY, ANCHORED, CERTIFICATE):
            return [Reply(event.call_id, page_of(None, 0))]
        data = self._library.get(request.key)
        if request.kind == CERTIFICATE:
            certificate = self._pool.by_hash(request.key)
            data = encode(certificate) if certificate is not None else None
        for tally in self._tallies.values():
            data = data or tally.bodies.get(request.key)
        return [Reply(event.call_id, page_of(data, request.offset))]

    def _restore(self, data: bytes) -> None:
        try:
            self._pool.add(decode(QuorumCertificate, data), NOT_DUE)
        except DecodeError:
            return  # written by another version: it comes again with the next body

    def _is_member(self, state: State, epoch: int) -> bool:
        members = epoch_members(state.registries.get(epoch, ()))
        return any(key == self._keys.public_key and stake > 0 for key, stake in members)

    def _grace_slot(self, ended: State) -> int:
        """What was known in this slot or before, a proposer must have known too."""
        return last_slot_of(ended.epoch, ended.params) - ended.params.certificate_grace_slots


def _anchored(header: EpochHeader) -> Note:
    counts = (("verdicts", header.verdicts), ("rewards", header.rewards), ("leases", header.leases))
    return Note("epoch anchored", (("epoch", header.epoch), *counts, ("minted_planck", str(header.minted_planck))))


def _refusal(header: EpochHeader, problem: str) -> Note:
    return Note("epoch header refused", (("epoch", header.epoch), ("round", header.round), ("reason", problem)))
