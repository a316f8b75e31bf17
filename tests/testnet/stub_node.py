"""What a swarm sees of a node, and nothing behind it: `stub_node.py DATA_DIRECTORY`.

A file `stub` in the data directory says how it misbehaves: "die" ends at once, "mute" never answers, "deaf" ignores
SIGTERM, "lease" starts a program in the leases directory that outlives it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from node.api.address import ApiAddress, remove_address, write_address

TOKEN = "stub"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"pid": os.getpid(), "peers": 3, "chain": {"block": 7}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    directory = Path(sys.argv[1])
    path = directory / "stub"
    manner = path.read_text() if path.exists() else ""
    print(f"stub {directory.name} begins", flush=True)
    if manner == "die":
        print("error: the stub was told to die", flush=True)
        sys.exit(7)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    address = ApiAddress(f"http://127.0.0.1:{server.server_port}", TOKEN, os.getpid())
    if manner == "lease":
        lease = directory / "leases" / "one"
        lease.mkdir(parents=True, exist_ok=True)
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], cwd=lease, env={}, start_new_session=True
        )
    if manner == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    if manner != "mute":
        write_address(directory, address)
    server.serve_forever(poll_interval=0.02)
    remove_address(directory, address)


if __name__ == "__main__":
    main()
