"""Routes that read: what this node is, whom it knows, what it has heard and what the ledger says."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from kaisar_p2p.errors import KaisarError
from kaisar_p2p.identity import ss58_decode
from node import views
from node.api.metrics import metrics_text
from node.api.requests import Fields, query_of
from node.network_view import network_view
from node.store import NodeEvent
from protocols.interpreter.state import AccountState
from protocols.proofs import ProofReport, verify_export

if TYPE_CHECKING:  # the node brings the whole peer-to-peer stack along
    from node.node import Node

MAX_WAIT_S = 30
MAX_EVENTS = 1_000
MAX_ROWS = 1_000


class Reading:
    """Read-only routes of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("/v1/status", self.status),
            Route("/v1/peers", self.peers),
            Route("/v1/network", self.network),
            Route("/v1/workers", self.workers),
            Route("/v1/checks", self.checks),
            Route("/v1/epochs", self.epochs),
            Route("/v1/events", self.events),
            Route("/v1/registration", self.registration),
            Route("/v1/account/{address}", self.account),
            Route("/v1/rewards", self.rewards),
            Route("/v1/rewards/proof", self.reward_proof),
            Route("/v1/metrics", self.metrics),
        ]

    async def status(self, request: Request) -> JSONResponse:
        """This node, its wallet, and where the ledger stands."""
        query_of(request)
        node = self._node
        state = node.chain.state
        account = state.accounts.get(node.wallet.public_key, AccountState())
        return JSONResponse(
            {
                "key": node.key.hex(),
                "name": node.config.node.name,
                "roles": list(node.roles),
                "address": node.wallet.address,
                **views.amount("balance", account.balance_planck),
                **views.amount("points", account.points_planck),
                **views.amount("stake", account.stake_planck),
                "addrs": list(node.mesh.addrs),
                "peers": len(node.mesh.peers()),
                "reachable": node.mesh.report().reachability.status,
                "runtime": node.runtime.name if node.runtime is not None else None,
                "uptime_s": int(node.clock.now() - node.started_at),
                "pid": os.getpid(),
                "data_directory": str(node.config.data_directory),
                "chain": views.chain_view(state),
                "totals": views.totals_view(state),
                "waiting": node.inbox.depths(),
                "dropped": dict(node.inbox.dropped),
            }
        )

    async def peers(self, request: Request) -> JSONResponse:
        """Connected peers."""
        query_of(request)
        state, now = self._node.chain.state, trio.current_time()
        return JSONResponse(
            [
                {
                    "key": peer.key.hex(),
                    "roles": views.peer_roles(state, peer.key),
                    "addresses": list(peer.addresses),
                    "direction": "in" if peer.inbound else "out",
                    "relayed": peer.relayed,
                    "connected_s": int(now - peer.connected_since),
                    "rtt_ms": None if peer.rtt_s is None else round(peer.rtt_s * 1000, 3),
                    "score": peer.score + 0.0,  # never -0.0
                }
                for peer in sorted(self._node.mesh.peers(), key=lambda peer: peer.key)
            ]
        )

    async def network(self, request: Request) -> JSONResponse:
        """How this node stands in its network."""
        query_of(request)
        return JSONResponse(network_view(self._node))

    async def workers(self, request: Request) -> JSONResponse:
        """Registered workers, what their checks certified and what they advertise."""
        query_of(request)
        node = self._node
        return JSONResponse(views.workers_view(node.chain.state, node.index, node.clock.now()))

    async def checks(self, request: Request) -> JSONResponse:
        """Quorum certificates of checks, newest first."""
        query = query_of(request, "worker", "limit")
        worker = bytes.fromhex(_key(query, "worker")) if query.has("worker") else None
        limit = query.integer("limit", 100, low=1, high=MAX_ROWS)
        return JSONResponse(views.checks_view(self._node.index, worker, limit))

    async def epochs(self, request: Request) -> JSONResponse:
        """Anchored epochs, newest first."""
        limit = query_of(request, "limit").integer("limit", 100, low=1, high=MAX_ROWS)
        return JSONResponse(views.epochs_view(self._node.chain.state, limit))

    async def events(self, request: Request) -> JSONResponse:
        """This node's own events after an id; waits up to `wait_s` seconds for the first."""
        query = query_of(request, "after", "wait_s", "kind", "limit")
        kind = query.text("kind", "", most=64)
        found, after = await wait_for_events(self._node, query, lambda event: kind in ("", event.kind))
        return JSONResponse({"events": [views.event_view(event) for event in found], "after": after})

    async def registration(self, request: Request) -> JSONResponse:
        """The ten steps of this provider's registration."""
        query_of(request)
        node = self._node
        worker = node.chain.state.workers.get(node.key)
        return JSONResponse(views.registration_view(all_events(node), worker))

    async def account(self, request: Request) -> JSONResponse:
        """One owner account; `me` is this node's wallet."""
        query_of(request)
        address = str(request.path_params["address"])
        account = self._node.wallet.public_key if address == "me" else ss58_decode(address)
        return JSONResponse(views.account_view(self._node.chain.state, account))

    async def rewards(self, request: Request) -> JSONResponse:
        """What this node's owner has earned in anchored epochs, and drawn."""
        query_of(request)
        node = self._node
        account = node.chain.state.accounts.get(node.wallet.public_key, AccountState())
        proven = self._proven()
        earned = max(proven.cumulative_planck if proven else 0, account.claimed_planck)
        return JSONResponse(
            {
                "address": node.wallet.address,
                **views.amount("earned", earned),
                **views.amount("claimed", account.claimed_planck),
                **views.amount("claimable", earned - account.claimed_planck),
                "epoch": proven.epoch if proven else None,
            }
        )

    def _proven(self) -> ProofReport | None:
        try:
            return verify_export(self._node.reward_proof().encode())
        except KaisarError:  # nothing was earned yet, which is no error here
            return None

    async def reward_proof(self, request: Request) -> PlainTextResponse:
        """The proof file of what was earned, for `kaisar proof verify`."""
        query_of(request)
        return PlainTextResponse(self._node.reward_proof(), media_type="application/json")

    async def metrics(self, request: Request) -> PlainTextResponse:
        """Counters and gauges in Prometheus' text format."""
        query_of(request)
        return PlainTextResponse(metrics_text(self._node), media_type="text/plain; version=0.0.4")


