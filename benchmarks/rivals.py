# SPDX-License-Identifier: Apache-2.0
"""What saving every step costs, beside others that save: the stall of a save and the slowdown of the step.

    python benchmarks/rivals.py [--json] [--rounds 3] [--mb 100] [--only refound dcp-thread] [--ranks 2]

The same job for all: DDP over two ranks of one node, torchrun --standalone, a model of `--mb` MB and Adam's state twice
that, saved after every step of the blocks that save; blocks with and without alternate within each run, and contenders
alternate within each round. Counted as stall is what the training thread waits for: the call that saves, and whatever
must have ended before the next step or the next save. Contenders:

- refound: into memory, erasure-coded over the nodes (of which there is one here, so without parity)
- dcp-thread, dcp-process: torch.distributed.checkpoint.async_save, to files, on this machine's fastest (/dev/shm)
- dcp: the same, waited for
- torch.save: rank 0 writes all, as most scripts do, to /dev/shm
- lm-resiliency: into memory, and into that of a peer, which is the other rank here
- torchsnapshot, dlrover, lm-resiliency only where `--install` has put them into environments of their own, in
  runs/rivals
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, Protocol

import _venvs
from _figures import figure, tell

BUILT_IN = ("refound", "dcp-thread", "dcp-process", "dcp", "torch.save")
LAYERS = 8
MB = 1_000_000


class Saver(Protocol):
    """One way to save the training state."""

    def before_step(self) -> None:
        """Right before the optimizer changes the state: what must have ended has to."""
        ...

    def save(self, step: int) -> None:
        """Save the state of a completed step; may go on in the background."""
        ...

    def finish(self) -> None:
        """Wait for what goes on in the background."""
        ...


class Refound:
    def __init__(self, model: Any, optimizer: Any, folder: Path) -> None:
        import refound

        self._job = refound.protect(model=model, optimizer=optimizer)

    def before_step(self) -> None:
        return None  # its own hook of the optimizer waits; `timed_step` counts that

    def save(self, step: int) -> None:
        self._job.end_step()

    def finish(self) -> None:
        self._job._wait()


class TorchSave:
    def __init__(self, model: Any, optimizer: Any, folder: Path) -> None:
        self._model, self._optimizer, self._folder = model, optimizer, folder

    def before_step(self) -> None:
        return None

    def save(self, step: int) -> None:
        import torch
        import torch.distributed as dist

        if dist.get_rank() == 0:
            path = self._folder / "checkpoint.pt"
            torch.save({"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}, path)
        dist.barrier()

    def finish(self) -> None:
        return None


class Dcp:
    """torch.distributed.checkpoint: waited for, or with its asynchronous kinds."""

    def __init__(self, model: Any, optimizer: Any, folder: Path, kind: str) -> None:
        import torch.distributed as dist

        self._model, self._optimizer, self._folder, self._kind = model, optimizer, folder, kind
        self._group = dist.new_group(backend="gloo")
        self._future: Any = None

    def before_step(self) -> None:
        return None  # async_save has copied the state when it returns

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self.finish()
        model, optimizer = get_state_dict(self._model, self._optimizer)
        state, target = {"model": model, "optimizer": optimizer}, self._folder / str(step % 2)
        if self._kind == "wait":
            dcp.save(state, checkpoint_id=target, process_group=self._group)
            return
        kind = AsyncCheckpointerType(self._kind)
        self._future = dcp.async_save(
            state, checkpoint_id=target, process_group=self._group, async_checkpointer_type=kind
        )

    def finish(self) -> None:
        future, self._future = self._future, None
        if future is not None:
            getattr(future, "upload_completion", future).result()


class TorchSnapshot:
    def __init__(self, model: Any, optimizer: Any, folder: Path) -> None:
        self._state, self._folder, self._pending = {"model": model, "optimizer": optimizer}, folder, None

    def before_step(self) -> None:
        return None

    def save(self, step: int) -> None:
        import torchsnapshot  # pyright: ignore[reportMissingImports]

        self.finish()
        self._pending = torchsnapshot.Snapshot.async_take(str(self._folder / str(step % 2)), self._state)

    def finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()


class DLRover:
    """Flash checkpoint: copied into shared memory of an agent. Into memory only, since storage needs its master."""

    def __init__(self, model: Any, optimizer: Any, folder: Path) -> None:
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer  # pyright: ignore[reportMissingImports]

        self._model, self._optimizer, self._folder = model, optimizer, folder
        self._checkpointer = DdpCheckpointer(str(folder))

    def before_step(self) -> None:
        return None

    def save(self, step: int) -> None:
        from dlrover.trainer.torch.flash_checkpoint.checkpointer import (
            StorageType,  # pyright: ignore[reportMissingImports]
        )

        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict(), "step": step}
        self._checkpointer.save_checkpoint(
            step, state, str(self._folder / f"{step}.pt"), storage_type=StorageType.MEMORY
        )

    def finish(self) -> None:
        return None


class LmResiliency:
    """Into memory and into a peer's: the in-memory manager itself, fed with the tensors as its own hooks feed it."""

    def __init__(self, model: Any, optimizer: Any, folder: Path) -> None:
        from lm_resiliency.checkpointing.config import InMemoryCkptConfig  # pyright: ignore[reportMissingImports]
        from lm_resiliency.experimental import InMemoryCheckpointManager  # pyright: ignore[reportMissingImports]

        config = InMemoryCkptConfig(
            interval=1, replication_jump=1, disk_flush_interval=0, disk_folder=str(folder / "lm"), run_id="bench"
        )
        self._model, self._optimizer, self._manager = model, optimizer, InMemoryCheckpointManager(config)

    def before_step(self) -> None:
        self._manager.maybe_wait()  # for its copy; the exchange with the peer goes on

    def save(self, step: int) -> None:
        states = self._optimizer.state.values()
        tensors = [
            *self._model.parameters(),
            *(v for s in states for v in s.values() if hasattr(v, "is_floating_point")),
        ]
        self._manager.save_tensors([tensor.detach() for tensor in tensors], step)

    def finish(self) -> None:
        self._manager.finalize_replication()


