# SPDX-License-Identifier: Apache-2.0
"""The first workers of an agent import torch while the agent comes up: a node that replaces a lost one is ready sooner.

What torchrun is about to start is in its own command line: how many workers, and with which Python. Their environment
is the agent's and a few names more. If the guess is wrong, `Spare.fits` says so and they start cold. They import what
every protected worker does, since nobody has told yet what these will need.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from .agent import NO_SHARED_STORE_ENV
from .preload import BASE
from .spares import Environment, Spare, unfit

_NCCL_ENV = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def first_spares() -> dict[str, Spare]:
    """Local rank → a process that imports what its worker will need; none where it cannot be known what that is."""
    started: dict[str, Spare] = {}
    options = _torchruns_options()
    if options is None:
        return started
    for environment in _environments(options):
        with contextlib.suppress(OSError):  # they start cold, and what fails says so then
            started[environment["LOCAL_RANK"]] = Spare(_python(), environment, BASE)
    return started


def _torchruns_options() -> Any:
    """What torchrun was told, if this process is torchrun and will start plain Python scripts."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if getattr(spec, "name", "") != "torch.distributed.run" and Path(sys.argv[0]).name != "torchrun":
        return None
    from torch.distributed.run import parse_args

    options = parse_args(sys.argv[1:])  # which it has done before
    command = [_python(), "-u", *(["-m"] if options.module else []), options.training_script, ""]
    plain = not (options.no_python or options.run_path or options.numa_binding or options.virtual_local_rank)
    return options if plain and not unfit(command) else None


def _python() -> str:
    return os.environ.get("PYTHON_EXEC", sys.executable)  # as torchrun has it


def _environments(options: Any) -> list[Environment]:
    from torch.distributed.run import determine_local_world_size

    more = {NO_SHARED_STORE_ENV: "1", "ROLE_NAME": options.role, _NCCL_ENV: os.environ.get(_NCCL_ENV, "1")}
    ranks = range(determine_local_world_size(options.nproc_per_node))
    return [{**os.environ, **more, "LOCAL_RANK": str(rank)} for rank in ranks]
