# SPDX-License-Identifier: Apache-2.0
"""Two ranks train what one does: each its share of every batch, gradients averaged, own text said by turns."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from refound.adapters.heads.run import run_heads
from refound.adapters.heads.settings import HeadsConfig, MedusaSettings
from refound.export.medusa import read_medusa

from .small import foreseeable

SETTINGS = MedusaSettings(
    tokens=480, length=24, batch=4, lr=1e-2, prompt=8, held_out=8, heads=2, save_every=100, measured=0, nodes=2
)


def forked(ranks: int, task: Callable[[], None]) -> list[int]:
    """Exit codes of `task` in as many processes, with torchrun's environment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                task()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)  # gloo's threads may abort an interpreter that ends by itself
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    base = foreseeable(tmp_path / "model", 2)

    def train(name: str, said: list[str]) -> None:
        config = HeadsConfig(model=base, kind="medusa", out=tmp_path / name, settings=SETTINGS)
        run_heads(config, said.append)

    train("one", [])
    assert forked(2, lambda: train("two", [])) == [0, 0]
    one, two = (read_medusa(tmp_path / name / "heads") for name in ("one", "two"))
    for a, b in zip(one.heads, two.heads, strict=True):
        assert torch.allclose(a.weights[0], b.weights[0], atol=1e-3) and a.weights[0].abs().max() > 0.01
