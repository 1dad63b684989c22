# SPDX-License-Identifier: Apache-2.0
"""Several ranks of torch.distributed without torchrun: forked, over gloo and a file, in a tenth of a second."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_ranks(folder: Path, world: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(rank)` in `world` processes of one process group; what each of them returns, by rank."""
    folder.mkdir(parents=True)
    children = [_fork(folder, world, rank, work) for rank in range(world)]
    results: list[Any] = [None] * world
    for rank, (_, said) in enumerate(children):
        with contextlib.closing(said), contextlib.suppress(EOFError):  # it died without a word
            results[rank] = said.recv()
    statuses = [os.waitpid(child, 0)[1] for child, _ in children]
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not any(statuses), f"{statuses}\n" + "\n".join(errors)
    return results


def _fork(folder: Path, world: int, rank: int, work: Callable[[int], Any]) -> tuple[int, Connection]:
    here, there = Pipe(duplex=False)
    if child := os.fork():
        there.close()
        return child, here
    code = 1
    try:
        store = dist.FileStore(os.fspath(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        there.send(work(rank))
        dist.barrier()  # nobody goes while another still needs it
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}\n{traceback.format_exc()}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may crash an interpreter that takes its time to go
