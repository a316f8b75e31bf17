"""The keystore: `<data directory>/keys/`, one file per wallet and one for the machine key."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from kaisar_p2p.errors import IdentityError, UnknownWallet
from kaisar_p2p.identity.keyfile import MAX_FILE_BYTES, NAME, KeyFile, Kind
from kaisar_p2p.identity.keys import SEED_BYTES, MachineKey, Scheme, SecretKey, Wallet
from kaisar_p2p.identity.mnemonic import generate_mnemonic, normalise_mnemonic, parse_seed, seed_of_mnemonic
from kaisar_p2p.identity.polkadot_json import export_polkadot_json, import_polkadot_json
from kaisar_p2p.identity.private_files import (
    check_directory,
    create_private_file,
    prepare_directory,
    read_private_file,
)
from kaisar_p2p.identity.sealed import INTERACTIVE, KdfCost
from kaisar_p2p.wire.crypto import KeyPair

_MACHINE = "machine"


@dataclass(frozen=True)
class WalletInfo:
    """What a key file says without its passphrase. The address is proven only once the file is unlocked."""

    name: str
    scheme: Scheme
    address: str
    encrypted: bool


class Keystore:
    """Keys on disk. Everywhere, a `passphrase` of None means: stored unencrypted, by explicit wish.

    Files have mode 0600 and appear whole or not at all; a key that exists is never replaced. Errors:
    `WrongPassphrase`, `UnknownWallet`, and `IdentityError` for a damaged file, a name that is taken or not allowed,
    rights that are too loose, or a full disk.
    """

    def __init__(self, path: Path, *, cost: KdfCost = INTERACTIVE) -> None:
        self.path = path
        self._cost = cost

    # Making and importing

    def create_wallet(
        self, name: str, scheme: Scheme, passphrase: str | None, *, words: int = 12
    ) -> tuple[Wallet, str]:
        """A new wallet and its phrase of 12 or 24 words, which is to be shown once, or not at all."""
        phrase = generate_mnemonic(words)
        return self.import_mnemonic(name, scheme, phrase, passphrase), phrase

    def import_mnemonic(self, name: str, scheme: Scheme, phrase: str, passphrase: str | None) -> Wallet:
        """The wallet of a BIP-39 phrase; its address equals that of polkadot-js for the same phrase."""
        normalised = normalise_mnemonic(phrase)
        secret = SecretKey.from_seed(scheme, seed_of_mnemonic(normalised), normalised)
        return self._store_wallet(name, secret, passphrase)

    def import_seed(self, name: str, scheme: Scheme, seed: str, passphrase: str | None) -> Wallet:
        """The wallet of a seed: `0x` and 64 hexadecimal digits."""
        return self._store_wallet(name, SecretKey.from_seed(scheme, parse_seed(seed)), passphrase)

    def import_json(self, name: str, text: str, json_passphrase: str | None, passphrase: str | None) -> Wallet:
        """The wallet of a polkadot-js file; `json_passphrase` opens that file, `passphrase` locks ours."""
        return self._store_wallet(name, import_polkadot_json(text, json_passphrase), passphrase)

    def create_machine_key(self, passphrase: str | None, *, seed: bytes | None = None) -> MachineKey:
        """A new machine key, fresh unless `seed` (32 bytes) fixes it; IdentityError when there is one already."""
        secret = SecretKey.from_seed(Scheme.ED25519, seed or secrets.token_bytes(SEED_BYTES))
        self._store(KeyFile.lock("machine", _MACHINE, secret, passphrase, self._cost))
        return _machine_key(secret)

    # Reading

    def list(self) -> list[WalletInfo]:
        """All wallets by name; IdentityError when a file among them is damaged."""
        names = sorted(path.name for path in self.path.glob("wallet-*.json")) if self.path.is_dir() else []
        return [self.wallet_info(name.removeprefix("wallet-").removesuffix(".json")) for name in names]

    def wallet_info(self, name: str) -> WalletInfo:
        """What is known of a wallet without its passphrase."""
        return _info(self._load("wallet", name))

    def machine_info(self) -> WalletInfo:
        """What is known of the machine key without its passphrase."""
        return _info(self._load("machine", _MACHINE))

    def unlock(self, name: str, passphrase: str | None) -> Wallet:
        """The wallet, ready to sign. Takes about 0.1 s and 32 MiB when it is encrypted."""
        return _wallet(name, self._load("wallet", name).unlock(passphrase))

    def unlock_machine_key(self, passphrase: str | None) -> MachineKey:
        """The machine key, ready to sign. Takes about 0.1 s and 32 MiB when it is encrypted."""
        return _machine_key(self._load("machine", _MACHINE).unlock(passphrase))

    # Exporting: the only calls that return a secret

    def export_mnemonic(self, name: str, passphrase: str | None) -> str:
        """The phrase; IdentityError when the wallet was not made from one."""
        phrase = self._load("wallet", name).unlock(passphrase).mnemonic
        if phrase is None:
            raise IdentityError(
                f"wallet {name!r} was imported without a phrase", hint="export its seed or JSON instead"
            )
        return phrase

    def export_seed(self, name: str, passphrase: str | None) -> str:
        """The seed as `0x` and 64 hexadecimal digits; IdentityError for an sr25519 wallet imported from JSON."""
        seed = self._load("wallet", name).unlock(passphrase).seed
        if seed is None:
            raise IdentityError(
                f"wallet {name!r} was imported from a file that holds no seed", hint="export it as JSON"
            )
        return "0x" + seed.hex()

    def export_json(self, name: str, passphrase: str | None, json_passphrase: str) -> str:
        """The wallet as a polkadot-js file, locked with `json_passphrase`."""
        secret = self._load("wallet", name).unlock(passphrase)
        if not json_passphrase:
            raise IdentityError(
                "the passphrase for the exported file is empty", hint="an exported file is always encrypted"
            )
        return export_polkadot_json(secret, name, json_passphrase)

    # Files

    def _store_wallet(self, name: str, secret: SecretKey, passphrase: str | None) -> Wallet:
        _check_name(name)
        self._store(KeyFile.lock("wallet", name, secret, passphrase, self._cost))
        return _wallet(name, secret)

    def _store(self, key_file: KeyFile) -> None:
        prepare_directory(self.path)
        path = self._file(key_file.kind, key_file.name)
        try:
            create_private_file(path, key_file.encode())
        except FileExistsError:
            hint = "choose another name" if key_file.kind == "wallet" else "a machine key is never replaced"
            raise IdentityError(f"{_title(key_file.kind, key_file.name)} exists already", hint=hint) from None
        except OSError as error:
            raise IdentityError(
                f"{path} cannot be written: {error.strerror}", hint="check free space and rights"
            ) from None

    def _load(self, kind: Kind, name: str) -> KeyFile:
        if kind == "wallet":
            _check_name(name)
        path = self._file(kind, name)
        try:
            check_directory(self.path)
            data = read_private_file(path, MAX_FILE_BYTES)
        except FileNotFoundError:
            raise _unknown(kind, name) from None
        try:
            key_file = KeyFile.decode(data)
        except IdentityError as error:
            raise IdentityError(f"{path}: {error.message}", hint=error.hint) from None
        if (key_file.kind, key_file.name) != (kind, name):
            raise IdentityError(
                f"{path} holds the key of {_title(key_file.kind, key_file.name)}", hint="give it back its name"
            )
        return key_file

    def _file(self, kind: Kind, name: str) -> Path:
        return self.path / ("machine.json" if kind == "machine" else f"wallet-{name}.json")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise IdentityError(
            f"{name[:40]!r} is not a wallet name",
            hint="use 1 to 32 of a-z, 0-9, _ and -, beginning with a letter or digit",
        )


def _wallet(name: str, secret: SecretKey) -> Wallet:
    return Wallet(name, secret.scheme, secret.public_key, secret)


def _machine_key(secret: SecretKey) -> MachineKey:
    return MachineKey(KeyPair(secret.public_key, secret.key))


def _info(key_file: KeyFile) -> WalletInfo:
    return WalletInfo(key_file.name, key_file.scheme, key_file.address, key_file.encryption is not None)


def _title(kind: Kind, name: str) -> str:
    return "the machine key" if kind == "machine" else f"wallet {name!r}"


def _unknown(kind: Kind, name: str) -> UnknownWallet:
    if kind == "machine":
        return UnknownWallet("there is no machine key", hint="make one with `kaisar init`")
    return UnknownWallet(f"there is no wallet {name!r}", hint="`kaisar wallet list` shows the wallets there are")
