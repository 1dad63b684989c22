# SPDX-License-Identifier: Apache-2.0
"""Runs one of the examples as a job of the tests: as it stands, observed after every step.

    frameworks.py --out DIR --kind EXAMPLE --steps N --gate FILE [--every N]

Each rank appends to `DIR/rank<r>.jsonl` one line for every start, one for the loss that the example reports of a step,
and one for a digest of everything protected after the step, which then waits until the number in FILE allows the next.
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from refound.ckpt import dcp, protection

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "examples")]

from train import append, digest, gatekeeper  # noqa: E402


class Observed(protection.Protection):
    """A protection that writes down what it protects, and waits where the test wants it to."""

    options: argparse.Namespace
    log: Path

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        source, generation = (self.restored.source if self.restored else "start"), os.environ["REFOUND_GENERATION"]
        append(self.log, {"start": self.step, "source": source, "pid": os.getpid(), "generation": int(generation)})

    def end_step(self) -> None:
        super().end_step()
        append(self.log, {"step": self.step, "digest": self.digest()})
        if self.step < self.options.steps:
            gatekeeper(self.options.gate)(self.step + 1)

    def digest(self) -> str:
        """sha256 of all protected bytes: parameters, optimizer, random generators and everything else."""
        state = self._snapshotter.collector.collect()
        found = hashlib.sha256(json.dumps(state.objects).encode())
        for leaf in state.leaves:
            found.update(leaf.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--gate", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("rest", nargs="*", help="more arguments of the example")
    return parser.parse_args(arguments)


class ObservedMemory(dcp.DcpMemory):
    """A place for DCP checkpoints whose starts are written down."""

    def __init__(self) -> None:
        super().__init__()
        generation = int(os.environ["REFOUND_GENERATION"])
        append(Observed.log, {"start": self.step, "source": "?", "pid": os.getpid(), "generation": generation})


def observe_training(example: Any) -> Callable[[int, float], None]:
    """What takes the place of `Observed` in an example that saves by itself and calls its state a Training."""
    made: list[Any] = []

    class Training(example.Training):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    def report(step: int, loss: float) -> None:
        append(Observed.log, {"loss_of": step, "loss": float(loss).hex()})
        append(Observed.log, {"step": step, "digest": digest(made[0].state_dict())})
        if step < Observed.options.steps:
            gatekeeper(Observed.options.gate)(step + 1)

    example.Training = Training
    return report


def main() -> None:
    options = parse(sys.argv[1:])
    Observed.options, Observed.log = options, options.out / f"rank{os.environ['RANK']}.jsonl"
    protection.Protection, dcp.DcpMemory = Observed, ObservedMemory
    example = importlib.import_module(options.kind)
    report: Callable[[int, float], None] = lambda step, loss: append(  # noqa: E731
        Observed.log, {"loss_of": step, "loss": float(loss).hex()}
    )
    if hasattr(example, "Training"):
        report = observe_training(example)
    example.main([f"--steps={options.steps}", f"--every={options.every}", *options.rest], report)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the process group, and crash in an interpreter that is shutting down


if __name__ == "__main__":
    main()
