"""`kaisar doctor`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from kaisar_p2p.errors import KaisarError, NodeUnavailable
from node.commands.client import NodeClient, NodeSilent
from node.commands.options import AsJson, DataDir, data_directory
from node.commands.output import FAILED, printable, say, show_json
from node.config import Config
from node.diagnosis.finding import Finding, Findings

_ANSWER_S = 10.0  # both questions are answered from memory
_COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[31m"}


def doctor(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Look for what keeps this node from working, and say what to do about it. The node may run or not.

    Each check is ok, warn or fail; the exit code is 1 when one fails.

    Example: kaisar doctor
    """
    directory = data_directory(data_dir)
    findings = Findings()
    running = _examine(findings, directory)
    failed = any(finding.grade == "fail" for finding in findings)
    if as_json:
        checks = [{"check": f.check, "grade": f.grade, "text": f.text, "hint": f.hint} for f in findings]
        show_json({"ok": not failed, "running": running, "checks": checks})
    else:
        _print(findings)
    if failed:
        raise typer.Exit(FAILED)


def _examine(findings: Findings, directory: Path) -> bool:
    """All checks; whether a node runs."""
    from node.diagnosis import machine

    if not machine.check_directory(findings, directory):
        return False
    say("Looking at configuration, keys and ledger ...")
    config = machine.check_configuration(findings, directory)
    if config is None:
        return False
    machine.check_keys(findings, config)
    machine.check_ledger(findings, config, machine.wall_clock_s())
    if "provider" in config.node.roles:
        say("Looking at the container runtime and GPUs ...")
        machine.check_runtime(findings, config)
        machine.check_gpus(findings, config)
    say("Asking the running node ...")
    if _examine_node(findings, directory, config):
        return True
    machine.check_ports(findings, config)
    return False


def _examine_node(findings: Findings, directory: Path, config: Config) -> bool:
    """The checks that a running node answers; whether one does."""
    from node.diagnosis import network as checks

    try:
        with NodeClient(directory, answer_s=_ANSWER_S) as node:
            status, network = node.get("/v1/status"), node.get("/v1/network")
    except NodeSilent as error:
        findings.fail("node", error.message, error.hint)
        return True
    except NodeUnavailable as error:
        findings.warn("node", error.message, error.hint)
        return False
    except KaisarError as error:
        findings.fail("node", error.message, error.hint)
        return True
    findings.ok("node", f"process {status['pid']} runs since {status['uptime_s']} s, block {status['chain']['block']}")
    checks.check_peers(findings, network, expected=bool(config.network.join))
    checks.check_reachability(findings, network)
    checks.check_translation(findings, network)
    checks.check_helpers(findings, network)
    checks.check_clock(findings, network)
    checks.check_key(findings, network)
    checks.check_limits(findings, network)
    return True


def _print(findings: list[Finding]) -> None:
    """A line for each check; what to do is indented below it."""
    width = max(len(finding.check) for finding in findings)
    colour = sys.stdout.isatty()
    for finding in findings:
        grade = f"{_COLOURS[finding.grade]}{finding.grade:<4}\x1b[0m" if colour else f"{finding.grade:<4}"
        print(f"{grade}  {finding.check.ljust(width)}  {printable(finding.text)}")
        if finding.hint:
            print(f"      {'':{width}}  → {printable(finding.hint)}")