SAVERS: dict[str, Callable[[Any, Any, Path], Saver]] = {
    "refound": Refound,
    "dcp-thread": lambda model, optimizer, folder: Dcp(model, optimizer, folder, "thread"),
    "dcp-process": lambda model, optimizer, folder: Dcp(model, optimizer, folder, "process"),
    "dcp": lambda model, optimizer, folder: Dcp(model, optimizer, folder, "wait"),
    "torch.save": TorchSave,
    "torchsnapshot": TorchSnapshot,
    "dlrover": DLRover,
    "lm-resiliency": LmResiliency,
}


def worker(options: argparse.Namespace) -> None:
    """One rank of one contender's run."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    width = int((options.mb * MB / 4 / LAYERS) ** 0.5)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(LAYERS)])
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    folder = Path(options.folder)
    saver = SAVERS[options.contender](model, optimizer, folder)
    inputs = torch.randn(options.batch, width)

    def timed_step(number: int, saves: bool) -> tuple[float, float]:
        """Seconds of the step, and of what the training thread waited for because of saving."""
        started = time.perf_counter()
        model(inputs).square().mean().backward()
        before = time.perf_counter()
        saver.before_step()
        if isinstance(saver, Refound):
            saver.finish()
        waited = time.perf_counter() - before
        optimizer.step()
        optimizer.zero_grad()
        if saves:
            before = time.perf_counter()
            saver.save(number)
            waited += time.perf_counter() - before
        dist.barrier()
        return time.perf_counter() - started, waited

    number, blocks = 0, []
    for block in range(2 * options.blocks + 2):
        saves, steps = block % 2 == 1, []
        for _ in range(options.steps):
            number += 1
            steps.append(timed_step(number, saves))
        saver.finish()
        if block > 1:  # in the first two, memory is touched and processes are started
            blocks.append({"saves": saves, "step_s": [s for s, _ in steps[1:]], "stall_s": [w for _, w in steps[1:]]})
    if dist.get_rank() == 0:
        Path(options.worker).write_text(json.dumps(blocks))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    end_children()
    os._exit(0)  # gloo's and the contenders' threads may outlive the interpreter


def end_children() -> None:
    """What a contender has started, DLRover a process that saves, would hold our pipes open for ever."""
    for told in Path("/proc/self/task").glob("*/children"):
        for pid in told.read_text().split():
            os.kill(int(pid), signal.SIGKILL)


def run(contender: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One run of one contender; the blocks that rank 0 wrote down."""
    python = sys.executable if contender in BUILT_IN else str(_venvs.python(contender))
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="rv-", dir=memory) as folder:
        result = Path(folder) / "result.json"
        command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        command += ["--logs-specs=refound"] if contender == "refound" else []
        command += [__file__, f"--worker={result}", f"--folder={folder}", f"--contender={contender}"]
        command += [f"--{name}={getattr(options, name)}" for name in ("mb", "batch", "blocks", "steps")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not result.exists():
            raise RuntimeError(f"{contender} does not run here: {done.stderr.strip()[-1500:]}")
        return json.loads(result.read_text())


def figures(name: str, runs: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Medians over all blocks of all runs."""
    stalls = [stall for blocks in runs for block in blocks if block["saves"] for stall in block["stall_s"]]
    ratios = []
    for blocks in runs:
        plain = mean(s for block in blocks if not block["saves"] for s in block["step_s"])
        ratios += [mean(block["step_s"]) / plain for block in blocks if block["saves"]]
    return {"stall_ms": median(stalls) * 1000, "slowdown": median(ratios)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender")
    parser.add_argument("--blocks", type=int, default=2, help="blocks that save, in a run")
    parser.add_argument("--steps", type=int, default=5, help="steps of a block")
    parser.add_argument("--mb", type=int, default=100, help="MB of parameters")
    parser.add_argument("--batch", type=int, default=256, help="rows of a batch")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SAVERS, metavar="NAME", help=f"of {', '.join(SAVERS)}")
    parser.add_argument("--install", action="store_true", help="also those that need an environment; makes it first")
    for hidden in ("--worker", "--folder", "--contender"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options)
        return

    chosen = options.only or [name for name in SAVERS if name in BUILT_IN or options.install or _venvs.installed(name)]
    if options.install:
        for name in set(chosen) - set(BUILT_IN):
            _venvs.install(name)
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in chosen}
    for number in range(options.rounds):
        for name in list(runs):
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                runs[name].append(run(name, options))
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                del runs[name]
    measured = {name: figures(name, found) for name, found in runs.items()}
    rows = [
        figure(f"{name} {what}", found[key], unit)
        for name, found in measured.items()
        for what, key, unit in (("stall of a save", "stall_ms", "ms"), ("step with / without saving", "slowdown", "x"))
    ]
    for name in measured if "refound" in measured else ():
        if name != "refound":
            ratio = measured["refound"]["stall_ms"] / max(measured[name]["stall_ms"], 1e-9)
            aim = ("<= 0.1", ratio <= 0.1) if name in ("dcp-thread", "dcp-process") else ()
            rows.append(figure(f"stall refound / {name}", ratio, "x", *aim))
    tell(rows, as_json=options.json)


if __name__ == "__main__":
    main()
