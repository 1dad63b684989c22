# SPDX-License-Identifier: Apache-2.0
"""FSDP2 and ZeRO on other numbers of ranks, straight from the memory of snapshot processes: 8 → 6 → 8 and smaller."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "jobs" / "shapes.py"
QUIET = {"PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def check(kind: str, worlds: str, folder: Path) -> None:
    """Every global value is at each restore, bit for bit, what it was when the life before ended."""
    command = [sys.executable, str(SCRIPT), kind, worlds, str(folder)]
    done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lives = json.loads(done.stdout.partition("FOUND")[2])
    assert [life["step"] for life in lives] == [0, 2, 4][: len(lives)]
    for before, after in itertools.pairwise(lives):
        assert after["restored"] == before["trained"]
        assert after["trained"] != after["restored"]


@pytest.mark.parametrize(
    "kind", ["zero3", *(pytest.param(kind, marks=pytest.mark.campaign) for kind in ("fsdp", "zero2"))]
)
def test_three_ranks_go_on_as_two(kind: str, tmp_path: Path) -> None:
    check(kind, "3,2", tmp_path)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["fsdp", "zero1", "zero2", "zero3"])
def test_eight_ranks_go_on_as_six_and_as_eight_again(kind: str, tmp_path: Path) -> None:
    check(kind, "8,6,8", tmp_path)
