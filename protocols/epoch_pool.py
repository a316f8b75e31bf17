"""The certificates and evidence that wait for an epoch's body, with when they were known: bounded, one per subject."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass

from protocols.epoch_body import MAX_CERTIFICATES, Subject, certificate_hash, preference, subject_of
from protocols.quorum import QuorumCertificate

MAX_EVIDENCE = 4096
EVIDENCE_OF_ONE = 4
"""Pieces of evidence about one key that wait for a body."""
MAX_VERIFIED = 4 * MAX_CERTIFICATES


@dataclass(frozen=True)
class _Entry:
    certificate: QuorumCertificate
    digest: bytes
    since_slot: int


class Pool:
    """Certificates by subject (of several by `preference`), evidence by id, each with the slot in which it came."""

    def __init__(self, network: bytes) -> None:
        self._network = network
        self._entries: dict[Subject, _Entry] = {}
        self._subjects: dict[bytes, Subject] = {}
        self._verified: dict[bytes, Subject] = {}
        self._evidence: dict[bytes, tuple[int, bytes]] = {}
        self._accused: Counter[bytes] = Counter()

    def add(self, certificate: QuorumCertificate, slot: int) -> bytes | None:
        """Keep a verified certificate that came in `slot`; returns its hash if it is new and kept."""
        subject = subject_of(certificate)
        if subject is None:
            return None
        digest = certificate_hash(certificate, self._network)
        if len(self._verified) < MAX_VERIFIED:
            self._verified[digest] = subject
        old = self._entries.get(subject)
        if old is None and len(self._entries) >= MAX_CERTIFICATES:
            return None
        if old is not None:
            if preference(certificate, digest) >= preference(old.certificate, old.digest):
                return None
            del self._subjects[old.digest]
            slot = min(slot, old.since_slot)
        self._entries[subject] = _Entry(certificate, digest, slot)
        self._subjects[digest] = subject
        return digest

    def add_evidence(self, digest: bytes, slot: int, offender: bytes) -> None:
        """Keep the id of verified evidence; a few of one offender, who could make any number against itself."""
        if digest in self._evidence or len(self._evidence) >= MAX_EVIDENCE:
            return
        if self._accused[offender] < EVIDENCE_OF_ONE:
            self._accused[offender] += 1
            self._evidence[digest] = slot, offender

    def by_hash(self, digest: bytes) -> QuorumCertificate | None:
        """The certificate with this hash."""
        subject = self._subjects.get(digest)
        return self._entries[subject].certificate if subject is not None else None

    @property
    def verified(self) -> Container[bytes]:
        """Hashes of all certificates that were added, also of those that gave way to a better one on their subject."""
        return self._verified.keys()

    def certificates(self) -> dict[Subject, QuorumCertificate]:
        """All certificates by subject."""
        return {subject: entry.certificate for subject, entry in self._entries.items()}

    def due(self, last_slot: int) -> frozenset[Subject]:
        """Subjects that were known in or before `last_slot`."""
        return frozenset(subject for subject, entry in self._entries.items() if entry.since_slot <= last_slot)

    def evidence(self, last_slot: int | None = None) -> frozenset[bytes]:
        """All evidence, or what was known in or before `last_slot`."""
        return frozenset(key for key, (slot, _) in self._evidence.items() if last_slot is None or slot <= last_slot)

    def forget(self, is_over: Callable[[Subject], bool]) -> None:
        """Drop certificates whose subject is over."""
        for subject in [subject for subject in self._entries if is_over(subject)]:
            del self._subjects[self._entries.pop(subject).digest]
        for digest in [digest for digest, subject in self._verified.items() if is_over(subject)]:
            del self._verified[digest]

    def forget_evidence(self, digests: tuple[bytes, ...]) -> None:
        """Drop evidence that is in an anchored body."""
        for digest in digests:
            _, offender = self._evidence.pop(digest, (0, b""))
            self._accused[offender] -= 1
        self._accused = +self._accused
