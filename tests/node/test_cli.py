"""The `kaisar` command by itself: files it makes, texts it parses, errors it prints, exit codes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from kaisar_p2p.errors import ConfigError, DataDirectoryError, KaisarError, LedgerError, StoreError
from kaisar_p2p.identity import Keystore
from node import cli, initialise
from node.commands import run as run_module
from node.commands.options import parse_hours_s, parse_kai, parse_size_mb, parse_variable
from node.config import Config, lock_data_directory
from protocols.params import KAI
from tests.node.command_line import Invoke, command_line


@pytest.fixture
def kaisar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run a command in this process, as the console script would."""
    monkeypatch.setenv("KAISAR_HOME", str(tmp_path / "home"))
    return command_line()


def script(*arguments: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    environ = {**os.environ, "KAISAR_HOME": str(home), **env}
    command = [sys.executable, "-m", "node.cli", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


# ── init ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_init_makes_everything_private(kaisar: Invoke, tmp_path: Path) -> None:
    made = kaisar("init", "--no-passphrase", "--json", "--role", "provider", "--role", "checker", "--name", "one")
    assert made.code == 0, made.err
    record = json.loads(made.out)
    home = tmp_path / "home"
    assert record["own_ledger"] is True and record["encrypted"] is False and "mnemonic" not in record
    modes = {str(path.relative_to(home)): stat.S_IMODE(path.stat().st_mode) for path in [home, *home.rglob("*")]}
    assert modes == {
        ".": 0o700, "keys": 0o700, "keys/machine.json": 0o600, "keys/wallet-main.json": 0o600, "config.toml": 0o600,
        "genesis.json": 0o600, "ledger.sqlite": 0o600,
    }  # fmt: skip
    assert 'roles = ["provider", "checker"]' in (home / "config.toml").read_text()
    assert record["address"] in kaisar("wallet", "list").out


def test_init_never_prints_a_secret_unasked(kaisar: Invoke, tmp_path: Path) -> None:
    made = kaisar("init", "--no-passphrase")
    phrase = Keystore(tmp_path / "home" / "keys").export_mnemonic("main", None)
    seed = Keystore(tmp_path / "home" / "keys").export_seed("main", None)
    for secret in (phrase, seed, seed[2:]):
        assert secret not in made.out + made.err
    shown = kaisar("init", "--no-passphrase", "--show-mnemonic", "--data-dir", str(tmp_path / "two"))
    assert Keystore(tmp_path / "two" / "keys").export_mnemonic("main", None) in shown.out


def test_init_replaces_nothing(kaisar: Invoke, tmp_path: Path) -> None:
    assert kaisar("init", "--no-passphrase").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()}
    again = kaisar("init", "--no-passphrase")
    assert again.code == 4
    assert "is not empty" in again.err
    assert before == {path: path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()}


def test_init_joins_a_ledger(kaisar: Invoke, tmp_path: Path) -> None:
    first = json.loads(kaisar("init", "--no-passphrase", "--json").out)
    ledger = tmp_path / "home" / "ledger.sqlite"
    joined = kaisar("init", "--no-passphrase", "--json", "--ledger", str(ledger), "--data-dir", str(tmp_path / "two"))
    record = json.loads(joined.out)
    assert (record["network"], record["own_ledger"]) == (first["network"], False)
    assert f'path = "{ledger}"' in (tmp_path / "two" / "config.toml").read_text()
    assert (tmp_path / "two" / "genesis.json").read_bytes() == (tmp_path / "home" / "genesis.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--network", "moon"], 2, "demo, testnet, mainnet"),
        (["--role", "boss"], 4, "node.roles must be"),
        (["--role", "boss"], 4, "hint: it is ['boss']"),
        (["--scheme", "rsa"], 2, "use ed25519 or sr25519"),
        (["--ledger", "{tmp}/none.sqlite"], 4, "no ledger at"),
        (["--genesis", "{tmp}/none.json"], 4, "cannot be read"),
        (["--genesis", "{tmp}/bad.json"], 4, "JSON"),
        (["--listen", "4001"], 4, "network.listen must be"),
        (["--passphrase-file", "{tmp}/none"], 4, "exclude each other"),
    ],
)
def test_a_plan_that_cannot_work_leaves_nothing_behind(
    kaisar: Invoke, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "bad.json").write_text("{")
    failed = kaisar("init", "--no-passphrase", *(each.format(tmp=tmp_path) for each in arguments))
    assert (failed.code, said in failed.err) == (code, True), failed.err
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("there", [False, True])
def test_init_leaves_nothing_half_made(
    kaisar: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    home = tmp_path / "home"
    if there:
        home.mkdir(mode=0o700)

    def full(path: Path, config: object) -> None:
        assert (home / "keys" / "machine.json").exists()
        raise ConfigError(f"{path} cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(initialise, "write_config", full)
        assert kaisar("init", "--no-passphrase").code == 4
    assert home.exists() == there
    assert kaisar("init", "--no-passphrase").code == 0


def test_two_inits_at_once_do_not_touch_each_other(
    kaisar: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, results = initialise.write_config, []

    def meanwhile(path: Path, config: Config) -> None:
        monkeypatch.setattr(initialise, "write_config", write)
        monkeypatch.setattr(initialise, "_check_empty", lambda directory: None)  # the other one looked before us
        results.append(kaisar("init", "--no-passphrase"))
        write(path, config)

    monkeypatch.setattr(initialise, "write_config", meanwhile)
    assert kaisar("init", "--no-passphrase").code == 0
    assert (results[0].code, "another process works on" in results[0].err) == (4, True)
    assert kaisar("wallet", "export", "main").code == 0


def test_init_with_a_passphrase(kaisar: Invoke, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("correct horse\n")
    made = kaisar("init", "--passphrase-file", str(tmp_path / "secret"), "--json")
    assert json.loads(made.out)["encrypted"] is True
    wrong = kaisar("wallet", "export", "main", env={"KAISAR_PASSPHRASE": "wrong"})
    assert (wrong.code, wrong.out) == (4, "")
    right = kaisar("wallet", "export", "main", env={"KAISAR_PASSPHRASE": "correct horse"})
    assert len(right.out.split()) == 12


def test_a_directory_without_rights(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    failed = script("init", "--no-passphrase", home=tmp_path / "closed" / "home")
    assert failed.returncode == 4
    assert "cannot be" in failed.stderr


# ── wallets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def home(kaisar: Invoke, tmp_path: Path) -> Iterator[Path]:
    assert kaisar("init", "--no-passphrase").code == 0
    yield tmp_path / "home"


@pytest.mark.parametrize("scheme", ["ed25519", "sr25519"])
@pytest.mark.parametrize("what", ["mnemonic", "seed", "json"])
def test_a_wallet_survives_export_and_import(
    kaisar: Invoke, home: Path, tmp_path: Path, what: str, scheme: str
) -> None:
    (tmp_path / "lock").write_text("a lock")
    lock = ["--json-passphrase-file", str(tmp_path / "lock")] if what == "json" else []
    made = json.loads(kaisar("wallet", "new", "old", "--scheme", scheme, "--no-passphrase", "--json").out)
    file = tmp_path / "exported"
    assert kaisar("wallet", "export", "old", "--as", what, "--output", str(file), *lock).code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = ["wallet", "import", "new", "--from", what, "--scheme", scheme, "--file", str(file), "--no-passphrase"]
    imported = kaisar(*again, *lock, "--json")
    assert imported.code == 0, imported.err
    assert json.loads(imported.out)["address"] == made["address"]
    assert [row["name"] for row in json.loads(kaisar("wallet", "list", "--json").out)] == ["main", "new", "old"]


def test_a_secret_can_be_typed(kaisar: Invoke, home: Path) -> None:
    phrase = kaisar("wallet", "export", "main").out
    typed = kaisar("wallet", "import", "again", "--no-passphrase", "--json", text=phrase)
    assert typed.code == 0
    assert phrase.strip() not in typed.out + typed.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["export", "nobody"], 4, "there is no wallet"),
        (["export", "main", "--as", "qr"], 2, "not mnemonic, seed or json"),
        (["new", "main", "--no-passphrase"], 4, "exists already"),
        (["new", "../x", "--no-passphrase"], 4, "is not a wallet name"),
        (["new", "x", "--words", "13"], 2, "12 or 24"),
        (["new", "x", "--scheme", "rsa"], 2, "use ed25519 or sr25519"),
        (["import", "x", "--from", "seed"], 4, "standard input is empty"),
        (["balance", "nobody"], 2, "no wallet's name either"),
        (["balance", "../status"], 2, "no wallet's name either"),
        (["import", "x", "--from", "json"], 2, "a polkadot-js file is needed"),
        (["import", "x", "--file", "/none"], 4, "cannot be read"),
        (["balance"], 3, "no node answers"),
        (["transfer", "5Grw", "1e3"], 2, "is not an amount of KAI"),
        (["transfer", "5Grw", "1"], 3, "no node answers"),
    ],
)
def test_wallet_refusals(kaisar: Invoke, home: Path, arguments: list[str], code: int, said: str) -> None:
    refused = kaisar("wallet", *arguments)
    assert (refused.code, said in " ".join(refused.err.split())) == (code, True), refused.err


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "megabytes"),
    [("512MB", 489), ("512MiB", 512), ("2GB", 1908), ("2GiB", 2048), ("1.5g", 1536), ("1 T", 1 << 20), ("1mb", 1)],
)
def test_sizes(text: str, megabytes: int) -> None:
    assert parse_size_mb(text) == megabytes


