"""The checker's side of a check: challenge, judge, vote, and count the votes of its committee (role checker).

A check goes WAITING → COMMITTED → CHECKING → VOTED, or straight to VOTED when there is nothing to recompute, or to
DROPPED when this node has no opinion: its own work failed, or its own backlog or isolation kept it from asking in time.
SILENT is voted only after an unusable answer or the end of the stream to the worker: an action that the journal refused
has neither, so a node that asked before a crash does not accuse the worker after it.
"""

from __future__ import annotations

from collections.abc import Callable

from kaisar_p2p.wire import matproof, vrf
from kaisar_p2p.wire.codec import decode, encode
from kaisar_p2p.wire.crypto import KeyPair, sha256
from kaisar_p2p.wire.envelope import Signed, seal
from kaisar_p2p.wire.matproof import CheckResult
from protocols.actions import (
    Action,
    Answer,
    BlockApplied,
    CheckTask,
    Compute,
    Duty,
    Event,
    Gossip,
    Incoming,
    Note,
    Publish,
    Reply,
    Request,
    RequestEnded,
    Wake,
    WorkDone,
)
from protocols.committees import check_committee
from protocols.due import DueCheck
from protocols.equivocation import EVIDENCE_TOPIC, LazyCheck, WrongResult
from protocols.interpreter.events import SlotStarted
from protocols.interpreter.state import State
from protocols.popw import (
    AGGREGATORS,
    BADJOB,
    CHALLENGE_PROTOCOL,
    COUNTED,
    ENVELOPE_BYTES_MAX,
    LATE,
    MAX_AGGREGATORS,
    NO_COMMIT,
    NO_DIGEST,
    PASS,
    REFUSED,
    SILENT,
    VERDICT_NAMES,
    VOTE_DEADLINE_S,
    VOTE_PROTOCOL,
    WRONG,
    Assignment,
    Challenge,
    Commit,
    CommitRequest,
    PrivatePart,
    Vote,
    aggregators,
    check_horizon_slots,
    commit_hash,
    core_hash,
    sample_input,
    seed_of,
    tags_bytes_max,
    validate_commit,
    validate_tags,
)
from protocols.popw_check import Check, Stage
from protocols.popw_commits import Commitments, parse_commit_request
from protocols.popw_votes import (
    CERTIFICATE_TOPIC,
    Tally,
    is_core_vote,
    parse_vote,
    verdict_duty,
)
from protocols.quorum import Committee, QuorumCertificate, VerdictCore, check_signature
from protocols.recheck import OpenChecks

ASSIGNMENT_TOPIC = "assignment"
MAX_CHECKS = 256
MARGIN_S = 0.35
"""Beyond challenge wait and deadline: no honest commit is that late."""
RETRY_S = 0.25
"""Between attempts to reach a worker, while it still waits for challenges."""
VOTE_PATIENCE_S = 4.0
"""After this long without a certificate, the vote goes to the next two members as well."""


