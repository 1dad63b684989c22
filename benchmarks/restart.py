# SPDX-License-Identifier: Apache-2.0
"""From a fault to the first new step, beside stock torchrun restarting the same script without any state.

    python benchmarks/restart.py [--json] [--rounds 5] [--width 1024]

Three nodes (torchrun agents on loopback, one worker each) train a small DDP model. In every round each contender in
turn runs the job, loses a worker, then a whole node (agent, worker and snapshot process) that is replaced at once by
an empty one. Counted is the time from SIGKILL to the first step that rank 0 completes after it. The stock contender is
c10d with `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`, since its default often cannot restart at all (pytorch #167288), and
torchrun's own time-outs; its script protects nothing and starts again at step 0. "warm" is refound with
`warm_spares=1`; faults wait until the spares of all nodes stand by. A replaced node has only what its first worker
begins from.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from refound.demo.cluster import Cluster

NODES = 3
STEPS_BETWEEN = 5
MAX_WAIT_S = 180.0
CONTENDERS = ("stock", "refound", "warm")
BARS = {"refound": 1.3, "warm": 0.5}
"""Worker kill to first new step, as a multiple of stock torchrun's."""


def worker(options: argparse.Namespace) -> None:
    """One rank: train until ended, and write a line for every step."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layers = [torch.nn.Linear(options.width, options.width) for _ in range(4)]
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    optimizer = torch.optim.AdamW(model.parameters())
    job = None
    if options.contender != "stock":
        import refound

        job = refound.protect(model=model, optimizer=optimizer)
    with Path(options.worker, f"rank{dist.get_rank()}").open("a") as log:
        while True:
            model(torch.randn(8, options.width)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if job is not None:
                job.end_step()
            log.write(json.dumps({"time_s": time.time(), "pid": os.getpid()}) + "\n")
            log.flush()


class Contender(Cluster):
    """The same job under refound, or under torchrun's own rendezvous."""

    def __init__(self, name: str, folder: Path, width: int) -> None:
        self.kind, self.folder = name, folder
        script = [__file__, f"--worker={folder}", f"--contender={name}", f"--width={width}"]
        super().__init__(job=f"bench-{name}", nodes=NODES, script=script, logs=folder)

    def _rendezvous(self, index: int) -> list[str]:
        options = super()._rendezvous(index)
        if self.kind != "stock":
            more = ",warm_spares=1" if self.kind == "warm" else ""
            return [option + more if option.startswith("--rdzv-conf=") else option for option in options]
        replaced = {"--rdzv-backend": "c10d", "--rdzv-conf": "is_host=0"}
        return [
            f"{option.split('=')[0]}={replaced[option.split('=')[0]]}" if option.split("=")[0] in replaced else option
            for option in options
        ]

    def steps(self, rank: int) -> list[dict[str, Any]]:
        """The complete lines that a rank has written."""
        path = self.folder / f"rank{rank}"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def await_steps(self, since_s: float, count: int) -> list[dict[str, Any]]:
        """Wait until rank 0 has completed `count` steps after `since_s`, in a process that began after it."""
        before = {step["pid"] for step in self.steps(0) if step["time_s"] <= since_s}
        deadline = time.monotonic() + MAX_WAIT_S
        while time.monotonic() < deadline:
            new = [s for s in self.steps(0) if s["time_s"] > since_s and s["pid"] not in before]
            if len(new) >= count:
                return new
            time.sleep(0.01)
        sys.exit(f"{self.kind} did not come back within {MAX_WAIT_S:.0f} s:\n" + self.logs_tail())

    def await_spares(self, times: int) -> None:
        """Wait until every agent has said so often that its spares stand by."""
        deadline = time.monotonic() + MAX_WAIT_S
        while self.kind == "warm" and any(log.count("stand by") < times for log in self._all_logs()):
            if time.monotonic() > deadline:
                sys.exit(f"no spares within {MAX_WAIT_S:.0f} s:\n" + self.logs_tail())
            time.sleep(0.05)

    def _all_logs(self) -> list[str]:
        return [(self.folder / f"{name}.log").read_text() for name in self.names.values()]

    def logs_tail(self) -> str:
        return "\n".join(log[-1500:] for log in self._all_logs())

    def pids_of_node(self, index: int) -> list[int]:
        """Agent, workers and snapshot process of a node: whatever has the agent's environment or is its child."""
        agent = self._agents[index].pid
        children = [int(p) for p in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
        keepers = [status["pid"] for status in self.statuses() if status["node"] == self.names[index]]
        return [agent, *children, *keepers]

    def kill_worker(self) -> float:
        """SIGKILL the worker of the last node. Returns when."""
        pid = self.steps(NODES - 1)[-1]["pid"]
        now_s = time.time()
        os.kill(pid, signal.SIGKILL)
        return now_s

    def kill_node(self) -> float:
        """SIGKILL all of node 1 and start an empty one. Returns when."""
        pids = self.pids_of_node(1)
        now_s = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self._agents[1].wait()
        self._start_node(1)
        return now_s


def measure(name: str, width: int, kind: type[Contender] = Contender) -> dict[str, float]:
    """Seconds to the first new step after a worker kill and after a node loss."""
    with tempfile.TemporaryDirectory() as folder, kind(name, Path(folder), width) as cluster:
        cluster.start()
        cluster.await_steps(0.0, STEPS_BETWEEN)
        seconds = {}
        for number, (fault, strike) in enumerate(
            (("worker kill", cluster.kill_worker), ("node loss", cluster.kill_node)), start=1
        ):
            cluster.await_spares(number)
            struck_s = strike()
            seconds[fault] = cluster.await_steps(struck_s, STEPS_BETWEEN)[0]["time_s"] - struck_s
        return seconds


def figures(samples: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians of each, and the median of the rounds' ratios."""
    from _figures import figure  # a worker's path lacks this folder (PYTHONSAFEPATH)

    rows = []
    for fault in ("worker kill", "node loss"):
        for name in CONTENDERS:
            rows.append(figure(f"{fault} to first new step, {name}", median(s[fault] for s in samples[name]), "s"))
        for name, most in BARS.items():
            pairs = zip(samples[name], samples["stock"], strict=True)
            ratio = median(ours[fault] / theirs[fault] for ours, theirs in pairs)
            bar = (f"<= {most}", ratio <= most) if fault == "worker kill" else ("", None)
            rows.append(figure(f"{fault}, {name} / stock", ratio, "x", *bar))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024, help="of the model's four layers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options)
        return

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds):
        for name in CONTENDERS if number % 2 == 0 else reversed(CONTENDERS):
            samples[name].append(measure(name, options.width))
            print(f"round {number + 1}: {name} {samples[name][-1]}", file=sys.stderr, flush=True)
    rows = figures(samples)
    from _figures import tell

    tell(rows, as_json=options.json)


if __name__ == "__main__":
    main()
