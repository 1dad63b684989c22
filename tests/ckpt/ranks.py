# SPDX-License-Identifier: Apache-2.0
"""Several ranks of torch.distributed without torchrun: forked, over gloo and a file, in a tenth of a second."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_ranks(folder: Path, world: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(rank)` in `world` processes of one process group; what each of them returns, by rank."""
    folder.mkdir(parents=True)
    children = [_fork(folder, world, rank, work) for rank in range(world)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    said = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not any(statuses), f"{statuses}\n" + "\n".join(said)
    return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]  # noqa: S301


def _fork(folder: Path, world: int, rank: int, work: Callable[[int], Any]) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        store = dist.FileStore(os.fspath(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        (folder / f"{rank}.result").write_bytes(pickle.dumps(work(rank)))
        dist.barrier()  # nobody goes while another still needs it
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may crash an interpreter that takes its time to go
