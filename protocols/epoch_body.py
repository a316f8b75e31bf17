"""Building an epoch's body and header, and checking those of somebody else. Pure: equal inputs, equal bytes.

A body continues the newest anchored one (`Base`). It covers the slots from there to the end of its epoch, so an epoch
that was never anchored is made up for by the next one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate

from kaisar_p2p.wire import merkle, vrf
from kaisar_p2p.wire.codec import encode
from kaisar_p2p.wire.crypto import domain, domain_hash
from protocols.committees import check_committee, epoch_members, verify_certificate
from protocols.deploy import DOWN, GONE, WITNESSED
from protocols.digests import registry_root
from protocols.epochs import (
    EVIDENCE,
    LEASES,
    MAX_LEAVES,
    REWARDS,
    VERDICTS,
    EpochBody,
    EpochHeader,
    LeaseLeaf,
    SignedReveal,
    VerdictLeaf,
)
from protocols.interpreter.state import OrderState, State
from protocols.params import Params
from protocols.popw import VERDICT_NAMES
from protocols.quorum import Committee, QuorumCertificate, VerdictCore, WitnessCore
from protocols.recheck import may_have_been_checked
from protocols.rewards import cumulative_leaves, epoch_rewards
from protocols.settlement import is_watched, lease_leaf, needs_leaf, seen_windows, up_windows

NO_HEADER = bytes(32)
"""`previous` of the first header of a network."""
MAX_CERTIFICATES = 65_536
CERTIFICATE_BYTES_MAX = 8_192
MAX_CERTIFICATES_BYTES = 24 << 20
"""Certificates of a body; with its leaves it stays below what can be fetched (`epoch_fetch.OBJECT_BYTES_MAX`)."""
MAX_REVEALS = 256
Subject = tuple[int, int, bytes]
"""(slot, message tag, worker or order): what at most one certificate of all bodies is about; also their order."""


@dataclass(frozen=True)
class Base:
    """What a new body continues: the newest anchored header with its body, or nothing at all."""

    header: EpochHeader | None
    header_hash: bytes
    body: EpochBody | None

    @property
    def first_slot(self) -> int:
        """The first slot that is not covered yet."""
        return self.header.last_slot + 1 if self.header is not None else 0

    @cached_property
    def subjects(self) -> frozenset[Subject]:
        """What the body has certificates on."""
        subjects = (subject_of(certificate) for certificate in self.body.certificates) if self.body else ()
        return frozenset(subject for subject in subjects if subject is not None)


GENESIS = Base(None, NO_HEADER, None)


def last_slot_of(epoch: int, params: Params) -> int:
    """The last slot of an epoch."""
    return (epoch + 1) * params.epoch_slots - 1


# ── what counts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def certificate_hash(certificate: QuorumCertificate, network: bytes) -> bytes:
    """Identity of a certificate: what a verdict leaf holds, and the key to fetch it by."""
    return domain_hash("kaisar/cert", network, encode(certificate))


def preference(certificate: QuorumCertificate, digest: bytes) -> tuple[int, bytes]:
    """Of several certificates on one subject the smallest counts: the most votes, then the lowest hash.

    By the hash alone, an aggregator could choose who of those that voted is paid.
    """
    return -len(certificate.signatures), digest


def subject_of(certificate: QuorumCertificate) -> Subject | None:
    """What the certificate is about; None for kinds that epochs do not collect."""
    core = certificate.core
    if isinstance(core, VerdictCore):
        return core.slot, _tag(VerdictCore), core.worker
    if isinstance(core, WitnessCore):
        return core.slot, _tag(WitnessCore), core.order_id
    return None


def _tag(cls: type) -> int:
    return int(cls.TAG)  # type: ignore[attr-defined]


def committee_of(state: State, certificate: QuorumCertificate) -> Committee | None:
    """Who may sign this certificate by the ledger; None when that is unknown or its content makes no sense."""
    core = certificate.core
    if isinstance(core, VerdictCore):
        if core.epoch != state.params.epoch_of_slot(core.slot) or core.verdict not in VERDICT_NAMES:
            return None
        if not may_have_been_checked(state, core.slot, core.worker):
            return None
        return check_committee(state, core.slot, core.worker)
    if isinstance(core, WitnessCore):
        order = state.orders.get(core.order_id)
        if order is None or order.worker != core.worker or core.status not in WITNESSED:
            return None
        if not is_watched(order, core.slot, state.params):
            return None
        return Committee(order.seats, order.threshold)
    return None


def is_valid(state: State, certificate: QuorumCertificate) -> bool:
    """Whether the right committee signed the certificate; about 60 µs for each signature."""
    committee = committee_of(state, certificate)
    return committee is not None and verify_certificate(certificate, committee, state.network)


def is_over(subject: Subject, base: Base, params: Params) -> bool:
    """Whether no body on top of `base` can hold a certificate on this subject.

    Certificates of the last `certificate_grace_slots` slots before the base's end often come too late for its body:
    they count in the next one, if they are not in that one.
    """
    if subject[0] >= base.first_slot:
        return False
    return subject[0] < base.first_slot - params.certificate_grace_slots or subject in base.subjects


def counts(state: State, base: Base, subject: Subject) -> bool:
    """Whether a certificate on this subject belongs into the body of `state`'s epoch on top of `base`."""
    return subject[0] <= last_slot_of(state.epoch, state.params) and not is_over(subject, base, state.params)


