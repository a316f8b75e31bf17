"""Routes that sign a ledger call with the owner wallet and wait until it is final."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from kaisar_p2p.errors import ConfigError
from node import views
from node.api.requests import body_of
from protocols.interpreter import calls

if TYPE_CHECKING:
    from node.node import Node


class LedgerCalls:
    """Routes that write to the ledger."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def routes(self) -> list[Route]:
        """The table."""
        return [
            Route("/v1/transfer", self.transfer, methods=["POST"]),
            Route("/v1/stake", self.stake, methods=["POST"]),
            Route("/v1/licence", self.licence, methods=["POST"]),
            Route("/v1/worker/retire", self.retire, methods=["POST"]),
            Route("/v1/rewards/claim", self.claim, methods=["POST"]),
        ]

    async def transfer(self, request: Request) -> JSONResponse:
        """Move KAI to another account."""
        fields = await body_of(request, "to", "amount_planck")
        return await call_answer(self._node, calls.Transfer(fields.address("to"), fields.planck("amount_planck")))

    async def stake(self, request: Request) -> JSONResponse:
        """Bond, unbond or withdraw stake."""
        fields = await body_of(request, "action", "amount_planck")
        match fields.text("action", most=16):
            case "bond":
                return await call_answer(self._node, calls.StakeBond(fields.planck("amount_planck")))
            case "unbond":
                return await call_answer(self._node, calls.StakeUnbond(fields.planck("amount_planck")))
            case "withdraw":
                return await call_answer(self._node, calls.StakeWithdraw())
            case _:
                raise ConfigError("action must be bond, unbond or withdraw")

    async def licence(self, request: Request) -> JSONResponse:
        """Buy checker licences."""
        fields = await body_of(request, "count", "referrer")
        referrer = fields.address("referrer") if fields.has("referrer") else bytes(32)
        count = fields.integer("count", 1, low=1, high=65535)
        return await call_answer(self._node, calls.LicenceBuy(count, referrer))

    async def retire(self, request: Request) -> JSONResponse:
        """Leave as a worker."""
        await body_of(request)
        return await call_answer(self._node, calls.WorkerRetire(self._node.key))

    async def claim(self, request: Request) -> JSONResponse:
        """Draw all rewards that can be proven now."""
        await body_of(request)
        claimed = await self._node.claim_reward()
        return JSONResponse({"call": claimed.call_hash.hex(), **views.amount("amount", claimed.amount_planck)})


async def call_answer(node: Node, body: calls.CallBody) -> JSONResponse:
    """Sign, hand in, wait; 200 with the call's hash when it had effect, else 409 with the reason."""
    result = await node.call(body)
    if result.reason:
        return JSONResponse(
            {
                "error": f"the ledger gave it no effect: {result.reason}",
                "hint": "",
                "call": result.call_hash.hex(),
            },
            status_code=409,
        )
    return JSONResponse({"call": result.call_hash.hex(), "block": node.chain.state.number})
