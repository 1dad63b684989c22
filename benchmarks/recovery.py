# SPDX-License-Identifier: Apache-2.0
"""How long training stands still after a loss, beside the rivals' way to go on.

    python benchmarks/recovery.py [--json] [--rounds 3] [--width 512] [--install] [--only refound stock-tuned]

Three ranks train a small model, and the last one gets SIGKILL; under torchrun a whole node is lost next and comes back
empty. Counted is the time to the first step that rank 0 completes in the job that goes on. They do not go on alike, so
this says what each one has lost:

- refound: three torchrun agents; all workers start again from the snapshot in memory, none of the work is lost
- warm: the same with `warm_spares=1`, which is what the aims (2 s, and 3 s for a node) are held against
- stock-tuned: the same under c10d with its time-outs turned down; the script starts again at step 0
- torchft: three replicas; the other two go on, the newcomer is healed by one of them ("whole again"). Each replica
  holds all of the state: there is no sharding to lose
- nvrx: in-process restart; the other two call the training function again with what the script kept, here nothing

torchft and nvrx only where `--install` has put them into environments of their own, in runs/rivals.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import _venvs
import restart
from _figures import Figure, figure, tell
from _peers import free_port

RANKS = 3
MAX_WAIT_S = 60.0
BUILT_IN = {"refound": "refound", "warm": "warm", "stock-tuned": "stock"}
"""Those under torchrun, as restart.py calls them."""
AIMS = {("warm", "new step"): 2, ("warm", "node lost to new step"): 3}
RIVALS = ("torchft", "nvrx")
TUNED = "is_host=0,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"


class Tuned(restart.Contender):
    """restart.py's job under torchrun's own rendezvous, with its time-outs turned down."""

    def _rendezvous(self, index: int) -> list[str]:
        options = super()._rendezvous(index)
        return [f"--rdzv-conf={TUNED}" if option.startswith("--rdzv-conf=") else option for option in options]


class Processes:
    """One process a rank, started by us: what torchft and NVRx in-process restart ask for."""

    def __init__(self, name: str, folder: Path, width: int) -> None:
        self._name, self._folder, self._width = name, folder, width
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._lighthouse: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def __enter__(self) -> "Processes":
        if self._name == "torchft":
            port = free_port()
            program = _venvs.python("torchft").with_name("torchft_lighthouse")
            command = [str(program), "--min_replicas=2", f"--bind=127.0.0.1:{port}"]
            command += ["--join_timeout_ms=1000", "--heartbeat_timeout_ms=2000"]
            self._lighthouse = self._run(command, "lighthouse")
            self._environment["TORCHFT_LIGHTHOUSE"] = f"http://127.0.0.1:{port}"
        self._environment["MASTER_PORT"] = str(free_port())
        for rank in range(RANKS):
            self.start(rank)
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self._ranks.values(), *([self._lighthouse] if self._lighthouse else [])):
            process.kill()
            process.wait()

    def start(self, rank: int) -> None:
        script = Path(__file__).with_name("_peers.py")
        command = [str(_venvs.python(self._name)), str(script), self._name, str(self._folder), str(self._width)]
        extra = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
        self._ranks[rank] = self._run(command, f"rank{rank}.log", extra)

    def kill(self, rank: int) -> float:
        now_s = time.time()
        self._ranks[rank].kill()
        self._ranks[rank].wait()
        return now_s

    def first_step(self, since_s: float, fits: Callable[[dict[str, Any]], bool]) -> float:
        """Seconds from `since_s` to the first step of rank 0 after it that fits."""
        deadline = time.monotonic() + MAX_WAIT_S
        while time.monotonic() < deadline:
            path = self._folder / "rank0"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            for line in lines:
                if line.endswith("\n") and (step := json.loads(line))["time_s"] > since_s and fits(step):
                    return step["time_s"] - since_s
            time.sleep(0.01)
        log = (self._folder / "rank0.log").read_text()[-2000:]
        raise RuntimeError(f"{self._name} did not go on within {MAX_WAIT_S:.0f} s:\n{log}")

    def _run(self, command: list[str], log: str, extra: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self._folder / log).open("ab") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**self._environment, **(extra or {})},
                start_new_session=True,
            )


def measure(name: str, width: int) -> dict[str, float]:
    """Seconds to the first new step after the loss; for torchft also until all three train again."""
    with tempfile.TemporaryDirectory(prefix="rc-") as path:
        folder = Path(path)
        if name in BUILT_IN:
            kind = Tuned if name == "stock-tuned" else restart.Contender
            seconds = restart.measure(BUILT_IN[name], width, kind)
            return {"new step": seconds["worker kill"], "node lost to new step": seconds["node loss"]}
        with Processes(name, folder, width) as job:
            job.first_step(0.0, lambda step: step["ranks"] == RANKS)
            struck_s = job.kill(RANKS - 1)
            seconds = {"new step": job.first_step(struck_s, lambda step: step["ranks"] == RANKS - 1)}
            if name == "torchft":
                again_s = time.time()
                job.start(RANKS - 1)
                seconds["whole again"] = (
                    job.first_step(again_s, lambda step: step["ranks"] == RANKS) + again_s - struck_s
                )
            return seconds


def figures(samples: dict[str, list[dict[str, float]]]) -> list[Figure]:
    rows: list[Figure] = []
    for name, found in samples.items():
        for what in found[0]:
            value = median(sample[what] for sample in found)
            aim = AIMS.get((name, what))
            bar = () if aim is None else (f"<= {aim}", value <= aim)
            rows.append(
                figure(f"{name}: {what}" if "lost" in what else f"{name}: lost rank to {what}", value, "s", *bar)
            )
    for own in ("refound", "warm"):
        for name in sorted(samples.keys() - {"refound", "warm"}) if own in samples else ():
            pairs = zip(samples[own], samples[name], strict=True)
            ratio = median(mine["new step"] / theirs["new step"] for mine, theirs in pairs)
            rows.append(figure(f"{own} / {name}", ratio, "x"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=512, help="of the model's four layers")
    parser.add_argument("--only", nargs="+", choices=(*BUILT_IN, *RIVALS), metavar="NAME")
    parser.add_argument("--install", action="store_true", help="also those that need an environment; makes it first")
    options = parser.parse_args(arguments)

    wanted = options.only or (*BUILT_IN, *RIVALS)
    if options.install:
        for name in set(wanted) & set(RIVALS):
            _venvs.install(name)
    chosen = [name for name in wanted if name in BUILT_IN or _venvs.installed(name)]
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for number in range(options.rounds):
        for name in [name for name in (chosen if number % 2 == 0 else reversed(chosen)) if name in samples]:
            try:
                samples[name].append(measure(name, options.width))
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                del samples[name]
                continue
            print(f"round {number + 1}: {name} {samples[name][-1]}", file=sys.stderr, flush=True)
    rows = figures(samples)
    tell(rows, as_json=options.json)


if __name__ == "__main__":
    main()
