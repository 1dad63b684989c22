# SPDX-License-Identifier: Apache-2.0
"""Jobs of one rank with several lives each, beside a real snapshot process: `incarnations.py NAME`.

Each life is a fork of this process, which plays the agent, so that torch is imported once. It ends with status 1 and a
traceback at the first life in which an assertion does not hold. (A life must be a process of its own: the snapshot
process ends what an earlier one has left.)
"""

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import refound
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from refound.ckpt.agent import worker_environment
from refound.ckpt.attach import attach
from refound.ckpt.conf import PluginConfig
from refound.ckpt.dcp import DcpMemory
from refound.ckpt.errors import ConfigError, LayoutMismatchError
from refound.ckpt.protection import Protection

Life = Callable[[Path], None]
"""Gets a folder that all lives share."""


@contextmanager
def refused(kind: type[BaseException], words: str):
    try:
        yield
    except kind as error:
        assert re.search(words, str(error)), error
    else:
        raise AssertionError(f"this was not refused: {words}")


# --- a teacher that trains without gradients ---------------------------------------------------------------------


class Distilled(torch.nn.Module):
    """A student, a teacher that follows it as a moving average, and a base that nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = torch.nn.Linear(8, 8).requires_grad_(False)
        self.student = torch.nn.Linear(8, 8)
        self.teacher = torch.nn.Linear(8, 8).requires_grad_(False)


def protected() -> tuple[Distilled, torch.optim.Optimizer, Protection]:
    model = Distilled()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=0.1)
    return model, optimizer, refound.protect(model=model, optimizer=optimizer, save_frozen=False)


def teacher_changes(folder: Path) -> None:
    """The last snapshot is the one that notices."""
    teacher_trains(folder, again=False)


def teacher_trains(folder: Path, *, again: bool = True) -> None:
    model, optimizer, job = protected()

    def step(*, follow: bool) -> str:
        model.student(model.base(torch.randn(4, 8))).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if follow:  # through .data, which no version counter sees
            for mine, its in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                mine.data.mul_(0.9).add_(its.data, alpha=0.1)
        with redirect_stderr(StringIO()) as said:
            job.end_step()
            job._wait()
        return said.getvalue()

    assert step(follow=False) == ""
    said = step(follow=True)
    assert "model/teacher.weight changes although it requires no gradients (2 such)" in said, said
    assert job._last_snapshot == 2
    if again:
        assert step(follow=True) == ""
    assert job.close()
    torch.save(model.state_dict() | {"step": job.step}, folder / "model.pt")


def teacher_is_back(folder: Path) -> None:
    model, _, job = protected()
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert job.step == saved.pop("step")
    for name, tensor in saved.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    job.end_step()
    assert job.close()


def base_is_another(folder: Path) -> None:
    with refused(LayoutMismatchError, r"model/base\.weight does not train.*must make it the same in every start"):
        model = Distilled()
        model.base.weight.data.mul_(2)
        optimizer = torch.optim.AdamW(model.student.parameters(), lr=0.1)
        refound.protect(model=model, optimizer=optimizer, save_frozen=False)


# --- DCP ---------------------------------------------------------------------------------------------------------


def state(seed: float) -> dict[str, Any]:
    return {
        "weights": {"a": torch.full((3, 4), seed), "half": torch.full((5,), seed, dtype=torch.bfloat16)},
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(seed),
        "text": f"seed {seed}",
        "nested": [1, {"deep": (2, seed)}],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def memory() -> DcpMemory:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return refound.DcpMemory()


def dcp_saves(_: Path) -> None:
    first = memory()
    assert not first.saved
    with refused(dcp.CheckpointException, r"ask memory\.saved before"):
        dcp.load(state(0.0), storage_reader=first.reader)
    with refused(ConfigError, "use_collectives"):
        first.writer.set_up_storage_writer(True, use_collectives=False)
    with refused(ConfigError, "belongs to one process"):
        first.__getstate__()
    with refused(ConfigError, "2 of 1 ranks take part"):
        first.writer.prepare_global_plan([dcp.SavePlan([]), dcp.SavePlan([])])
    dcp.save(state(1.0), storage_writer=first.writer, checkpoint_id="one")
    dcp.async_save(state(2.0), storage_writer=first.writer).result()  # type: ignore[union-attr]
    first.close()


def dcp_loads(_: Path) -> None:
    second = memory()
    assert (second.saved, second.step) == (True, 2)
    found = state(0.0)
    dcp.load(found, storage_reader=second.reader)
    assert same(found, state(2.0)), found
    dcp.save(state(3.0), storage_writer=second.writer)
    with refused(dcp.CheckpointException, "has saved another checkpoint since it started"):
        dcp.load(found, storage_reader=second.reader)
    second.close()


def protect_meets_dcp(_: Path) -> None:
    with refused(LayoutMismatchError, r"the snapshot holds '\$dcp', which is not protected now"):
        protected()


def dcp_meets_protect(_: Path) -> None:
    third = memory()
    with refused(LayoutMismatchError, r"taken by protect\(\), not by DCP"):
        third.reader.read_metadata()
    third.close()


def jobs(name: str) -> list[list[Life]]:
    """Each job's lives."""
    if name == "teacher":
        return [
            [teacher_changes, teacher_is_back],
            [teacher_trains, teacher_is_back, base_is_another, dcp_meets_protect],
        ]
    if name == "dcp":
        return [[dcp_saves, dcp_loads, protect_meets_dcp]]
    import trainer_lives  # which imports transformers

    return trainer_lives.jobs()


def live(life: Life, folder: Path) -> None:
    """In the child: run, and end without the exit handlers of the parent."""
    status = 1
    try:
        life(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def run(number: int, lives: list[Life], folder: Path) -> bool:
    """One job, as its agent. Whether all its lives went well."""
    attachment = attach(f"incarnations-{os.getpid()}-{number}", "127.0.0.1", PluginConfig(node="n"))
    try:
        for life in lives:
            generation = attachment.open([attachment.inventory()], "")
            ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
            os.environ |= worker_environment(attachment, generation) | ranks
            child = os.fork()
            if not child:
                live(life, folder)
            if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                print(f"{life.__name__} ended with status {status}", file=sys.stderr)
                return False
        return True
    finally:
        attachment.leave(success=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        well = all(run(number, lives, Path(folder)) for number, lives in enumerate(jobs(sys.argv[1])))
    sys.exit(not well)


if __name__ == "__main__":
    main()