# ── the mix ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def mix_input(state: State, epoch: int) -> bytes:
    """VRF input of the reveals of an epoch."""
    mix = state.mixes.get(epoch, NO_HEADER)
    return domain("kaisar/mix", state.network) + epoch.to_bytes(4, "big") + mix


def mix_of(state: State, epoch: int, reveals: Iterable[SignedReveal]) -> bytes:
    """The mix that verified reveals make: hash over their outputs in the order of keys, or over the old mix if none."""
    outputs = [vrf.proof_to_hash(reveal.proof) for reveal in sorted(reveals, key=lambda reveal: reveal.key)]
    parts = outputs or [state.mixes.get(epoch, NO_HEADER)]
    return domain_hash("kaisar/mix", state.network, epoch.to_bytes(4, "big"), *parts)


# ── body, trees, header ──────────────────────────────────────────────────────────────────────────────────────────────


def assemble(
    state: State,
    base: Base,
    reveals: Iterable[SignedReveal],
    certificates: Iterable[QuorumCertificate],
    evidence: Iterable[bytes] = (),
) -> EpochBody:
    """The body of `state`'s epoch.

    Args:
        state: after the last block of the epoch.
        base: the newest anchored header, with its body.
        reveals: verified ones; any order.
        certificates: valid ones (`is_valid`); any order. Those that do not count are left out, and of several on one
            subject the one by `preference` is taken.
        evidence: hashes of verified evidence.
    """
    epoch, params = state.epoch, state.params
    chosen = _chosen(state, base, certificates)
    slots = range(base.first_slot, last_slot_of(epoch, params) + 1)
    old_leases = {leaf.order_id: leaf for leaf in base.body.leases} if base.body is not None else {}
    leases = _leases(state, slots, old_leases, chosen)
    seconds = {leaf.order_id: leaf.seconds - _seconds(old_leases.get(leaf.order_id)) for leaf in leases}
    old_rewards = base.body.rewards if base.body is not None else ()
    return EpochBody(
        epoch=epoch,
        reveals=tuple(sorted(reveals, key=lambda reveal: reveal.key))[:MAX_REVEALS],
        certificates=chosen,
        rewards=cumulative_leaves(old_rewards, epoch_rewards(state, epoch, slots, chosen, seconds)),
        leases=leases,
        evidence=tuple(sorted(set(evidence))),
    )


def leaves_of(body: EpochBody, tree: int, network: bytes) -> tuple[bytes, ...]:
    """Leaf data of one of the trees VERDICTS, REWARDS, LEASES, EVIDENCE, in the tree's order."""
    if tree == VERDICTS:
        return tuple(
            encode(leaf)
            for certificate in body.certificates
            if (leaf := verdict_leaf(certificate, network)) is not None
        )
    if tree == REWARDS:
        return tuple(encode(leaf) for leaf in body.rewards)
    if tree == LEASES:
        return tuple(encode(leaf) for leaf in body.leases)
    if tree == EVIDENCE:
        return body.evidence
    raise ValueError(f"there is no tree {tree}")


