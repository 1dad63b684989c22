# SPDX-License-Identifier: Apache-2.0
"""Weights straight from training: out of every kind of checkpoint, and out of a live job, bit for bit."""

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from refound.cli import main
from refound.export.dcp_checkpoint import read_dcp
from refound.export.directory import open_directory
from refound.export.errors import ExportUsageError, ModelDamageError
from refound.export.pickled import read_pickle
from refound.export.trained import match_names
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ..ckpt.alone import alone
from ..ckpt.shards import shard_of, write_checkpoint
from .models import decoder, write_model

_SCALARS = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text()


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner)
    )


JOBS = Path(__file__).parent / "jobs"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainings begin with."""
    return write_model(tmp_path_factory.mktemp("models") / "base", decoder(layers=2))


def refound(*words: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words)])


def export(source: object, like: Path, out: Path) -> dict[str, torch.Tensor]:
    """The weights after a way through the command."""
    done = refound(source, "--like", like, "--to", "transformers", "--out", out, "--no-verify")
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    assert open_directory(out / "huggingface").decoder == open_directory(like).decoder
    return load_file(out / "huggingface" / "model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def trained(base: Path) -> Any:
    """The base model, a little further."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def on_two_ranks(script: str, base: Path, folder: Path) -> None:
    """A job of `jobs/` that begins with `base` and leaves what it made in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(JOBS / script)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(base), str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- refound's own ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_refound(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    optimizer = torch.optim.AdamW(model.parameters())
    write_checkpoint(tmp_path / "job", [shard_of({"net": model, "optimizer": optimizer}, 0)])
    found = export(tmp_path / "job", base, tmp_path / "out")
    assert same(found, dict(model.state_dict()))
    record = json.loads((tmp_path / "out" / "huggingface" / "refound.json").read_text())
    assert record["source"]["path"] == f"checkpoint {tmp_path / 'job'}, step 9, 'net'"
    assert f"Made of checkpoint {tmp_path / 'job'}, step 9" in (tmp_path / "out/huggingface/README.md").read_text()
    again = refound(tmp_path / "job", "--like", base, "--to", "transformers", "--out", tmp_path / "out", "--no-verify")
    assert again.exit_code == 0 and "already done" in again.output


def test_a_live_job_from_memory_while_it_trains(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    with alone() as job:
        job.snapshot(4, shard_of({"model": model, "ema": AutoModelForCausalLM.from_pretrained(base)}, 0))
        assert same(export(job.job, base, tmp_path / "out"), dict(model.state_dict()))
        for step in range(5, 8):  # what was kept for the export has been let go
            job.snapshot(step, shard_of({"model": model, "ema": model}, 0))


def test_a_tied_model_that_was_compiled_and_wrapped(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", decoder(layers=1, tied=True))
    model = trained(base)
    tensors = dict(model.state_dict())
    assert "lm_head.weight" in tensors
    wrapped = torch.nn.ModuleDict({"_orig_mod": torch.nn.ModuleDict({"network": model})})  # as torch.compile names it
    write_checkpoint(tmp_path / "job", [shard_of({"net": wrapped}, 0)])
    found = export(tmp_path / "job", base, tmp_path / "out")
    assert same(found, {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"})
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    write_checkpoint(tmp_path / "untied", [shard_of({"net": model}, 0)])
    done = refound(tmp_path / "untied", "--like", base, "--to", "transformers", "--out", tmp_path / "out2")
    assert done.exit_code == 2 and "an output matrix of its own" in done.output
    assert not (tmp_path / "out2").exists()


# --- DCP, which is what FSDP2 saves ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dcp(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint by two ranks of FSDP2, with optimizer state and numbers beside, and the weights in it."""
    folder = tmp_path_factory.mktemp("dcp")
    on_two_ranks("fsdp2_checkpoint.py", base, folder)
    return folder / "step-3", load_file(folder / "whole.safetensors")


