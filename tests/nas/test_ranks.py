# SPDX-License-Identifier: Apache-2.0
"""Several ranks under torchrun: the same library as alone, and a distillation that survives a killed rank."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from refound.export.architecture import Attention

from ..export.models import decoder, with_layer, write_model
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


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started for ranks."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                words = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended meanwhile
            if parent == agent and b"distill" in words:
                found.append(int(folder.name))
    return found


@pytest.mark.campaign
def test_a_distillation_on_two_ranks_survives_a_killed_one(tmp_path: Path) -> None:
    """With refound's torchrun backend: the same bits as undisturbed, from snapshots in memory."""
    base = decoder(layers=3)
    own = write_model(tmp_path / "teacher", base)
    child = write_model(tmp_path / "child", with_layer(base, 1, attention=Attention(kind="none")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--logs-specs=refound"]
    launch += ["--nproc-per-node=2", "--max-restarts=3", "-m", "refound", "distill", str(child), "--teacher", str(own)]
    settings = [f"--set={setting}" for setting in ("tokens=1280", "length=16", "batch=4", "lr=1e-3")]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*launch, "--out", str(tmp_path / "whole"), *settings]
    done = subprocess.run(whole, capture_output=True, text=True, env=surroundings, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    process = subprocess.Popen(
        [*launch, "--out", str(tmp_path / "killed"), *settings], stderr=subprocess.PIPE, text=True, env=surroundings
    )
    assert process.stderr
    said, killed = [], False
    for line in process.stderr:
        said.append(line)
        if "step 8 of 20" in line and not killed:
            os.kill(workers(process.pid)[0], signal.SIGKILL)
            killed = True
    process.stderr.close()
    assert process.wait() == 0 and killed, "".join(said[-40:])
    assert any("going on from step" in line for line in said)
    one, two = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == two.read_bytes()
