"""What the steps of the demo share: the swarm, the ledger as it is, the view, and how to wait for something."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kaisar_p2p.errors import NodeUnavailable
from protocols.interpreter.state import OrderState
from testnet.demo_view import DemoView
from testnet.observer import LedgerObserver
from testnet.prepare import Member
from testnet.swarm import POLL_S, Swarm, SwarmError

PORT = 8080
DURATION_S = 3600
MAX_PRICE_PLANCK_PER_HOUR = 10**19
PROGRAM = (
    "import http.server, os, sys\n"
    "open('index.html', 'w').write(os.environ['PAGE'])\n"
    "http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')\n"
)
"""The client's program: a web server with one page, whose text only this run knows."""


@dataclass
class Demo:
    """What the steps share. `figures` becomes the JSON object."""

    swarm: Swarm
    ledger: LedgerObserver
    view: DemoView
    figures: dict[str, Any] = field(default_factory=dict)
    page: str = field(default_factory=lambda: f"Hello from a Kaisar lease, {secrets.token_hex(8)}")
    order: str = ""
    running_slot: int = 0

    def members(self, role: str) -> list[Member]:
        """The nodes that have a role and run."""
        return [each for each in self.swarm.prepared.members if role in each.roles and each.start]

    @property
    def client(self) -> Member:
        """The node that orders."""
        return self.members("client")[0]

    def get(self, name: str, path: str, **params: str | int) -> Any:
        """A node's answer, or None while it does not answer."""
        try:
            return self.swarm.api(name).get(path, **params)
        except NodeUnavailable:
            return None

    def until(self, what: str, seen: Callable[[], bool], timeout_s: float) -> None:
        """Look at the ledger and ask `seen`, again and again; SwarmError when the time is up or a node has died."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.ledger.look()
            if seen():
                return
            self.swarm.check_alive()
            if time.monotonic() > deadline:
                raise SwarmError(
                    f"not seen within {timeout_s:g} s: {what}",
                    hint=f"ledger block {self.ledger.state.number}; logs are in {self.swarm.directory / 'logs'}",
                )
            time.sleep(POLL_S)

    def place(self) -> dict[str, Any]:
        """Order the web server for an hour from the client's node; its answer."""
        placed: dict[str, Any] = self.swarm.api(self.client.name).post(
            "orders",
            resources={"cpu_cores": 1, "memory_mb": 512, "disk_mb": 64},
            workload={
                "command": ["{python}", "-u", "-c", PROGRAM, f"{{port:{PORT}}}"],
                "environment": {"PAGE": self.page},
                "ports": [PORT],
            },
            duration_s=DURATION_S,
            max_price_planck_per_hour=str(MAX_PRICE_PLANCK_PER_HOUR),
        )
        return placed

    def ledger_order(self) -> OrderState:
        """Our order, as the ledger has it."""
        return self.ledger.state.orders[bytes.fromhex(self.order)]

    def equal(self, what: str, left: int, right: int) -> None:
        """SwarmError unless two amounts in planck agree."""
        if left != right:
            raise SwarmError(f"{what}: {left} is not {right} (planck)")
