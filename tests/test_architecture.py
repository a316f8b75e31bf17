"""The layers hold: imports point down, adapters do not know each other, what decides touches nothing outside.

An AST walk over every module of the four packages, so that an import inside a function or through `importlib`
counts too. The walk itself is tested on small samples that break one rule each.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kaisar_p2p", "protocols", "node", "testnet")  # from the bottom to the top
OUTSIDE_OF_LAYERS = ("tests", "benchmarks")
PURE = ("protocols", "kaisar_p2p.wire")
LEAVES = ("kaisar_p2p.wire", "kaisar_p2p.errors")
MAX_LINES = 600
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}

# What a pure module may not import: scheduling, network, clock, entropy, files, processes, engines, chains.
IMPURE_MODULES = {
    *("trio", "anyio", "asyncio", "threading", "multiprocessing", "concurrent", "subprocess", "signal", "sched"),
    *("socket", "select", "selectors", "ssl", "http", "urllib", "httpx", "requests", "libp2p", "multiaddr"),
    *("time", "random", "secrets", "uuid", "numpy.random", "nacl.utils", "Crypto.Random"),
    *("os", "posix", "pathlib", "io", "shutil", "tempfile", "glob", "mmap", "sqlite3", "dbm", "fileinput"),
    *("sys", "platform", "psutil", "pynvml", "ctypes", "docker", "substrateinterface", "importlib", "logging"),
}
IMPURE_BUILTINS = {"open", "input", "print", "eval", "exec", "compile", "__import__", "breakpoint"}
CLOCK_CALLS = {"now", "utcnow", "today"}


def inside(module: str, *packages: str) -> bool:
    """Whether `module` is one of `packages` or below one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the line and the full dotted name of everything imported anywhere in `tree`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and node.args
            and _name(node.func).split(".")[-1]
            in (
                "import_module",
                "__import__",
            )
        ):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def _name(node: ast.AST) -> str:
    """Return the dotted name of an expression, `?` where a part of it is computed."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def upward(module: str, imported: str) -> str | None:
    """Say why `module` may not import `imported`, or None."""
    layer, other = module.split(".")[0], imported.split(".")[0]
    if other in OUTSIDE_OF_LAYERS:
        return f"{other} is not part of the product"
    if layer not in LAYERS or other not in LAYERS:
        return None
    if LAYERS.index(other) > LAYERS.index(layer):
        return f"{other} is above {layer}"
    if layer == "protocols" and other == "kaisar_p2p" and not inside(imported, *LEAVES):
        return "protocols may import only kaisar_p2p.wire and kaisar_p2p.errors of kaisar_p2p"
    if layer == other == "kaisar_p2p" and not inside(imported, *LEAVES, ".".join(module.split(".")[:2])):
        return "an adapter may import only kaisar_p2p.wire, kaisar_p2p.errors and itself"
    return None


def impure(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield what a pure module may not do: call builtins that touch the world, read a clock, make a key."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in IMPURE_BUILTINS and isinstance(node.ctx, ast.Load):
            yield node.lineno, f"uses the builtin {node.id}"
        elif isinstance(node, ast.Attribute):
            owner = _name(node.value).split(".")[-1]
            if node.attr in CLOCK_CALLS and owner in ("datetime", "date"):
                yield node.lineno, f"reads the clock by {owner}.{node.attr}"
            if node.attr == "generate" and owner.endswith("Key"):
                yield node.lineno, f"takes entropy by {owner}.generate"
            if node.attr == "random" and owner in ("np", "numpy"):
                yield node.lineno, f"takes randomness by {owner}.random"


def swallows(node: ast.AST) -> bool:
    """Whether `node` is a handler of every exception that does nothing about it."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    broad = node.type is None or _name(node.type) in ("Exception", "BaseException")
    return broad and all(
        isinstance(line, ast.Pass | ast.Continue)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in node.body
    )


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return every broken rule of one module as `module:line: what`."""
    tree = ast.parse(source)
    found: list[tuple[int, str]] = []
    pure = inside(module, *PURE)
    for line, imported in imports(tree, module, is_package=is_package):
        if why := upward(module, imported):
            found.append((line, f"imports {imported}: {why}"))
        if pure and inside(imported, *IMPURE_MODULES):
            found.append((line, f"imports {imported}: {module.split('.')[0]} decides, and touches nothing outside"))
    if pure:
        found += impure(tree)
    found += [(node.lineno, "swallows every exception") for node in ast.walk(tree) if swallows(node)]
    if (lines := len(source.splitlines())) > MAX_LINES:
        found.append((lines, f"is longer than {MAX_LINES} lines"))
    if vague := VAGUE_NAMES & set(module.split(".")):
        found.append((1, f"is called {vague.pop()}: name what it does"))
    return [f"{module}:{line}: {what}" for line, what in sorted(found)]


def modules() -> list[Path]:
    """Return every source file of the product."""
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def test_every_module_keeps_the_rules() -> None:
    found = []
    for path in modules():
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        found += violations(path.read_text(encoding="utf-8"), module, is_package=is_package)
    assert not found, "\n" + "\n".join(found)


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in modules()} >= {"kaisar_p2p", "protocols"}


def test_tests_and_benchmarks_stay_readable() -> None:
    files = [path for name in OUTSIDE_OF_LAYERS for path in (ROOT / name).rglob("*.py")]
    long = [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES]
    assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kaisar_p2p.mesh.host", "from protocols import params"),
        ("kaisar_p2p.mesh.host", "def late():\n    import node.driver"),
        ("protocols.popw", "import node"),
        ("node.driver", "import testnet.swarm"),
        ("node.driver", "import importlib\nimportlib.import_module('testnet.swarm')"),
        ("node.driver", "from tests import conftest"),
        ("protocols.popw", "import kaisar_p2p"),
        ("protocols.popw", "from kaisar_p2p import mesh"),
        ("protocols.popw", "from kaisar_p2p.identity import Wallet"),
        ("kaisar_p2p.mesh.host", "from kaisar_p2p.ledger import embedded"),
        ("kaisar_p2p.mesh.host", "from ..runtime import docker"),
        ("kaisar_p2p.identity", "from kaisar_p2p.mesh import host"),
        ("kaisar_p2p.wire.codec", "from kaisar_p2p.identity import Wallet"),
        ("protocols.popw", "import trio"),
        ("protocols.popw", "import os.path"),
        ("protocols.popw", "def late():\n    from time import time"),
        ("protocols.popw", "from numpy import random"),
        ("protocols.popw", "import numpy as np\nnp.random.default_rng()"),
        ("protocols.popw", "from datetime import datetime\ndatetime.now()"),
        ("protocols.popw", "import datetime\ndatetime.datetime.utcnow()"),
        ("protocols.popw", "import datetime\nclock = datetime.date.today"),
        ("protocols.popw", "__import__('socket')"),
        ("protocols.interpreter.apply", "from importlib import import_module\nimport_module('random')"),
        ("kaisar_p2p.wire.crypto", "from nacl.signing import SigningKey\nSigningKey.generate()"),
        ("kaisar_p2p.wire.crypto", "import secrets"),
        ("kaisar_p2p.wire.codec", "data = open('x').read()"),
        ("kaisar_p2p.wire.codec", "read = open"),
        ("node.driver", "try:\n    x = 1\nexcept Exception:\n    pass"),
        ("node.driver", "try:\n    x = 1\nexcept:\n    ..."),
        ("node.driver", "for _ in ():\n    try:\n        x = 1\n    except BaseException as e:\n        continue"),
        ("node.driver", "x = 1\n" * 601),
        ("node.utils", ""),
        ("kaisar_p2p.common.ids", ""),
    ],
)
def test_the_walk_finds(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kaisar_p2p.mesh.host", "import trio\nfrom kaisar_p2p.wire import codec"),
        ("kaisar_p2p.mesh.host", "from kaisar_p2p.errors import MeshError"),
        ("kaisar_p2p.mesh.host", "from . import gossip\nfrom kaisar_p2p.mesh.peers import Peers"),
        ("protocols.popw", "from kaisar_p2p import wire\nfrom kaisar_p2p.wire.merkle import root"),
        ("protocols.popw", "from protocols import params"),
        ("protocols.popw", "import numpy as np\nfrom datetime import timedelta\nx = self.clock.now"),
        ("protocols.popw", "class Machine:\n    def open(self): ...\n    def late(self): self.open()"),
        ("node.effects", "import os, protocols.popw, kaisar_p2p.mesh, kaisar_p2p.ledger"),
        ("testnet.swarm", "import node.boot, protocols.params, subprocess"),
        ("node.driver", "try:\n    x = 1\nexcept KeyError:\n    pass"),
        ("node.driver", "try:\n    x = 1\nexcept Exception:\n    log.exception('x')"),
        ("node.driver", "x = 1\n" * 600),
    ],
)
def test_the_walk_lets_pass(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_of_a_package_resolve() -> None:
    assert violations("from ..ledger import embedded", "kaisar_p2p.mesh", is_package=True) == [
        "kaisar_p2p.mesh:1: imports kaisar_p2p.ledger.embedded: an adapter may import only kaisar_p2p.wire, "
        "kaisar_p2p.errors and itself"
    ]
