"""BIP-39 phrases, turned into seeds the way Substrate and polkadot-js do.

Substrate derives from the phrase's *entropy* (PBKDF2-HMAC-SHA512, 2048 rounds, salt "mnemonic"), not from its text
as BIP-39 itself does, and takes the first 32 bytes: the same phrase gives the same address here and in polkadot-js.
Source: `substrate-bip39`.
"""

from __future__ import annotations

import re
import unicodedata

from kaisar_p2p.errors import IdentityError

WORD_COUNTS = (12, 24)
_LANGUAGE = "en"
_MAX_CHARS = 400


def generate_mnemonic(words: int = 12) -> str:
    """A new phrase of 12 (128 bits) or 24 words (256 bits) from the operating system's entropy."""
    if words not in WORD_COUNTS:
        raise IdentityError(f"a phrase of {words} words cannot be made", hint="use 12 or 24")
    import bip39

    return str(bip39.bip39_generate(words, _LANGUAGE))


def normalise_mnemonic(phrase: str) -> str:
    """Lower case, single spaces; IdentityError when it is no valid English phrase. The error never quotes it."""
    if "/" in phrase:
        raise IdentityError(
            "the phrase has a derivation path, which is not supported",
            hint="export the derived account as a polkadot-js JSON file and import that",
        )
    words = unicodedata.normalize("NFKD", phrase).lower().split()
    if len(words) not in WORD_COUNTS:
        raise IdentityError(f"the phrase has {len(words)} words", hint="a phrase has 12 or 24 words")
    normalised = " ".join(words)
    import bip39

    if len(normalised) > _MAX_CHARS or not bip39.bip39_validate(normalised, _LANGUAGE):
        raise IdentityError(
            "the phrase is not a valid BIP-39 phrase: a word is unknown or the words are in the wrong order",
            hint="check the spelling and the order of the English words",
        )
    return normalised


def seed_of_mnemonic(phrase: str) -> bytes:
    """The 32-byte mini-secret of a phrase that `normalise_mnemonic` returned."""
    import bip39

    return bytes(bip39.bip39_to_mini_secret(phrase, "", _LANGUAGE))


def parse_seed(text: str) -> bytes:
    """32 bytes from `0x` and 64 hexadecimal digits (the `0x` may be missing); the error never quotes the text."""
    if not re.fullmatch(r"\s*(0x)?[0-9a-fA-F]{64}\s*", text):
        raise IdentityError("the seed cannot be read", hint="a seed is 0x followed by 64 hexadecimal digits")
    return bytes.fromhex(text.strip().removeprefix("0x"))
