# SPDX-License-Identifier: Apache-2.0
"""The search on several ranks under torchrun: the same library as alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .small import teacher
from .test_search import command, library_bytes


@pytest.mark.campaign
def test_two_ranks_make_the_library_of_one(tmp_path: Path) -> None:
    model = teacher(tmp_path / "model")
    alone = subprocess.run(command(model, tmp_path / "one", tmp_path), capture_output=True, text=True, check=True)
    typed = command(model, tmp_path / "two", tmp_path)[1:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *typed]
    together = subprocess.run(
        launch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert together.returncode == 0, together.stderr[-3000:]
    assert library_bytes(tmp_path / "two") == library_bytes(tmp_path / "one")
    told = [json.loads(text) for text in (alone.stdout, together.stdout)]
    assert told[0]["children"][0]["layers"] == told[1]["children"][0]["layers"]
