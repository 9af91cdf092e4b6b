"""A Kubernetes cluster as NeMo-Run sees one: its interface over HTTP, and `kubectl`."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: here, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: me, user: {{token: none}}}}]
contexts: [{{name: one, context: {{cluster: here, user: me}}}}]
current-context: one
"""

# `exec ... mkdir -p FOLDER` and `cp ... FROM POD:FOLDER` reach a folder instead of a volume.
KUBECTL = """\
#!/bin/sh
for last; do :; done
case $1 in
  exec) mkdir -p "{volume}$last" ;;
  cp) cp -r "$4" "{volume}${{last#*:}}" ;;
  get) echo '{{"items": []}}' ;;
esac
"""


class Cluster:
    """A cluster in a folder that takes a job and says that it has ended.

    Args:
        folder: Where its kubeconfig, its `kubectl` and what its volume holds are put.
        ended: What it says of the job's pods.
    """

    def __init__(self, folder: Path, ended: str = "succeeded") -> None:
        self.jobs: list[dict[str, Any]] = []
        self.ended = ended
        self.volume = folder / "volume"
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(KUBECONFIG.format(port=self.server.server_port))
        kubectl = folder / "kubectl"
        kubectl.write_text(KUBECTL.format(volume=self.volume))
        kubectl.chmod(0o755)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, value: Any, code: int = 200) -> None:
                data = json.dumps(value).encode() + b"\n"
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if "watch=True" in self.path:
                    pod = {"metadata": {"name": "mover"}, "status": {"phase": "Running"}}
                    self.answer({"type": "ADDED", "object": pod})
                elif "/trainjobs/" in self.path:
                    self.answer({"status": {"jobsStatus": [{cluster.ended: 1, "active": 0}]}})
                else:
                    self.answer({"reason": "NotFound"}, 404)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path.endswith("/namespaces/research/trainjobs"):
                    cluster.jobs.append(body)
                self.answer(body, 201)

            def do_DELETE(self) -> None:
                self.answer({"reason": "NotFound"}, 404)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