async def wait_for_events(
    node: Node, query: Fields, wanted: Callable[[NodeEvent], bool]
) -> tuple[list[NodeEvent], int]:
    """The wanted events after `after`, and the id to ask for next; waits `wait_s` seconds when there are none."""
    after = query.integer("after", 0, high=2**63 - 1)
    limit = query.integer("limit", 200, low=1, high=MAX_EVENTS)
    with trio.move_on_after(query.integer("wait_s", 0, high=MAX_WAIT_S)):
        while True:
            page = node.store.events(after, MAX_EVENTS)
            found = [event for event in page if wanted(event)][:limit]
            if found:
                return found, found[-1].id if len(found) == limit else page[-1].id
            after = page[-1].id if page else after
            if len(page) < MAX_EVENTS:
                await node.effects.wait_for_note()
            else:
                await trio.lowlevel.checkpoint()
    return [], after


def all_events(node: Node) -> list[NodeEvent]:
    """Everything the event list still holds, oldest first; it is bounded by the store."""
    events: list[NodeEvent] = []
    while page := node.store.events(events[-1].id if events else 0, MAX_EVENTS):
        events += page
    return events


def _key(query: Fields, name: str) -> str:
    text = query.text(name, most=64).lower()
    if len(text) != 64 or any(digit not in "0123456789abcdef" for digit in text):
        raise query.wrong(name, "a machine key of 64 hexadecimal digits")
    return text
