# Every recipe sets up what it needs: everything goes into .venv, from requirements-dev.txt.

set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments := true

bin := ".venv/bin"
elsewhere := "not slow and not swarm and not interop and not attack and not docker and not chain and not browser and not gpu and not netns"

# List the recipes
[private]
default:
    @just --justfile "{{ justfile() }}" --list --unsorted

# Make .venv and install the pinned packages and this project; nothing to do when nothing changed
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    exec >&2
    python="$PWD/{{ bin }}/python"
    stamp=.venv/.kaisar-setup
    # What the environment was made from: the pinned sets, the metadata, this recipe, the place, the interpreter.
    fingerprint() {
        "$python" -c 'import hashlib, os, sys
    print(hashlib.sha256(b"".join(open(name, "rb").read() for name in sys.argv[1:])).hexdigest(), os.getcwd(), sys.version)' \
            requirements-build.txt requirements-dev.txt pyproject.toml justfile | tr '\n' ' '
    }
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then exit 0; fi

    [ -x "$python" ] || python3 -m venv --without-pip .venv
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: .venv has $("$python" --version), and Python 3.11 or newer is needed."
        echo "hint: remove .venv, and make it again with a newer one: python3.11 -m venv .venv"
        exit 1
    }
    echo "Setting up .venv with $("$python" --version) ..."
    # pip brings uv, and uv the rest; where uv cannot, pip does it, which takes longer.
    pip() {
        if "$python" -c 'import pip' 2>/dev/null; then "$python" -m pip --disable-pip-version-check "$@"
        else python3 -m pip --disable-pip-version-check --python "$python" "$@"; fi
    }
    install() {
        if [ -x {{ bin }}/uv ] && {{ bin }}/uv pip install --python "$python" "$@"; then return; fi
        pip install "$@"
    }
    pinned=(--quiet --no-deps --require-hashes)
    install "${pinned[@]}" -r requirements-build.txt
    # Two small dependencies publish no wheel; they are built by the pinned setuptools, never by a downloaded one.
    install "${pinned[@]}" --no-build-isolation -r requirements-dev.txt
    install --quiet --no-deps --no-build-isolation --editable .
    # trio-typing, which libp2p wants, brings stubs of trio's past that hide the types in trio itself from mypy.
    rm -rf .venv/lib/python*/site-packages/trio-stubs
    fingerprint > "$stamp"
    echo "Done: .venv holds everything."

# Run the whole story on this machine: 12 processes prove, certify, serve an order and settle it
demo *args: setup
    {{ bin }}/kaisar demo "$@"

# Run a command of the installed `kaisar`: just kaisar testnet up
kaisar *args: setup
    {{ bin }}/kaisar "$@"

# Run the quick tests (a few minutes): just test -k merkle
test *args: setup
    {{ bin }}/python -m pytest -m "{{ elsewhere }}" "$@"

# Run the tests that take longer than the quick ones should
test-slow *args: setup
    {{ bin }}/python -m pytest -m slow "$@"

# Run the tests that start a swarm of real processes
test-swarm *args: setup
    {{ bin }}/python -m pytest -m swarm "$@"

# Attack a node in every way that is known, and look whether its honest peers notice (a few minutes)
test-attacks *args: setup
    {{ bin }}/python -m pytest -m attack "$@"

# Run the tests against js-libp2p and go-libp2p, which are installed into .interop/ (needs npm)
test-interop *args: setup
    {{ bin }}/python -m pytest -m interop "$@"

# Run the tests that need a Docker engine; they are skipped, with the reason, where none answers
test-docker *args: setup
    {{ bin }}/python -m pytest -m docker "$@" || { code=$?; [ $code -eq 5 ] && echo "No test is marked docker."; }

# Run the tests of NATs, relays and hole punching in network namespaces; skipped, with the reason, where that cannot be
test-netns *args: setup
    {{ bin }}/python -m pytest -m netns "$@"

# Search for counterexamples with many random inputs: just fuzz tests/kaisar_p2p/wire; a million for the mesh: just fuzz mesh
fuzz *args: setup
    #!/usr/bin/env bash
    set -euo pipefail
    # `mesh` is a fuzzer of its own (--inputs, --seed, --target, --replay); a path is a set of hypothesis tests.
    if [ "${1:-}" = mesh ]; then exec {{ bin }}/python -m tests.fuzz "${@:2}"; fi
    HYPOTHESIS_PROFILE=fuzz {{ bin }}/python -m pytest -m "{{ elsewhere }}" --hypothesis-show-statistics "$@"

# Check the style
lint *args: setup
    {{ bin }}/ruff check . "$@"

# Check the types, strictly
types *args: setup
    {{ bin }}/mypy "$@"

# Make the golden vectors again and compare them with the committed ones
vectors: setup
    #!/usr/bin/env bash
    set -euo pipefail
    trap 'rm -f tests/vectors/*.new' EXIT
    for golden in tests/vectors/*.json; do
        echo "$golden"
        {{ bin }}/python tests/vectors/generate.py "$(basename "$golden" .json)" > "$golden.new"
        mv "$golden.new" "$golden"
    done
    git --no-pager diff --exit-code --stat -- tests/vectors || {
        echo "error: the code makes other vectors than the committed ones: the protocol has changed"
        echo "hint: if that is meant, commit the new ones; if not, git restore tests/vectors"
        exit 1
    }

# Measure: just bench spine, just bench ledger --json
bench name *args: setup
    {{ bin }}/python -m benchmarks "$@"

# Load one mesh node for long, and say whether its memory grows: just soak --minutes 1 --cycles 500
soak *args: setup
    {{ bin }}/python -m benchmarks.soak "$@"

# Resolve the dependencies of pyproject.toml and pin them by hash: just lock --upgrade
lock *args: setup
    #!/usr/bin/env bash
    set -euxo pipefail
    pin() {
        {{ bin }}/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
            --no-emit-index-url --no-emit-find-links "$@"
    }
    pin "$@" --group pyproject.toml:build --output-file requirements-build.txt
    pin "$@" --constraint requirements-build.txt --output-file requirements.txt pyproject.toml
    pin "$@" --constraint requirements-build.txt --constraint requirements.txt --extra dev \
        --output-file requirements-dev.txt pyproject.toml

# Remove caches and build outputs; .venv stays
clean:
    rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
    find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
