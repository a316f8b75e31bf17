"""Steps of the demo about an order: placed, deployed, reached, read, cancelled, settled to the planck."""

from __future__ import annotations

import time

import httpx

from kaisar_p2p.wire.money import planck_to_kai
from protocols.interpreter.audit import conservation
from protocols.interpreter.events import LeaseSettled
from protocols.interpreter.state import ORDER_CLOSED
from protocols.settlement import cost_planck
from testnet.demo_context import PORT, Demo
from testnet.swarm import SwarmError

DEPLOYING_TEXT = "Container is deploying..."
DEPLOYED_TEXT = "Your Container has been deployed successfully."
LEASE_WINDOWS = 3


def order(demo: Demo) -> None:
    """Place an order from the client's node, and wait until its committee has reached the program."""
    client = demo.swarm.api(demo.client.name)
    placed = demo.place()
    demo.order = placed["order"]
    provider = next(each.name for each in demo.members("provider") if each.key == placed["worker"])
    price, locked = placed["price_per_hour_kai"], placed["escrow_kai"]
    demo.view.line(f"order {demo.order[:16]}… with {provider} for {price} KAI an hour; {locked} KAI are locked")
    _follow(demo)
    demo.until("the order on the ledger", lambda: bytes.fromhex(demo.order) in demo.ledger.state.orders, 10)
    state = client.get(f"orders/{demo.order}")["state"]
    if state != "RUNNING":
        raise SwarmError(f"the lease is {state}, not RUNNING", hint=f"see the log of {provider}")
    demo.running_slot = demo.ledger.state.slot


def _follow(demo: Demo) -> None:
    """Print what the client's node tells about the order, until it is deployed or has failed."""
    client, after, said = demo.swarm.api(demo.client.name), 0, list[str]()

    def look() -> bool:
        nonlocal after
        answer = client.get(f"orders/{demo.order}/events", after=after)
        after = answer["after"]
        for event in answer["events"]:
            text = str(event["data"].get("text", ""))
            if text in (DEPLOYING_TEXT, DEPLOYED_TEXT):
                said.append(text)
                demo.view.exactly(text)
            elif text:
                demo.view.line(text)
        if answer["state"] == "ENDED":
            raise SwarmError(f"the lease has ended: {client.get(f'orders/{demo.order}')['reason']}")
        return DEPLOYED_TEXT in said

    demo.until("the lease to be deployed", look, 45)
    if said != [DEPLOYING_TEXT, DEPLOYED_TEXT]:
        raise SwarmError(f"the client's node has said {said}")


def connect(demo: Demo) -> None:
    """An HTTP request to a local port, which the client's node tunnels to the program."""
    answer = demo.swarm.api(demo.client.name).post(f"leases/{demo.order}/connect", port=PORT, local_port=0)
    url = f"http://{answer['host']}:{answer['port']}/?from=demo"
    started_s = time.monotonic()
    reply = httpx.get(url, timeout=10, trust_env=False)
    demo.figures["tunnel_request_ms"] = round((time.monotonic() - started_s) * 1000, 1)
    demo.view.line(f"GET {url}")
    demo.view.line(f"{reply.status_code} {reply.reason_phrase}: {reply.text}")
    if (reply.status_code, reply.text) != (200, demo.page):
        raise SwarmError("the reply is not the page that was ordered")


def logs(demo: Demo) -> None:
    """The program's log, read through the tunnel, contains the request."""
    client, wanted = demo.swarm.api(demo.client.name), "GET /?from=demo"
    found: list[str] = []

    def look() -> bool:
        text = client.text(f"leases/{demo.order}/logs")
        found[:] = [line for line in text.splitlines() if wanted in line]
        return bool(found)

    demo.until(f"{wanted!r} in the lease's log", look, 15)
    demo.view.line(f"log: {found[0]}")


def cancel(demo: Demo) -> None:
    """Let the committee witness a few windows, then end the order."""
    until = demo.running_slot + LEASE_WINDOWS
    demo.until(f"{LEASE_WINDOWS} witness windows", lambda: demo.ledger.state.slot >= until, 60)
    demo.swarm.api(demo.client.name).delete(f"orders/{demo.order}")
    demo.until("the cancellation on the ledger", lambda: demo.ledger_order().ended_block > 0, 15)
    demo.view.line(f"cancelled in block {demo.ledger_order().ended_block}")


def settlement(demo: Demo) -> None:
    """The ledger pays witnessed seconds and nothing else, and gives the rest back as points, to the planck."""
    order_id = bytes.fromhex(demo.order)
    demo.until("the settlement of the order", lambda: demo.ledger_order().status == ORDER_CLOSED, 60)
    order, events = demo.ledger_order(), [seen.event for seen in demo.ledger.events]
    paid = sum(e.paid_planck for e in events if isinstance(e, LeaseSettled) and e.order_id == order_id)
    price, seconds = order.price_planck_per_hour, order.paid_seconds
    demo.equal("paid by the second", order.paid_planck, cost_planck(price, seconds))
    demo.equal("paid in all settlements", paid, order.paid_planck)
    demo.equal("locked and given out", order.locked_planck, paid + order.refunded_planck + order.refunded_points)
    demo.equal("the client's points", demo.ledger.account(demo.client.owner).points_planck, order.refunded_points)
    demo.equal("KAI out of thin air", conservation(demo.ledger.state), 0)
    if not seconds:
        raise SwarmError("no second of the lease was witnessed", hint="see the logs of the order's committee")
    demo.view.line(f"{seconds} s witnessed at {planck_to_kai(price)} KAI an hour: {planck_to_kai(paid)} KAI are paid")
    back = planck_to_kai(order.refunded_points)
    demo.view.line(f"{planck_to_kai(order.locked_planck)} KAI were locked, {back} come back as points; the sums agree")
    demo.figures |= {"lease_seconds": seconds, "paid_kai": planck_to_kai(paid), "refunded_points": back}