def verdict_leaf(certificate: QuorumCertificate, network: bytes) -> VerdictLeaf | None:
    """The leaf of a check; None for other certificates, which show in the lease leaves."""
    core = certificate.core
    if not isinstance(core, VerdictCore):
        return None
    digest = certificate_hash(certificate, network)
    votes = certificate.mask.bit_count()
    return VerdictLeaf(core.epoch, core.slot, core.worker, core.verdict, votes, core.commit, digest)


def header_of(body: EpochBody, round_: int, state: State, base: Base, state_root: bytes) -> EpochHeader:
    """The header over a body. `state_root` is that of `state`."""
    trees = [leaves_of(body, tree, state.network) for tree in (VERDICTS, REWARDS, LEASES, EVIDENCE)]
    roots = [merkle.root(tree) for tree in trees]
    old = sum(leaf.cumulative_planck for leaf in base.body.rewards) if base.body is not None else 0
    return EpochHeader(
        epoch=body.epoch,
        round=round_,
        first_slot=base.first_slot,
        last_slot=last_slot_of(body.epoch, state.params),
        previous=base.header_hash,
        mix=mix_of(state, body.epoch, body.reveals),
        registry_root=registry_root(state.registries.get(body.epoch, ())),
        state_root=state_root,
        verdict_root=roots[VERDICTS],
        reward_root=roots[REWARDS],
        lease_root=roots[LEASES],
        evidence_root=roots[EVIDENCE],
        log_root=merkle.EMPTY_ROOT,
        verdicts=len(trees[VERDICTS]),
        rewards=len(trees[REWARDS]),
        leases=len(trees[LEASES]),
        evidence=len(trees[EVIDENCE]),
        minted_planck=sum(leaf.cumulative_planck for leaf in body.rewards) - old,
    )


def belongs_to(body: EpochBody, header: EpochHeader, network: bytes) -> bool:
    """Whether the body has the header's roots and counts: enough for a header that is anchored."""
    roots = (header.verdict_root, header.reward_root, header.lease_root, header.evidence_root)
    sizes = (header.verdicts, header.rewards, header.leases, header.evidence)
    for tree in (VERDICTS, REWARDS, LEASES, EVIDENCE):
        leaves = leaves_of(body, tree, network)
        if len(leaves) != sizes[tree] or merkle.root(leaves) != roots[tree]:
            return False
    return body.epoch == header.epoch


# ── checking somebody else's ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Known:
    """What a member knows by itself when it judges a proposal.

    `certificates` and `evidence` are verified; `verified` has the hashes of more certificates that are. `due` are the
    subjects, and `due_reveals` the checkers, that the proposer must have known of as well, because they were known here
    early enough.
    """

    certificates: Mapping[Subject, QuorumCertificate]
    due: frozenset[Subject] = frozenset()
    due_reveals: frozenset[bytes] = frozenset()
    evidence: frozenset[bytes] = frozenset()
    verified: Container[bytes] = frozenset()


def check_body(header: EpochHeader, body: EpochBody, state: State, base: Base, state_root: bytes, known: Known) -> str:
    """Why a member must not sign this header, or "" if it may: every leaf is recomputed, every signature checked."""
    if body.epoch != header.epoch or header.epoch != state.epoch:
        return "the body is of another epoch"
    problem = _check_reveals(body, state, known) or _check_certificates(body, state, base, known)
    if problem:
        return problem
    if not known.evidence.issuperset(body.evidence):
        return "evidence that is not known here"
    rebuilt = assemble(state, base, body.reveals, body.certificates, body.evidence)
    for name in ("reveals", "certificates", "rewards", "leases", "evidence"):
        if getattr(rebuilt, name) != getattr(body, name):
            return f"wrong {name}"
    own = header_of(rebuilt, header.round, state, base, state_root)
    wrong = [item.name for item in fields(own) if getattr(own, item.name) != getattr(header, item.name)]
    return f"wrong {', '.join(wrong)} in the header" if wrong else ""


def _check_reveals(body: EpochBody, state: State, known: Known) -> str:
    members = {key for key, stake in epoch_members(state.registries.get(body.epoch, ())) if stake > 0}
    alpha = mix_input(state, body.epoch)
    keys = [reveal.key for reveal in body.reveals]
    if len(set(keys)) != len(keys) or not members.issuperset(keys):
        return "a reveal of somebody who is not in the registry, or two of one member"
    if len(keys) < MAX_REVEALS and not known.due_reveals.issubset(keys):
        return "a reveal that was published in time is left out"
    if any(vrf.verify(reveal.key, alpha, reveal.proof) is None for reveal in body.reveals):
        return "a false reveal"
    return ""


