"""Steps of the demo about rewards: claimed by proof, and proven to somebody who has neither node nor ledger."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kaisar_p2p.identity import ss58_encode
from kaisar_p2p.wire.money import planck_to_kai
from protocols.interpreter.events import RewardClaimed
from testnet.demo_context import Demo
from testnet.swarm import SwarmError


def claim(demo: Demo) -> None:
    """Owners draw what an anchored epoch says they have earned; the ledger shows it in their balances."""
    worker = demo.ledger_order().worker.hex()
    provider = next(each for each in demo.members("provider") if each.key == worker)
    for member in (provider, demo.members("checker")[0]):
        before = demo.ledger.account(member.owner)
        answer = demo.swarm.api(member.name).post("rewards/claim")
        amount, owner = int(answer["amount_planck"]), bytes.fromhex(member.owner)
        claimed = RewardClaimed(owner, amount)
        demo.until(
            f"the claim of {member.name} on the ledger",
            lambda claimed=claimed: claimed in [seen.event for seen in demo.ledger.events],  # type: ignore[misc]
            15,
        )
        demo.equal("claimed", demo.ledger.account(member.owner).claimed_planck - before.claimed_planck, amount)
        demo.view.line(f"{member.name} ({ss58_encode(owner)[:12]}…) has drawn {planck_to_kai(amount)} KAI")


def proof(demo: Demo) -> None:
    """A reward proof in a file, verified by a process that has neither node nor ledger; a changed file is refused."""
    member = demo.members("provider")[0]
    path = demo.swarm.directory / "reward-proof.json"
    text = demo.swarm.api(member.name).text("rewards/proof")
    path.write_text(text, encoding="utf-8")
    code, output = _verify(path)
    for line in output.splitlines():
        demo.view.line(line)
    if code != 0:
        raise SwarmError(f"`kaisar proof verify {path}` ends with exit code {code}")
    forged = path.with_name("forged-proof.json")
    forged.write_text(_with_one_digit_changed(text), encoding="utf-8")
    code, _ = _verify(forged)
    if code == 0:
        raise SwarmError("a proof with one digit changed verifies", hint=f"compare {forged} with {path}")
    demo.view.line("the same file with one digit changed is refused")
    demo.figures["proof_bytes"] = len(text.encode())


def _verify(path: Path) -> tuple[int, str]:
    """`kaisar proof verify` in a process of its own, with a home that has nothing in it."""
    command = [sys.executable, "-m", "node.cli", "proof", "verify", str(path)]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(path.parent / "nobody"), "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _with_one_digit_changed(text: str) -> str:
    """Change a hexadecimal digit in the longest run of them."""
    digits = "0123456789abcdef"
    best = max(text.split('"'), key=lambda part: len(part) if all(c in digits for c in part) else 0)
    middle = len(best) // 2
    changed = best[:middle] + digits[(digits.index(best[middle]) + 1) % 16] + best[middle + 1 :]
    return text.replace(best, changed)