class SeatMachine:
    """Checks workers in every committee in which this node has a seat, and aggregates those committees' votes."""

    def __init__(self, keys: KeyPair, entropy: Callable[[int], bytes], *, max_checks: int = MAX_CHECKS) -> None:
        """`entropy(n)` gives n fresh random bytes; at most `max_checks` checks are under way, more are left out."""
        self._keys = keys
        self._entropy = entropy
        self._max_checks = max_checks
        self._checks: dict[str, Check] = {}
        self._open = OpenChecks()
        self._state: State | None = None

    @property
    def deadline(self) -> float | None:
        """The next retry of a challenge or a vote."""
        times = [at for check in self._checks.values() for at in (check.retry_at, check.patience_at) if at is not None]
        return min(times, default=None)

    @property
    def checks(self) -> tuple[Check, ...]:
        """The checks that are remembered, for statistics and tests."""
        return tuple(self._checks.values())

    def step(self, event: Event, now: float) -> list[Action]:
        """React to one event."""
        match event:
            case BlockApplied():
                return self._block(event, now)
            case Incoming(protocol=protocol) if protocol == VOTE_PROTOCOL:
                return self._incoming_vote(event)
            case Answer():
                return self._answer(event, now)
            case RequestEnded():
                return self._ended(event, now)
            case WorkDone():
                return self._work_done(event, now)
            case Gossip(topic=topic, message=QuorumCertificate() as certificate) if topic == CERTIFICATE_TOPIC:
                return self._certified(certificate)
            case Gossip(topic=topic, message=WrongResult() | LazyCheck() as evidence) if topic == EVIDENCE_TOPIC:
                return self._proven(evidence)
            case Wake():
                return self._wake(now)
            case _:
                return []

    # ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self, event: BlockApplied, now: float) -> list[Action]:
        self._state = state = event.state
        oldest = state.slot - check_horizon_slots(state.params)
        for name in [name for name, check in self._checks.items() if check.challenge.slot < oldest]:
            del self._checks[name]
        if not event.live:
            return []
        slots = [started.slot for started in event.events if isinstance(started, SlotStarted)]
        return [action for slot in slots for action in self._start_slot(state, slot, now)]

    def _start_slot(self, state: State, slot: int, now: float) -> list[Action]:
        actions: list[Action] = []
        for due in self._open.start(state, slot):
            committee = check_committee(state, slot, due.worker)
            if committee is None or self._keys.public_key not in committee.seats:
                continue
            if len(self._checks) >= self._max_checks:
                actions.append(Note("check_skipped", (("slot", slot), ("worker", due.worker.hex()))))
                break
            actions += self._start_check(state, slot, due, committee, now)
        return actions

    def _start_check(self, state: State, slot: int, due: DueCheck, committee: Committee, now: float) -> list[Action]:
        name, seat = f"{slot}/{due.worker.hex()}", committee.seats.index(self._keys.public_key)
        if name in self._checks:
            return []
        challenge = Challenge(state.params.epoch_of_slot(slot), slot, due.worker, seat, self._entropy(32))
        payload, beacon = seal(challenge, self._keys, state.network), state.beacons[slot]
        order = aggregators(committee, beacon, due.worker, state.network)
        tally = Tally(committee, seat)
        commitments = Commitments(name, CommitRequest(slot, due.worker))
        check = Check(name, due, challenge, payload, beacon, state.params.job, order, tally, commitments, now, now)
        self._checks[name] = check
        actions: list[Action] = [self._ask(check, state)]
        if order[0] == self._keys.public_key:
            assignment = Assignment(challenge.epoch, slot, due.worker, committee.seats)
            actions.append(Publish(ASSIGNMENT_TOPIC, seal(assignment, self._keys, state.network)))
        return actions

    def _ask(self, check: Check, state: State) -> Request:
        params = state.params
        wait_ms = params.challenge_wait_ms + params.deadline_ms + params.tags_wait_ms
        return Request(
            request_id=f"chal/{check.name}/{check.attempt}",
            peer=check.due.worker,
            protocol=CHALLENGE_PROTOCOL,
            payload=check.payload,
            deadline_s=wait_ms / 1000 + MARGIN_S,
            max_frames=2,
            duty=Duty(f"challenge/{check.name}", sha256(check.payload)),
            max_reply_bytes=max(ENVELOPE_BYTES_MAX, tags_bytes_max(check.job)),
        )

    # ── the worker's answer ──────────────────────────────────────────────────────────────────────────────────────────

    def _find(self, identifier: str, kind: str) -> Check | None:
        parts = identifier.split("/")
        return self._checks.get("/".join(parts[1:3])) if parts[0] == kind else None

    def _answer(self, event: Answer, now: float) -> list[Action]:
        check = self._find(event.request_id, "chal")
        if check is not None and self._state is not None:
            if check.stage is Stage.WAITING:
                return self._commit_frame(check, event, self._state, now)
            if check.stage is Stage.COMMITTED:
                return self._tags_frame(check, event, now)
            return []
        asked = self._find(event.request_id, "commit")
        if asked is not None and self._state is not None:
            return asked.commitments.seen(event.payload, self._state)
        voted = self._find(event.request_id, "vote")
        if voted is not None and event.payload == COUNTED:
            voted.pending.discard(event.request_id)
        return []

    def _commit_frame(self, check: Check, event: Answer, state: State, now: float) -> list[Action]:
        _left(check, event.sent_at)
        elapsed_s = max(0.0, event.received_at - check.sent_at)
        limit_ms = state.params.challenge_wait_ms + state.params.deadline_ms
        _, _, verified = validate_commit(event.payload, check.challenge, check.committee, state.network)
        if verified is None or elapsed_s > limit_ms / 1000 + MARGIN_S:
            return self._silent(check, now)
        check.elapsed_ms = min(int(elapsed_s * 1000), 2**32 - 1)
        check.commit, check.commitments.envelope = verified.message, event.payload
        check.commitments.hash = commit_hash(verified.message, state.network)
        if verified.message.job != check.job.pack() or len(verified.message.roots) != check.job.rounds:
            return self._vote(check, BADJOB, now)
        check.stage = Stage.COMMITTED
        return []

    def _tags_frame(self, check: Check, event: Answer, now: float) -> list[Action]:
        tags = validate_tags(event.payload, check.job)
        if tags is None or check.commit is None or self._state is None:
            found = check.commitments.seen(event.payload, self._state) if self._state is not None else []
            return [*found, *self._silent(check, now)]
        check.stage, check.tags = Stage.CHECKING, tags.rounds
        check.proof = vrf.prove(self._keys.seed, sample_input(check.commitments.hash))
        task = CheckTask(
            job=check.job,
            seed=seed_of(check.commit, check.beacon, self._state.network),
            roots=check.commit.roots,
            tags=tags.rounds,
            randomness=vrf.proof_to_hash(check.proof),
            samples=check.due.samples,
        )
        return [Compute(f"check/{check.name}", task)]

    def _ended(self, event: RequestEnded, now: float) -> list[Action]:
        check = self._find(event.request_id, "chal")
        if check is None:
            return self._vote_ended(event, now)
        if check.stage not in (Stage.WAITING, Stage.COMMITTED) or self._state is None:
            return []
        if not event.local:
            _left(check, event.began_at)
        asks_until = check.started_at + self._state.params.challenge_wait_ms / 1000
        if check.stage is Stage.WAITING and event.error and now + RETRY_S < asks_until:
            check.retry_at = now + RETRY_S
            return []
        return _dropped(check, event.error) if event.local else self._silent(check, now)

    def _silent(self, check: Check, now: float) -> list[Action]:
        """No usable answer: the worker's silence, unless we asked so late that it may have closed already."""
        assert self._state is not None
        if (check.sent_at - check.started_at) * 1000 > self._state.params.challenge_wait_ms / 2:
            return _dropped(check, "this node asked too late")
        return self._vote(check, SILENT, now)

    def _work_done(self, event: WorkDone, now: float) -> list[Action]:
        check = self._find(event.work_id, "check")
        if check is None or check.stage is not Stage.CHECKING or self._state is None:
            return []
        result = event.result
        if not isinstance(result, CheckResult):
            return _dropped(check, event.error)
        if result.ok:
            late = check.elapsed_ms > self._state.params.deadline_ms
            return self._vote(check, LATE if late else PASS, now, result.digest)
        if result.first_bad is None:
            # The tags are not those that the worker committed to. That cannot be shown to others, so it did not answer.
            return self._vote(check, SILENT, now)
        evidence = self._evidence(check, *result.first_bad)
        return [*evidence, *self._vote(check, WRONG, now, result.digest)]

    def _evidence(self, check: Check, round_index: int, tile: int) -> list[Action]:
        tags = matproof.tags_from_bytes(check.job, check.tags[round_index])
        chunk, path = matproof.chunk_path(tags, tile)
        wrong = WrongResult(decode(Signed, check.commitments.envelope), round_index, tile, chunk, path)
        note = Note(
            "evidence",
            (("kind", "wrong result"), ("offender", check.due.worker.hex()), ("slot", check.challenge.slot)),
        )
        assert self._state is not None
        return [Publish(EVIDENCE_TOPIC, encode(wrong)), note, *check.tally.found_wrong(wrong, self._state)]

    # ── the vote ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _vote(self, check: Check, verdict: int, now: float, digest: bytes = NO_DIGEST) -> list[Action]:
        assert self._state is not None
        network, own = self._state.network, check.challenge
        commitment = NO_COMMIT if verdict == SILENT else check.commitments.hash
        core = VerdictCore(own.epoch, own.slot, own.worker, commitment, verdict)
        signature = self._sign(core, network)
        proof = b"" if verdict in (SILENT, BADJOB) else check.proof
        private = PrivatePart(core_hash(core, network), own.seat, check.elapsed_ms, proof, digest)
        check.vote = encode(Vote(core, signature, private, self._sign(private, network)))
        check.stage, check.duty, check.tags = Stage.VOTED, verdict_duty(core), ()
        check.retry_at, check.patience_at = None, now + VOTE_PATIENCE_S
        data = (("slot", own.slot), ("worker", own.worker.hex()), ("verdict", VERDICT_NAMES[verdict]))
        actions: list[Action] = [Note("check", (*data, ("elapsed_ms", check.elapsed_ms)))]
        signed = check_signature(core, own.seat, signature, check.committee, network)
        if signed is not None:
            actions += check.tally.count(signed)
        return [*actions, *self._send_vote(check, AGGREGATORS)]

    def _sign(self, value: VerdictCore | PrivatePart, network: bytes) -> bytes:
        return self._keys.sign(value.DOMAIN, network, encode(value))

    def _send_vote(self, check: Check, count: int) -> list[Action]:
        """Send the vote to the next `count` members in the order of aggregation; our own was counted already."""
        first, last = check.asked, min(check.asked + count, len(check.order), MAX_AGGREGATORS)
        check.asked = last
        requests: list[Action] = []
        for rank in range(first, last):
            if check.order[rank] == self._keys.public_key:
                continue
            identifier = f"vote/{check.name}/{rank}"
            check.pending.add(identifier)
            requests.append(
                Request(identifier, check.order[rank], VOTE_PROTOCOL, check.vote, VOTE_DEADLINE_S, 1, check.duty)
            )
        return requests

    def _vote_ended(self, event: RequestEnded, now: float) -> list[Action]:
        """An aggregator that did not count the vote is replaced by the next member."""
        check = self._find(event.request_id, "vote")
        if check is None or event.request_id not in check.pending:
            return []
        check.pending.discard(event.request_id)
        return [] if check.tally.closed else self._send_vote(check, 1)

    def _incoming_vote(self, event: Incoming) -> list[Action]:
        if is_core_vote(event.payload):
            return []
        request = parse_commit_request(event.payload)
        if request is not None:
            return [self._own_commit(request, event)]
        vote = parse_vote(event.payload)
        check = self._checks.get(f"{vote.core.slot}/{vote.core.worker.hex()}") if vote else None
        if vote is None or check is None or self._state is None:
            return [Reply(event.call_id, REFUSED)]
        answer, actions = check.tally.receive(vote, event.peer, self._state)
        other = check.commitments.named(vote.core.commit, event.peer) if answer == COUNTED else []
        return [Reply(event.call_id, answer), *actions, *other]

    def _own_commit(self, request: CommitRequest, event: Incoming) -> Reply:
        """Another seat has a different commitment; what we voted on is shown to the committee only."""
        check = self._checks.get(f"{request.slot}/{request.worker.hex()}")
        if check is None or check.stage is not Stage.VOTED or event.peer not in check.committee.seats:
            return Reply(event.call_id, REFUSED)
        return Reply(event.call_id, check.commitments.envelope or REFUSED)

    def _certified(self, certificate: QuorumCertificate) -> list[Action]:
        core = certificate.core
        if not isinstance(core, VerdictCore):
            return []
        self._open.certified(core.worker, core.slot)
        check = self._checks.get(f"{core.slot}/{core.worker.hex()}")
        if check is not None:
            check.tally.closed, check.patience_at = True, None
            first = certificate.mask.bit_length() - 1
            if 0 <= first < len(check.committee.seats):
                return check.commitments.named(core.commit, check.committee.seats[first])
        return []

    def _proven(self, evidence: WrongResult | LazyCheck) -> list[Action]:
        """Another seat's evidence on a check of ours; its rules hold a right commit, so it can be decoded."""
        commit, state = decode(Commit, evidence.commit.body), self._state
        check = self._checks.get(f"{commit.slot}/{commit.worker.hex()}")
        if check is None or state is None:
            return []
        found = check.tally.found_wrong(evidence, state) if isinstance(evidence, WrongResult) else []
        return [*found, *check.commitments.seen(encode(evidence.commit), state)]

    def _wake(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for check in self._checks.values():
            if check.retry_at is not None and check.retry_at <= now and self._state is not None:
                check.retry_at, check.attempt = None, check.attempt + 1
                if not check.reached_out:
                    check.sent_at = now
                actions.append(self._ask(check, self._state))
            if check.patience_at is not None and check.patience_at <= now:
                check.patience_at = None
                if not check.tally.closed:
                    actions += self._send_vote(check, AGGREGATORS)
        return actions


def _left(check: Check, at: float) -> None:
    """A challenge left this node, at `at` if that is known; later attempts count from the first, which may arrive."""
    if not check.reached_out:
        check.reached_out, check.sent_at = True, max(check.sent_at, at)


def _dropped(check: Check, error: str) -> list[Action]:
    """No opinion: whatever failed was ours."""
    check.stage, check.tags, check.retry_at = Stage.DROPPED, (), None
    return [Note("check_failed", (("slot", check.challenge.slot), ("error", error[:200])))]
