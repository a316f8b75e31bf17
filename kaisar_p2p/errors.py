"""Every error that a user or an operator can meet.

::

    KaisarError                      has a message (the cause) and a hint (the next step)
    ├── ConfigError                  a configuration file, key or argument that cannot be used
    ├── DataDirectoryError           the data directory is missing, unreadable or in use
    ├── IdentityError                keys and wallets
    │   ├── WrongPassphrase
    │   └── UnknownWallet
    ├── DecodeError                  bytes that are not a canonical message
    ├── SignatureError               a signature that does not verify
    ├── LedgerError                  the ledger cannot be read or written
    │   ├── CallRejected             a call that the ledger refuses (nonce, size, signature)
    │   └── LedgerCorrupt            a broken hash link or signature in the ledger itself
    ├── MeshError                    the peer-to-peer layer
    │   ├── PortUnavailable
    │   ├── PeerUnreachable
    │   ├── RequestFailed            a peer answered late, too long, or not at all
    │   └── LimitExceeded            one of our own bounds was reached
    ├── RuntimeUnavailable           no container engine answers
    ├── ContainerError               a container could not be created, started or reached
    ├── OrderRefused                 an order that cannot be placed; nothing was locked
    ├── HardwareError                a probe or a proof backend failed
    ├── StoreError                   the node's own database
    └── NodeUnavailable              no local node answers on its API
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class KaisarError(Exception):
    """Base of all errors; `hint` tells what to do next and may be empty."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(KaisarError):
    """A configuration file, key or argument that cannot be used."""


class DataDirectoryError(KaisarError):
    """The data directory is missing, unreadable or in use."""


class IdentityError(KaisarError):
    """A key or wallet that cannot be created, read or used."""


class WrongPassphrase(IdentityError):
    """The passphrase does not open the keystore."""


class UnknownWallet(IdentityError):
    """No wallet has that name."""


class DecodeError(KaisarError):
    """Bytes that are not the canonical encoding of exactly one message."""


class SignatureError(KaisarError):
    """A signature that does not verify for its signer, domain and network."""


class LedgerError(KaisarError):
    """The ledger cannot be read or written."""


class CallRejected(LedgerError):
    """A call that the ledger refuses: nonce, size or signature."""


class LedgerCorrupt(LedgerError):
    """A broken hash link or signature inside the ledger."""


class MeshError(KaisarError):
    """The peer-to-peer layer failed."""


class PortUnavailable(MeshError):
    """The listen address is taken or not ours."""


class PeerUnreachable(MeshError):
    """No known address of the peer answers."""


class RequestFailed(MeshError):
    """A peer answered late, too long, wrongly or not at all."""


class LimitExceeded(MeshError):
    """One of this node's own bounds was reached."""


class RuntimeUnavailable(KaisarError):
    """No container engine answers."""


class ContainerError(KaisarError):
    """A container could not be created, started or reached."""


class OrderRefused(KaisarError):
    """An order that cannot be placed; nothing was locked."""


class HardwareError(KaisarError):
    """A hardware probe or a proof backend failed."""


class StoreError(KaisarError):
    """The node's own database cannot be read or written."""


class NodeUnavailable(KaisarError):
    """No local node answers on its API."""


@contextmanager
def ungrouped() -> Iterator[None]:
    """Nurseries put errors into groups: the only one in nested groups leaves as itself, several leave as a group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from error.__cause__
