"""Commands of an owner: rewards, stake, licences, the worker of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kaisar_p2p.wire.money import planck_to_kai
from node.commands.client import NodeClient
from node.commands.options import AsJson, DataDir, data_directory, parse_kai
from node.commands.output import kai, printable, resources, show_json, show_record

rewards = typer.Typer(no_args_is_help=True)
stake = typer.Typer(no_args_is_help=True)
licence = typer.Typer(no_args_is_help=True)
worker = typer.Typer(no_args_is_help=True)

Amount = Annotated[int, typer.Argument(metavar="KAI", parser=parse_kai, help="How much, such as 100 or 12.5.")]


@rewards.command("show")
def rewards_show(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show what this node's owner has earned in anchored epochs, and drawn.

    Example: kaisar rewards show
    """
    with NodeClient(data_directory(data_dir)) as node:
        answer = node.get("/v1/rewards")
    fields: list[Any] = [
        ("Address", "address"),
        ("Earned", kai("earned")),
        ("Drawn", kai("claimed")),
        ("Can be drawn", kai("claimable")),
        ("Up to epoch", "epoch"),
    ]
    show_record(answer, fields, as_json=as_json)


@rewards.command("claim")
def rewards_claim(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Draw all rewards that can be proven now; they come to the owner's balance.

    Example: kaisar rewards claim
    """
    with NodeClient(data_directory(data_dir)) as node:
        answer = node.post("/v1/rewards/claim")
    _done(answer, f"Drew {answer['amount_kai']} KAI", as_json)


@stake.command("bond")
def stake_bond(amount: Amount, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Stake KAI for checking; it counts from the next epoch on.

    Example: kaisar stake bond 100
    """
    _stake("bond", amount, data_dir, as_json, f"Staked {planck_to_kai(amount)} KAI")


@stake.command("unbond")
def stake_unbond(amount: Amount, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Stop staking KAI; it can be withdrawn when its unbonding is over.

    Example: kaisar stake unbond 50
    """
    _stake("unbond", amount, data_dir, as_json, f"{planck_to_kai(amount)} KAI are unbonding")


@stake.command("withdraw")
def stake_withdraw(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Move stake whose unbonding is over back to the balance.

    Example: kaisar stake withdraw
    """
    _stake("withdraw", None, data_dir, as_json, "Withdrawn")


@licence.command("buy")
def licence_buy(
    count: Annotated[int, typer.Argument(min=1, max=65535, help="How many.")] = 1,
    referrer: Annotated[
        str | None, typer.Option("--referrer", metavar="ADDRESS", help="Who recommended it.", show_default=False)
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Buy checker licences for the node's wallet.

    Example: kaisar licence buy
    """
    body: dict[str, Any] = {"count": count} | ({"referrer": referrer} if referrer else {})
    with NodeClient(data_directory(data_dir)) as node:
        _done(node.post("/v1/licence", **body), f"Bought {count}", as_json)


@licence.callback()
def _licence() -> None:
    """Checker licences."""


@worker.command("show")
def worker_show(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show this machine as a worker, and the ten steps of its registration.

    Example: kaisar worker show
    """
    with NodeClient(data_directory(data_dir)) as node:
        key = node.get("/v1/status")["key"]
        steps = node.get("/v1/registration")
        found = next((each for each in node.get("/v1/workers") if each["worker"] == key), None)
    if as_json:
        show_json({"key": key, "worker": found, "registration": steps})
        return
    if found is not None:
        fields: list[Any] = [
            ("Worker", "worker"),
            ("Status", "status"),
            ("Owner", "owner"),
            ("Price per hour", kai("price_per_hour")),
            ("Bond", kai("bond")),
            ("Has", lambda row: resources(row["spec"])),
            ("Checks passed", lambda row: f"{row['checks_passed']} of {row['checks']}"),
            ("Last verdict", "last_verdict"),
        ]
        show_record(found, fields, as_json=False)
    for step in steps["steps"]:
        mark = "x" if step["done"] else " "
        print(printable(f"[{mark}] {step['step']:>2} {step['name']:<30} {step['text']}").rstrip())


@worker.command("retire")
def worker_retire(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Leave as a worker; the bond returns when no lease is open.

    Example: kaisar worker retire
    """
    with NodeClient(data_directory(data_dir)) as node:
        _done(node.post("/v1/worker/retire"), "This machine is no worker any more", as_json)


def _stake(action: str, amount: int | None, data_dir: Path | None, as_json: bool, text: str) -> None:
    body = {"action": action} | ({"amount_planck": str(amount)} if amount is not None else {})
    with NodeClient(data_directory(data_dir)) as node:
        _done(node.post("/v1/stake", **body), text, as_json)


def _done(answer: Any, text: str, as_json: bool) -> None:
    if as_json:
        show_json(answer)
    else:
        print(f"{text} in call {answer['call']}")
