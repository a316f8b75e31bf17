"""The steps of the demo, in order. Each looks until it sees, at the nodes' own APIs and at the ledger, or says what is
missing.
"""

from __future__ import annotations

from collections.abc import Callable

from kaisar_p2p.errors import KaisarError
from testnet.demo_context import Demo
from testnet.demo_lease import cancel, connect, logs, order, settlement
from testnet.demo_network import checks, epoch, registration, start, stop
from testnet.demo_rewards import claim, proof

STEPS: tuple[tuple[str, str, Callable[[Demo], None]], ...] = (
    ("start", "Twelve processes start", start),
    ("registration", "Providers register: ten steps each", registration),
    ("checks", "Checkers certify the providers' work", checks),
    ("epoch", "An epoch is anchored on the ledger", epoch),
    ("order", "The client orders a web server", order),
    ("connect", "A request through the tunnel", connect),
    ("logs", "The lease's log", logs),
    ("cancel", "The client cancels", cancel),
    ("settlement", "Settlement and refund", settlement),
    ("claim", "Rewards are claimed by proof", claim),
    ("proof", "A reward proof, verified offline", proof),
    ("stop", "Everything stops", stop),
)


def refusal_hint(error: KaisarError, demo: Demo) -> str:
    """Where to look after a step failed."""
    return error.hint or f"logs are in {demo.swarm.directory / 'logs'}"
