# SPDX-License-Identifier: Apache-2.0
"""The demo as a user runs it: the tiny model, a killed worker, a lost node, the same bits."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from refound.demo.compare import compare_runs
from refound.demo.model import WEIGHTS, model_directory
from refound.demo.records import read_steps
from refound.export.engines import ENGINES
from refound.export.environments import engine_python
from safetensors.torch import load_file

DEMO = [sys.executable, "-m", "refound", "demo", "--tiny"]
STEPS = 30


@pytest.fixture(scope="module")
def short_tmp() -> Iterator[str]:
    """A directory for temporary files that only this module's processes have in their environment."""
    with tempfile.TemporaryDirectory(prefix="rd-") as directory:
        yield directory


def environment(short_tmp: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "REFOUND_DIR"}
    return inherited | {"TMPDIR": short_tmp}


def still_running(short_tmp: str) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and f"TMPDIR={short_tmp}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # ended while we looked
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, short_tmp: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("demo")
    command = [*DEMO, "--json", "--out", str(out)]
    return out, subprocess.run(command, env=environment(short_tmp), capture_output=True, text=True, check=False)


def test_it_ends_with_the_same_bits(demo: tuple[Path, subprocess.CompletedProcess[str]]):
    out, done = demo
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bit_identical"] is True and told["differences"] == []
    assert told["compared"]["losses"] == STEPS and told["compared"]["tensors"] > 500
    worker, node = told["faults"]
    assert (worker["fault"], worker["recovered_from"]) == ("rank=1 step=10 kill", "memory")
    assert (node["fault"], node["recovered_from"]) == ("node=2 step=20 kill", "parity")
    assert told["runs"]["reference"]["left_behind"] == told["runs"]["faulted"]["left_behind"] == 0
    assert "bit-identical: yes" in (out / "report.html").read_text()


def test_what_it_trained_is_served(demo: tuple[Path, subprocess.CompletedProcess[str]]):
    """Out of the memory of the job that went through the faults; the engines that are here say the same."""
    out, done = demo
    served = json.loads(done.stdout)["served"]
    assert served["made_of"].startswith("memory of job demo-faulted-") and "step 30" in served["made_of"]
    assert [engine["engine"] for engine in served["engines"]] == ["transformers", *installed()]
    assert [engine["equal_tokens"] for engine in served["engines"]] == [24] * (1 + len(installed()))
    assert served["engines"][0]["text"]
    trained, before = load_file(out / "model/model.safetensors"), load_file(model_directory(tiny=True) / WEIGHTS)
    assert trained.keys() == before.keys()
    assert not any(torch.equal(trained[name], before[name]) for name in trained)
    assert (out / "export" / "huggingface" / "config.json").is_file()


def installed() -> list[str]:
    return [name for name in ENGINES if name != "transformers" and engine_python(name)]


def test_it_shows_what_happens_on_stderr(demo: tuple[Path, subprocess.CompletedProcess[str]]):
    _, done = demo
    for words in ("step  1/30", "FAULT rank=1 step=10 kill", "rank 2 from parity", "nodes 3/3"):
        assert words in done.stderr


def test_it_leaves_nothing_behind(demo: tuple[Path, subprocess.CompletedProcess[str]], short_tmp: str):
    assert still_running(short_tmp) == []
    assert list(Path(short_tmp).glob("rf-*")) == []


@pytest.mark.campaign
def test_protection_changes_no_bit(demo: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, short_tmp: str):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command += ["-m", "refound.demo.train", "--tiny", "--unprotected", "--device=cpu", f"--steps={STEPS}"]
    subprocess.run([*command, f"--out={tmp_path}"], env=environment(short_tmp), capture_output=True, check=True)
    found = compare_runs(demo[0] / "reference", tmp_path, steps=STEPS)
    assert found.identical, found.differences


def test_ctrl_c_ends_all_that_it_started(tmp_path: Path, short_tmp: str):
    command = [*DEMO, "--out", str(tmp_path)]
    with subprocess.Popen(command, env=environment(short_tmp), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            # Not every step has a line: quick ones are passed over.
            if (said := re.search(r"step +(\d+)/30", line)) and int(said[1]) >= 2:
                break
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 1
    assert len(read_steps(tmp_path / "reference")) >= 2
    assert still_running(short_tmp) == []
    assert list(Path(short_tmp).glob("rf-*")) == []
