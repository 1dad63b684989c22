# SPDX-License-Identifier: Apache-2.0
"""A snapshot process as Prometheus sees it: `--rdzv-conf=metrics_port=9187`, then http://127.0.0.1:9187/metrics.

Off without a port, and never on anything but loopback: what leaves the machine is the business of whoever scrapes it.
Every user of the machine can read it there: names of job and node, sizes and times, and nothing of the state.
The text is version 0.0.4 of Prometheus' exposition format.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PHASES = ("waiting", "rendezvous", "recovering", "copying", "parity", "idle")
_TIMEOUT_S = 10.0
_ADDRESS = "127.0.0.1"

Status = Mapping[str, Any]
"""What `refound status` shows of one snapshot process, agent_pid included."""


def render(status: Status) -> str:
    """One snapshot process as text; a value that is not known yet is left out."""
    labels = {"job": status["job"], "node": status["node"]}
    lines: list[str] = []
    for name, kind, about, samples in _families(status):
        known = [(extra, value) for extra, value in samples if value is not None]
        if not known:
            continue
        lines += [f"# HELP refound_{name} {about}", f"# TYPE refound_{name} {kind}"]
        for extra, value in known:
            inside = ",".join(f'{key}="{_escaped(str(each))}"' for key, each in (labels | extra).items())
            lines.append(f"refound_{name}{{{inside}}} {_number(value)}")
    return "\n".join(lines) + "\n"


_Samples = list[tuple[dict[str, str], float | int | None]]


def _families(status: Status) -> Iterator[tuple[str, str, str, _Samples]]:
    """Name, type, help and samples of each metric."""
    committed, checkpoint = status["committed"], status["checkpoint"]

    def gauge(name: str, about: str, value: float | int | None) -> tuple[str, str, str, _Samples]:
        return name, "gauge", about, [({}, value)]

    yield gauge("generation", "Rendezvous of the job so far.", status["generation"])
    yield gauge("nodes", "Nodes of this generation.", len(status["nodes"]))
    yield gauge("workers", "Workers of this node that are connected.", len(status["workers"]))
    yield gauge("agent_up", "1 while this node's torchrun is connected.", int(status["agent_pid"] is not None))
    yield gauge("trouble", "1 if no snapshot can be taken until a restart.", int(status["trouble"] is not None))
    yield gauge("committed_step", "Newest step that all nodes hold.", committed and committed["step"])
    yield gauge("committed_age_seconds", "Since that was committed.", committed and committed["age_s"])
    yield "snapshots_total", "counter", "Snapshots committed.", [({}, status["snapshots"])]
    last_commit_s = status["last_commit_ms"] / 1000 if status["snapshots"] else None
    yield gauge("commit_seconds", "From the last shard's completion here to the commit.", last_commit_s)
    yield gauge("stall_seconds", "How long a snapshot held training up here.", _seconds(status["stall_ms"]))
    yield gauge("step_seconds", "A training step without that.", _seconds(status["step_ms"]))
    yield gauge("interval_steps", 'Steps between snapshots, with every="auto".', status["every"])
    yield gauge("slot_bytes", "Memory of snapshots.", status["slot_bytes"])
    yield gauge("parity_bytes", "Memory of parity.", status["parity_bytes"])
    yield gauge(
        "checkpoint_step", "Newest complete checkpoint on storage (at the lead).", checkpoint and checkpoint["step"]
    )
    phases: _Samples = [({"phase": phase}, int(phase == status["phase"])) for phase in _PHASES]
    yield "phase", "gauge", "1 for what the snapshot process is doing.", phases


def _seconds(value_ms: float | None) -> float | None:
    return None if value_ms is None else value_ms / 1000


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


class MetricsServer:
    """Answers GET /metrics on loopback until it is closed. Raises OSError if the port cannot be had."""

    def __init__(self, port: int, status: Callable[[], Status]) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _TIMEOUT_S  # a caller that says nothing holds a thread no longer than that

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404, "here is only /metrics")
                    return
                body = render(status()).encode()
                self.send_response(200)
                self.send_header("Content-Type", _CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """A scrape every few seconds is no news."""

        self._server = _Server((_ADDRESS, port), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that went away in the middle of its answer."""