def _check_certificates(body: EpochBody, state: State, base: Base, known: Known) -> str:
    included = set()
    for certificate in body.certificates:
        subject = subject_of(certificate)
        if subject is None or not counts(state, base, subject):
            return "a certificate that does not belong into this epoch"
        if not _is_verified(certificate, subject, state, known):
            return "an invalid certificate"
        included.add(subject)
    missing = [subject for subject in known.due - included if _must_count(state, base, known.certificates.get(subject))]
    if missing and _is_full(body) and min(map(_rank, missing)) > max(map(_rank, included)):
        return ""
    return f"{len(missing)} certificates that were known in time are left out" if missing else ""


def _is_full(body: EpochBody) -> bool:
    """Whether one more certificate, of any size, may have found no room."""
    size = sum(len(encode(each)) for each in body.certificates)
    return len(body.certificates) == MAX_CERTIFICATES or size + CERTIFICATE_BYTES_MAX > MAX_CERTIFICATES_BYTES


def _is_verified(certificate: QuorumCertificate, subject: Subject, state: State, known: Known) -> bool:
    """By gossip, or now: signatures cost a hundred times as much as the hash."""
    if known.certificates.get(subject) == certificate:
        return True
    return certificate_hash(certificate, state.network) in known.verified or is_valid(state, certificate)


def _must_count(state: State, base: Base, certificate: QuorumCertificate | None) -> bool:
    """Whether leaving it out is wrong: its committee can also have become unknown, after epochs without an anchor."""
    subject = subject_of(certificate) if certificate is not None else None
    if certificate is None or subject is None:
        return False
    return counts(state, base, subject) and committee_of(state, certificate) is not None


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _chosen(state: State, base: Base, certificates: Iterable[QuorumCertificate]) -> tuple[QuorumCertificate, ...]:
    best: dict[Subject, tuple[tuple[int, bytes], QuorumCertificate]] = {}
    for certificate in certificates:
        subject = subject_of(certificate)
        if subject is None or not counts(state, base, subject) or committee_of(state, certificate) is None:
            continue
        order = preference(certificate, certificate_hash(certificate, state.network))
        if subject not in best or order < best[subject][0]:
            best[subject] = order, certificate
    return tuple(best[subject][1] for subject in _as_many_as_fit({key: each for key, (_, each) in best.items()}))


def _as_many_as_fit(certificates: Mapping[Subject, QuorumCertificate]) -> list[Subject]:
    """In order. A body that is too large could not be fetched, and its epoch would not be anchored."""
    ranked = sorted(certificates, key=_rank)[:MAX_CERTIFICATES]
    sizes = accumulate(len(encode(certificates[subject])) for subject in ranked)
    return sorted(ranked[: sum(size <= MAX_CERTIFICATES_BYTES for size in sizes)])


def _rank(subject: Subject) -> tuple[bool, Subject]:
    """What comes first when there is no room for all: windows of leases, because money depends on them."""
    return subject[1] != _tag(WitnessCore), subject


def _leases(
    state: State, slots: range, old: Mapping[bytes, LeaseLeaf], certificates: tuple[QuorumCertificate, ...]
) -> tuple[LeaseLeaf, ...]:
    up, gone, down = up_windows(certificates), seen_windows(certificates, GONE), seen_windows(certificates, DOWN)
    return tuple(
        lease_leaf(
            order_id,
            order,
            old.get(order_id),
            up.get(order_id, ()),
            slots.stop - 1,
            state.params,
            gone=gone.get(order_id, ()),
            down=down.get(order_id, ()),
        )
        for order_id, order in _orders_with_leaves(state, slots.start)
    )


def _orders_with_leaves(state: State, first_slot: int) -> list[tuple[bytes, OrderState]]:
    """Sorted by id; the oldest when there are too many, so that new ones cannot crowd out those that run."""
    orders = [pair for pair in state.orders.items() if needs_leaf(pair[1], first_slot, state.params)]
    orders.sort(key=lambda pair: (pair[1].placed_block, pair[0]))
    return sorted(orders[:MAX_LEAVES], key=lambda pair: pair[0])


def _seconds(leaf: LeaseLeaf | None) -> int:
    return leaf.seconds if leaf is not None else 0
