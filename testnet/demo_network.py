"""Steps of the demo about the network: processes, registration, checks, an epoch, figures, the end."""

from __future__ import annotations

from typing import Any

from kaisar_p2p.wire.money import planck_to_kai
from protocols.committees import check_committee
from protocols.interpreter.state import ACTIVE
from protocols.onboarding import REGISTRATION_STEPS
from testnet.demo_context import Demo
from testnet.demo_view import Board
from testnet.prepare import Member
from testnet.processes import peak_memory_bytes, strays
from testnet.swarm import SwarmError


def start(demo: Demo) -> None:
    """Start every process, and wait until each one answers."""
    ready: list[str] = []
    total = sum(each.start for each in demo.swarm.prepared.members)

    def report(name: str, what: str) -> None:
        if what == "ready":
            ready.append(name)
            demo.view.line(f"{name} answers ({len(ready)} of {total})")

    demo.swarm.up(report)
    pids = {each.pid for each in demo.swarm.running().values()}
    demo.figures["processes"] = len(pids)


def registration(demo: Demo) -> None:
    """The ten steps of every provider, as each tells them, and the ledger's word that it is active."""
    providers = demo.members("provider")
    board: Board = {each.name: {} for each in providers}

    def look() -> bool:
        for provider in providers:
            for step in (demo.get(provider.name, "registration") or {"steps": []})["steps"]:
                if step["done"] and step["step"] not in board[provider.name]:
                    board[provider.name][step["step"]] = step["text"]
                    demo.view.registration(board, provider.name, step["step"])
        workers = demo.ledger.state.workers
        active = [p for p in providers if (w := workers.get(bytes.fromhex(p.key))) and w.status == ACTIVE]
        return len(active) == len(providers) and all(len(done) == len(REGISTRATION_STEPS) for done in board.values())

    with demo.view.registrations():
        try:
            demo.until("ten registration steps of every provider", look, 60)
        except SwarmError as error:
            missing = {name: sorted(set(range(1, 11)) - set(done)) for name, done in board.items()}
            raise SwarmError(f"{error.message}; steps missing: {missing}", hint=error.hint) from None
    demo.view.line(f"{len(providers)} providers are active on the ledger, block {demo.ledger.state.number}")


def checks(demo: Demo) -> None:
    """A quorum certificate for every provider that at least three nodes hold, and that names the same result."""
    providers = demo.members("provider")
    bootstrap, checker = demo.members("bootstrap")[0], demo.members("checker")[0]
    witnesses = [demo.client.name, bootstrap.name, checker.name]

    def agreed(provider: Member) -> dict[str, Any] | None:
        held = [demo.get(name, "checks", worker=provider.key) or [] for name in witnesses]
        common = set.intersection(*({_result(view) for view in views} for views in held))
        return next((view for view in held[0] if _result(view) in common and view["verdict"] == "PASS"), None)

    demo.until(
        f"a PASS certificate for each provider on {', '.join(witnesses)}",
        lambda: all(agreed(provider) is not None for provider in providers),
        45,
    )
    for provider in providers:
        view = agreed(provider)
        assert view is not None
        committee = check_committee(demo.ledger.state, view["slot"], bytes.fromhex(provider.key))
        if committee is None or view["signatures"] < committee.threshold:
            raise SwarmError(f"the certificate of {provider.name} in slot {view['slot']} has no quorum")
        quorum = f"{view['signatures']} of {len(committee.seats)} seats signed, {committee.threshold} are needed"
        demo.view.line(
            f"slot {view['slot']}: {provider.name} {view['verdict']}, {quorum}; {len(witnesses)} nodes agree"
        )


def _result(view: dict[str, Any]) -> tuple[int, str, str, str]:
    return view["slot"], view["worker"], view["verdict"], view["commit"]


def epoch(demo: Demo) -> None:
    """An epoch with rewards, anchored on the ledger by one call, that two nodes name by the same hash."""
    names = [demo.client.name, demo.members("checker")[0].name]

    def look() -> bool:
        paying = [each for each in demo.ledger.state.anchors.values() if each.header.minted_planck > 0]
        for anchor in paying:
            hashes = [_header_of(demo.get(name, "epochs") or [], anchor.header.epoch) for name in names]
            if all(each == anchor.header_hash.hex() for each in hashes):
                header, stake = anchor.header, 100 * anchor.signed_stake // anchor.total_stake
                demo.view.line(
                    f"epoch {header.epoch}, slots {header.first_slot} to {header.last_slot}: {header.verdicts} checks,"
                    f" {planck_to_kai(header.minted_planck)} KAI of rewards, signed by {stake} % of the stake"
                )
                demo.view.line(f"header {anchor.header_hash.hex()[:16]}… on the ledger and on {' and '.join(names)}")
                demo.view.line(f"one call of {anchor.anchor_bytes} bytes in block {anchor.block}")
                return True
        return False

    demo.until("an anchored epoch with rewards", look, 60)


def _header_of(views: list[dict[str, Any]], number: int) -> str | None:
    return next((view["header_hash"] for view in views if view["epoch"] == number), None)


def measure(demo: Demo) -> None:
    """What has to be read while the processes still run."""
    peaks = {name: peak_memory_bytes(each.pid) for name, each in demo.swarm.running().items()}
    demo.figures["peak_memory_mb"] = {name: round(peak / 1e6, 1) for name, peak in sorted(peaks.items()) if peak}
    demo.figures["checks"] = _check_figures(demo)
    anchors = [each.anchor_bytes for each in demo.ledger.state.anchors.values()]
    verdicts = sum(each.header.verdicts for each in demo.ledger.state.anchors.values())
    demo.figures["anchors"] = len(anchors)
    demo.figures["anchor_bytes"] = anchors
    demo.figures["verdicts_anchored"] = verdicts
    demo.figures["ledger_bytes_per_check"] = round(sum(anchors) / verdicts, 1) if verdicts else None
    demo.figures["ledger_blocks"] = demo.ledger.state.number + 1
    demo.figures["ledger_call_bytes"] = demo.ledger.call_bytes


def _check_figures(demo: Demo) -> dict[str, Any]:
    """Time from the slot's first block to the certificate, as the client's node received it."""
    views = demo.get(demo.client.name, "checks", limit=1000) or []
    delays = [
        view["received_ms"] - started_ms
        for view in views
        if (started_ms := demo.ledger.slot_started_ms(view["slot"])) is not None
    ]
    sizes = [view["certificate_bytes"] for view in views]
    return {
        "certificates": len(views),
        "slot_to_certificate_ms": sorted(delays),
        "certificate_bytes": round(sum(sizes) / len(sizes)) if sizes else None,
    }


def stop(demo: Demo) -> None:
    """Stop everything, and look that nothing is left."""
    killed = demo.swarm.down()
    if killed:
        raise SwarmError(f"{', '.join(killed)} did not end when asked, and had to be killed")
    left = [process.pid for process in strays(demo.swarm.directory)]
    if left:
        raise SwarmError(f"processes are left: {left}")
    files = [str(path) for path in demo.swarm.directory.glob("nodes/*/api.json")]
    if files:
        raise SwarmError(f"nodes left their address behind: {files}")
    demo.view.line("every node ended cleanly when asked; no process is left")
