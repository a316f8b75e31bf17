"""What a node thinks of a received message (Ethereum consensus specs, p2p-interface: ACCEPT / IGNORE / REJECT)."""

from __future__ import annotations

import enum


class Verdict(enum.Enum):
    """ACCEPT: valid, forward. IGNORE: drop, the sender may be honest. REJECT: misbehaviour, held against the sender."""

    ACCEPT = "accept"
    IGNORE = "ignore"
    REJECT = "reject"
