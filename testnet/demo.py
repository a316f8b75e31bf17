"""`kaisar demo`: a whole network on this machine, from the first process to the last planck, every step observed."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from kaisar_p2p.errors import DataDirectoryError, KaisarError
from kaisar_p2p.hardware.prove import select_backend
from testnet.demo_context import Demo
from testnet.demo_network import measure
from testnet.demo_steps import STEPS, refusal_hint
from testnet.demo_view import DemoView
from testnet.manifest import load_manifest
from testnet.observer import observe
from testnet.paths import state_home
from testnet.prepare import LEDGER_FILE, prepare
from testnet.swarm import Swarm

WALL_LIMIT_S = 90.0


def run_demo(network: str, directory: Path | None, *, keep: bool, as_json: bool) -> int:
    """Run it; 0 only when every step was observed. A directory of our own is removed after a success."""
    own = directory is None
    target = _own_directory() if directory is None else directory
    view = DemoView(Console(highlight=False))
    started_s = time.monotonic()
    prepared = prepare(load_manifest(network), target, time_ms=time.time_ns() // 1_000_000)
    view.line(f"network {network}: {len(prepared.members)} nodes in {target}, without passphrases, for development")
    swarm = Swarm(prepared)
    with observe(target / LEDGER_FILE) as ledger:
        demo = Demo(swarm, ledger, view)
        try:
            failure = _run_steps(demo, keep)
        except BaseException:  # Ctrl-C
            view.line("stopping every node")
            swarm.down()
            if own:
                shutil.rmtree(target, ignore_errors=True)
            raise
        figures = _figures(demo, network, started_s, failure)
    if keep and failure is None:
        _how_to_use(view, target, swarm)
    elif failure is None and own:
        shutil.rmtree(target, ignore_errors=True)
    else:
        view.line(f"everything that the nodes wrote is in {target}")
    _say_end(view, figures)
    if as_json:
        sys.stdout.write(json.dumps(figures) + "\n")
    return 0 if failure is None else 1


def _own_directory() -> Path:
    base = state_home()
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Path(tempfile.mkdtemp(prefix="demo-", dir=base))
    except OSError as error:
        hint = "pass --directory, or set XDG_STATE_HOME"
        raise DataDirectoryError(f"{base} cannot be used: {error.strerror}", hint=hint) from None


def _run_steps(demo: Demo, keep: bool) -> str | None:
    """Run the steps; the key of the one that was not observed, if any. Whatever runs then is stopped."""
    seconds: dict[str, float] = {}
    demo.figures["steps_s"] = seconds
    for key, title, step in STEPS:
        if key == "stop":
            measure(demo)
            if keep:
                return None
        demo.view.heading(title)
        started_s = time.monotonic()
        try:
            step(demo)
        except KaisarError as error:
            demo.view.failed(title, error.message)
            demo.view.line(refusal_hint(error, demo))
            demo.figures["error"] = error.message
            demo.swarm.down()
            return key
        seconds[key] = round(time.monotonic() - started_s, 2)
    return None


def _figures(demo: Demo, network: str, started_s: float, failure: str | None) -> dict[str, Any]:
    """The JSON object. Times in the unit that their names end in."""
    wall_s, params = time.monotonic() - started_s, demo.ledger.state.params
    work_ms = _work_ms(demo)
    delays = demo.figures.get("checks", {}).pop("slot_to_certificate_ms", [])
    return {
        "ok": failure is None,
        "failed_step": failure,
        "network": network,
        "order": demo.order or None,
        "wall_s": round(wall_s, 2),
        "wall_limit_s": WALL_LIMIT_S,
        "work_ms": round(work_ms, 1),
        "block_ms": params.block_ms,
        "slot_to_certificate_ms": _percentiles(delays),
        "slot_to_certificate_minus_work_ms": _percentiles([delay - work_ms for delay in delays]),
        **demo.figures,
    }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": round(cuts[9], 1), "p95": round(cuts[18], 1), "count": len(values)}


def _work_ms(demo: Demo) -> float:
    """One check's job on this machine, once the network has stopped: the fastest of six, lest load flatters us."""
    backend, job = select_backend(), demo.ledger.state.params.job
    times = []
    for number in range(6):
        begun = time.perf_counter()
        backend.prove(job, number.to_bytes(32, "big"))
        times.append((time.perf_counter() - begun) * 1000)
    return min(times)


def _say_end(view: DemoView, figures: dict[str, Any]) -> None:
    outcome = "every step was observed" if figures["ok"] else f"step {figures['failed_step']} was not observed"
    view.heading(f"{outcome}; {figures['wall_s']} s in all")
    delays = figures["slot_to_certificate_minus_work_ms"]
    if delays:
        view.line(f"from slot start to certificate, without the work: p50 {delays['p50']} ms, p95 {delays['p95']} ms")
    if peaks := figures.get("peak_memory_mb"):
        view.line(f"peak memory of a node: {max(peaks.values())} MB at most")


def _command() -> str:
    """What to type in any shell: `kaisar` where that finds this program, else its path."""
    ours, found = Path(sys.argv[0]), shutil.which("kaisar")
    if ours.name != "kaisar" or (found is not None and Path(found).resolve() == ours.resolve()):
        return "kaisar"
    return str(ours.absolute())


def _how_to_use(view: DemoView, directory: Path, swarm: Swarm) -> None:
    client = next(each.name for each in swarm.prepared.members if "client" in each.roles)
    kaisar = _command()
    view.heading("The network keeps running; in any shell:")
    for line in (
        f"export KAISAR_HOME={swarm.prepared.data_directory(client)}   # speak as the client",
        f"{kaisar} status",
        f"{kaisar} workers",
        f"{kaisar} order place --template web --cpu 1 --memory 512MB --hours 1 --max-price 10 --wait",
        f"{kaisar} testnet status --directory {directory}",
        f"{kaisar} testnet logs provider-1 --follow --directory {directory}",
        f"{kaisar} testnet down --directory {directory}   # when you have seen enough",
    ):
        view.exactly(f"  {line}")