def test_a_dcp_checkpoint_of_fsdp2(base: Path, dcp: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, expected = dcp
    assert same(export(path, base, tmp_path / "out"), expected)
    shutil.copytree(path, tmp_path / "mine" / "step-3")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(base / name, tmp_path / "mine" / name)
    done = refound(tmp_path / "mine" / "step-3", "--to", "transformers", "--dry-run", "--json")  # beside it: no --like
    assert done.exit_code == 0, done.output
    (part,) = json.loads(done.stdout)["parts"]
    sizes = {file["name"]: file["bytes"] for file in part["files"]}
    assert sizes["model.safetensors"] == sum(tensor.nbytes for tensor in expected.values())
    assert [entry.name for entry in (tmp_path / "mine").iterdir() if entry.is_dir()] == ["step-3"]


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch RUN",)


def test_an_index_that_would_run_code_is_not_looked_up(
    base: Path, dcp: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dcp[0], tmp_path / "bad")
    (tmp_path / "bad" / ".metadata").write_bytes(pickle.dumps(_Payload()))
    done = refound("bad", "--like", base, "--to", "transformers")
    assert done.exit_code == 3 and "posix.system where Metadata belongs, and was not looked up" in done.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad"]


def test_data_cut_short_is_damage(base: Path, dcp: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(dcp[0], tmp_path / "bad")
    for file in (tmp_path / "bad").glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 10)
    done = refound(tmp_path / "bad", "--like", base, "--to", "transformers", "--out", tmp_path / "out")
    assert done.exit_code == 3 and "cannot be read" in done.output, done.exception
    assert not (tmp_path / "out").exists()
    (tmp_path / "bad" / ".metadata").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelDamageError):
        read_dcp(tmp_path / "bad")


@given(st.binary(max_size=200) | st.recursive(_SCALARS, _nested, max_leaves=20).map(pickle.dumps))
def test_whatever_a_pickle_says_it_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        read_pickle(io.BytesIO(data))


@given(st.recursive(_SCALARS, _nested, max_leaves=20), st.sampled_from([2, 3, 4, 5]))
def test_plain_data_comes_out_of_a_pickle_as_it_went_in(value: Any, protocol: int) -> None:
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol=protocol))) == value


# --- DeepSpeed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    on_two_ranks("zero_checkpoint.py", base, folder)
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_checkpoint(base: Path, zero: Path, stage: int, tmp_path: Path) -> None:
    expected = load_file(zero / f"stage{stage}.safetensors")
    before = load_file(base / "model.safetensors")
    assert not torch.equal(expected["model.norm.weight"], before["model.norm.weight"])
    assert same(export(zero / f"stage{stage}", base, tmp_path / "out"), expected)


def test_a_snapshot_of_a_deepspeed_engine(base: Path, zero: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "job", [np.load(zero / f"stage2-{rank}.npy") for rank in range(2)])
    assert same(export(tmp_path / "job", base, tmp_path / "out"), load_file(zero / "stage2.safetensors"))
    write_checkpoint(tmp_path / "three", [np.load(zero / f"stage3-{rank}.npy") for rank in range(2)])
    done = refound(tmp_path / "three", "--like", base, "--to", "transformers", "--out", tmp_path / "out3")
    assert done.exit_code == 2 and "model.embed_tokens.weight is missing" in done.output  # it was frozen


def test_a_deepspeed_checkpoint_that_lacks_a_rank_or_brings_code(base: Path, zero: Path, tmp_path: Path) -> None:
    shutil.copytree(zero / "stage2", tmp_path / "bad")
    (folder,) = (entry for entry in (tmp_path / "bad").iterdir() if entry.is_dir())
    first, second = sorted(folder.glob("*_optim_states.pt"))
    second.unlink()
    done = refound(tmp_path / "bad", "--like", base, "--to", "transformers", "--out", tmp_path / "out")
    assert done.exit_code == 3 and "1 ranks of 2" in done.output
    torch.save({"optimizer_state_dict": _Payload()}, first)
    done = refound(tmp_path / "bad", "--like", base, "--to", "transformers", "--out", tmp_path / "out")
    assert done.exit_code == 1 and "none of DeepSpeed's" in done.output
    assert not (tmp_path / "RUN").exists() and not Path("RUN").exists()


# --- what is wrong ---------------------------------------------------------------------------------------------


def test_wrong_sources_are_told_in_a_line(base: Path, dcp: tuple[Path, Any], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", decoder(layers=3))
    for words, code, told in (
        ((dcp[0],), 2, "say --like MODEL"),
        ((dcp[0], "--like", tmp_path), 1, "has no config.json"),
        ((dcp[0], "--like", other), 2, "model.layers.2.input_layernorm.weight is missing"),
        (("no-such-job", "--like", base), 1, "is not there"),
        ((tmp_path / "nowhere", "--like", base), 1, "is not there"),
    ):
        done = refound(*words, "--to", "transformers")
        assert done.exit_code == code and told in done.output, done.output
        assert "Traceback" not in done.output


def test_more_layers_than_the_configuration_has_are_refused(dcp: tuple[Path, Any]) -> None:
    with pytest.raises(ExportUsageError, match=r"model\.layers\.1\.\S+ has no place"):
        match_names(read_dcp(dcp[0]), decoder(layers=1))