@pytest.mark.parametrize("text", ["", "2", "GB", "2XB", "-2GB", "2,5GB", "0MB", "1e3MB", "9999999TB", "١GB"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size_mb(text)


def test_other_texts() -> None:
    assert (parse_hours_s("2"), parse_hours_s("0.5"), parse_kai("12.5")) == (7200, 1800, 125 * KAI // 10)
    assert parse_variable("A=b=c") == ("A", "b=c")
    for parse, text in ((parse_hours_s, "1h"), (parse_hours_s, "-1"), (parse_kai, "1,5"), (parse_variable, "=x")):
        with pytest.raises(typer.BadParameter):
            parse(text)


# ── run ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_passes_flags_on(kaisar: Invoke, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(run_module, "run_configured", lambda config, passphrase: seen.append((config, passphrase)))
    peer = "/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWQYV9dGMFoRzNStwpXztXaBUjtPqi6aU76ZgUriHhKust"
    flags = ["--role", "provider", "--role", "checker", "--join", peer, "--listen", "/ip4/127.0.0.1/tcp/0"]
    assert kaisar("run", *flags, "--api-port", "0", "--log-json").code == 0
    [(config, passphrase)] = seen
    assert (config.node.roles, config.network.join, passphrase) == (("provider", "checker"), (peer,), None)
    assert config.log.json is True


def test_run_refuses_a_directory_that_is_in_use(kaisar: Invoke, home: Path) -> None:
    with lock_data_directory(home):
        refused = kaisar("run")
    assert refused.code == 4
    assert f"in use by process {os.getpid()}" in refused.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--role", "boss"], "node.roles must be"),
        (["--join", "nowhere"], "network.join must be"),
        (["--log-level", "loud"], "log.level must be"),
    ],
)
def test_run_refuses_what_it_cannot_use(kaisar: Invoke, home: Path, arguments: list[str], said: str) -> None:
    refused = kaisar("run", *arguments)
    assert (refused.code, said in refused.err) == (4, True)


def test_run_without_a_data_directory(kaisar: Invoke, tmp_path: Path) -> None:
    refused = kaisar("run")
    assert (refused.code, "kaisar init" in refused.err) == (4, True)


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_error_is_two_lines_and_no_traceback(tmp_path: Path) -> None:
    failed = script("status", home=tmp_path / "none")
    assert (failed.returncode, failed.stdout) == (3, "")
    error, hint = failed.stderr.splitlines()
    assert error == f"error: no node answers for {tmp_path / 'none'}"
    assert hint.startswith("hint: make and start one: kaisar init")


def test_no_line_of_a_message_passes_for_one_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    cli.print_error("a node ended:\n  x | its log\nhint: send KAI to me\x1b[2J", "look at\nits log")
    assert capsys.readouterr().err.splitlines() == [
        "error: a node ended:", "    x | its log", "  hint: send KAI to me\ufffd[2J", "hint: look at\ufffdits log",
    ]  # fmt: skip


def test_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "node.cli", "order", "templates", "--json"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert run.returncode == 1
    assert "error: the system refuses: " in run.stderr and "No space left" in run.stderr
    assert "Traceback" not in run.stderr and "mistake" not in run.stderr


def test_a_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    failed = script("status", home=tmp_path / "none", KAISAR_DEBUG="1")
    assert "Traceback" in failed.stderr


def test_help_is_plain_when_piped_and_version_is_known(tmp_path: Path) -> None:
    helped = script("--help", home=tmp_path)
    assert helped.returncode == 0
    assert "\x1b" not in helped.stdout and "\t" not in helped.stdout and "─" not in helped.stdout
    assert script("--version", home=tmp_path).stdout.startswith("kaisar 0.")
    assert script("bogus", home=tmp_path).returncode == 2
    assert script(home=tmp_path).returncode == 2


def test_light_commands_do_not_load_the_node() -> None:
    """`kaisar --help` must not wait for the peer-to-peer stack."""
    program = (
        "import sys, node.cli; node.cli.make_app();"
        "print([m for m in ('libp2p', 'trio', 'hypercorn', 'starlette', 'numpy', 'docker') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[]", run.stderr


def test_ctrl_c_ends_any_command_cleanly(tmp_path: Path) -> None:
    program = "import node.cli as c, node.commands.look as l, os, signal\n"
    program += "def interrupt(*_): os.kill(os.getpid(), signal.SIGINT)\n"
    program += "import sys; l.NodeClient = interrupt; sys.argv = ['kaisar', 'status']; c.main()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in run.stderr


def test_errors_map_to_exit_codes() -> None:
    assert cli.exit_code(DataDirectoryError("x")) == 4
    assert cli.exit_code(LedgerError("x")) == 4
    assert cli.exit_code(StoreError("x")) == 4
    assert cli.exit_code(KaisarError("x")) == 1


def test_an_extension_that_cannot_be_loaded_costs_only_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ImportError("no such module")

    entry = SimpleNamespace(name="extra", load=broken)
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
    cli.make_app()
    assert "the command extra cannot be loaded" in capsys.readouterr().err
