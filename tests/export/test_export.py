# SPDX-License-Identifier: Apache-2.0
"""The command as it is typed: what it writes, refuses and proves, and what is left when it is killed."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from refound.demo.model import model_directory
from refound.export import atomic, install, proof, run
from refound.export.directory import open_directory
from refound.export.engines import ENGINES
from refound.export.errors import ModelDirectoryError, OutputExistsError, OutputSpaceError, ProofError
from refound.export.plan import ExportConfig, make_plan
from safetensors.torch import load_file

from .models import decoder, heterogeneous, write_model


def refound(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "refound", "export", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", decoder(layers=2))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.campaign  # a real model through both engines takes over a minute
def test_smollm2_in_transformers_and_llama_cpp(tmp_path: Path) -> None:
    """A real model: 64 greedy tokens for each of 8 prompts, equal in both engines, and written down."""
    install.install("llama.cpp")
    source = model_directory(tiny=False)
    done = refound(source, "--to", "transformers,llama.cpp", "--out", tmp_path / "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [part["proof"][0]["equal_tokens"] for part in told["parts"]] == [512, 512]
    assert told["parts"][0]["proof"][0]["logit_difference"] < 1e-3
    assert told["parts"][1]["proof"][0]["logprob_difference"] < 1e-2
    record = json.loads((tmp_path / "out" / "gguf" / "refound.json").read_text())
    assert record["proof"] == told["parts"][1]["proof"]
    assert record["files"]["model-f32.gguf"]["bytes"] == (tmp_path / "out/gguf/model-f32.gguf").stat().st_size
    assert "512 of 512" in (tmp_path / "out" / "huggingface" / "README.md").read_text()


def test_quantized_gguf_is_within_what_rounding_costs(tmp_path: Path, model: Path) -> None:
    install.install("llama.cpp")
    done = refound(model.name, "--to", "llama.cpp", "--quantize", "q8_0", "--out", "out", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (part,) = json.loads(done.stdout)["parts"]
    assert part["path"].endswith("model-q8_0.gguf")
    assert part["bytes"] < 0.4 * (model / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("weights", "error"), [("q6_k", 0.02), ("q5_k", 0.04), ("q4_k", 0.08)])
def test_k_quants_are_made_by_the_engine(tmp_path: Path, weights: str, error: float) -> None:
    """Rows of 256 as asked, shorter ones as llama.cpp falls back; what is in the file is near what went in."""
    install.install("llama.cpp")
    model = write_model(tmp_path / "model", decoder(layers=2, hidden_size=256, width=512))
    proven = None if weights == "q4_k" else False
    config = ExportConfig(model=model, engines=("llama.cpp",), out=tmp_path / "out", quantize=weights, verify=proven)
    (done,) = run.export_model(config, lambda line: None)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(done.part.model_path).tensors}
    fallback = {"q6_k": "Q8_0", "q5_k": "Q5_1", "q4_k": "Q5_0"}[weights]
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == weights.upper()
    assert tensors["blk.0.attn_output.weight"].tensor_type.name == fallback  # its rows are 128 long
    assert tensors["output.weight"].tensor_type.name == "Q6_K"
    before = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    found = tensors["blk.0.ffn_up.weight"]
    after = torch.from_numpy(gguf.dequantize(found.data, found.tensor_type).copy())
    assert (after - before).norm() / before.norm() < error


def test_k_quants_need_the_engine(tmp_path: Path, model: Path, no_engines: str) -> None:
    done = refound(model, "--to", "llama.cpp", "--quantize", "q4_k", cwd=tmp_path, REFOUND_ENGINES=no_engines)
    assert done.returncode == 1 and "llama.cpp's own quantizer" in done.stderr
    assert names(tmp_path) == {"model"}


def test_weights_come_out_as_they_went_in(tmp_path: Path, model: Path) -> None:
    done = refound(model, "--to", "transformers", "--no-verify", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "model-export" / "huggingface"
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert open_directory(out).decoder == open_directory(model).decoder
    assert "transformers: not proven" in done.stdout


def test_shards_have_an_index(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refound.export.plan.SHARD_BYTES", 200_000)
    config = ExportConfig(model=model, engines=("transformers",), out=tmp_path / "out", verify=False)
    (done,) = run.export_model(config, lambda line: None)
    again = open_directory(tmp_path / "out" / "huggingface")
    assert len(again.files) == len(done.part.shards) > 2
    before = load_file(model / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.weights(list(before)))


def test_run_again_it_keeps_what_is_done_and_spares_what_is_not_its_own(tmp_path: Path, model: Path) -> None:
    config = ExportConfig(model=model, engines=("transformers", "llama.cpp"), out=tmp_path / "out", verify=False)
    assert [part.kept for part in run.export_model(config, lambda line: None)] == [False, False]
    assert [part.kept for part in run.export_model(config, lambda line: None)] == [True, True]
    write_model(model, decoder(layers=2), seed=1)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run.export_model(config, lambda line: None)
    again = ExportConfig(**{**config.__dict__, "overwrite": True})
    assert [part.kept for part in run.export_model(again, lambda line: None)] == [False, False]
    assert names(tmp_path / "out") == {"huggingface", "gguf"}
    after = load_file(tmp_path / "out/huggingface/model.safetensors")
    assert torch.equal(after["lm_head.weight"], load_file(model / "model.safetensors")["lm_head.weight"])


def test_what_was_written_unproven_is_proven_when_asked_again(tmp_path: Path, model: Path) -> None:
    config = ExportConfig(model=model, engines=("transformers",), out=tmp_path / "out", verify=False)
    (first,) = run.export_model(config, lambda line: None)
    assert (first.record["proof"], first.record["unproven"]) == ([], ["transformers"])
    config = ExportConfig(model=model, engines=("transformers",), out=tmp_path / "out")
    (second,) = run.export_model(config, lambda line: None)
    assert (second.kept, second.record["unproven"]) == (False, [])
    assert second.record["files"]["model.safetensors"] == first.record["files"]["model.safetensors"]
    (third,) = run.export_model(config, lambda line: None)
    assert third.kept and third.record == second.record


KILLED = """
import os, signal, sys
event, path = sys.argv[1:3]
def hook(found, arguments):
    if found == event and str(arguments[0]).endswith(path):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from refound.cli import main
main(sys.argv[3:])
"""


def test_killed_at_any_moment_it_is_whole_or_not_there(tmp_path: Path, model: Path) -> None:
    """kill -9 just before it does each of these; the next run finds its way from whatever is left."""
    out = tmp_path / "out"
    export = ["export", str(model), "--to", "transformers,llama.cpp", "--no-verify", "--out", str(out)]
    for event, path in (
        ("os.mkdir", ".huggingface.part"),
        ("open", ".huggingface.part/config.json"),
        ("open", ".huggingface.part/refound.json"),
        ("os.rename", ".huggingface.part"),
        ("open", ".gguf.part/model-f32.gguf"),
    ):
        done = subprocess.run([sys.executable, "-c", KILLED, event, path, *export], check=False, cwd=tmp_path)
        assert done.returncode == -signal.SIGKILL
        final = out / "huggingface"
        assert not final.exists() or open_directory(final).decoder == decoder(layers=2)
    done = refound(model, "--to", "transformers,llama.cpp", "--no-verify", "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert names(out) == {"huggingface", "gguf"}


@pytest.mark.parametrize("renamed", [False, True])
def test_killed_while_it_replaces_an_older_one(tmp_path: Path, renamed: bool) -> None:
    """Between the two renames the older one is aside, and comes back."""
    final, old = tmp_path / "model", tmp_path / ".model.old"
    old.mkdir()
    (old / "file").write_text("old")
    if renamed:
        final.mkdir()
        (final / "file").write_text("new")
    with pytest.raises(OutputExistsError), atomic.fresh_directory(final, overwrite=False):
        pass
    assert (final / "file").read_text() == ("new" if renamed else "old")
    assert names(tmp_path) == {"model"}


def test_two_exports_into_one_place(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with atomic.fresh_directory(final, overwrite=False) as folder:
        (folder / "file").touch()
        with pytest.raises(OutputExistsError, match="another export"), atomic.fresh_directory(final, overwrite=True):
            pass
    assert names(final) == {"file"}


def test_a_disk_without_room(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExportConfig(model=model, engines=("transformers",), out=tmp_path / "out", verify=False)
    with monkeypatch.context() as patched:
        usage = atomic.shutil.disk_usage(tmp_path)
        patched.setattr(atomic.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OutputSpaceError, match=r"1\.0 kB free"):
            run.export_model(config, lambda line: None)
    assert not (tmp_path / "out").exists()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "write_part", full)
    with pytest.raises(OutputSpaceError, match="No space left"):
        run.export_model(config, lambda line: None)
    assert names(tmp_path / "out") == set()


def test_a_model_that_no_longer_computes_the_same_is_not_kept(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight is negated on the way. Tokens differ, exit code 3, nothing is left."""
    write = run.write_part

    def spoil(part: Any, source: Any, directory: Path, progress: Any) -> None:
        write(part, source, directory, progress)
        file = directory / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.self_attn.o_proj.weight"] *= -1
        from safetensors.torch import save_file

        save_file(tensors, file)

    monkeypatch.setattr(run, "write_part", spoil)
    config = ExportConfig(model=model, engines=("transformers",), out=tmp_path / "out")
    with pytest.raises(ProofError, match="does not compute what its source does") as caught:
        run.export_model(config, lambda line: None)
    assert caught.value.exit_code == 3
    assert names(tmp_path / "out") == set()


def test_code_that_comes_with_a_source_is_never_run(tmp_path: Path, model: Path) -> None:
    """Neither by the proof nor by reading: the export has the tensors and the settings, and our code or none."""
    trap = tmp_path / "it-ran"
    (model / "modeling_trap.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_trap.Trap", "AutoConfig": "modeling_trap.Trap"}
    (model / "config.json").write_text(json.dumps(config))
    done = refound(model, "--to", "transformers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not trap.exists()
    assert "auto_map" not in json.loads((tmp_path / "model-export/huggingface/config.json").read_text())


def test_check_explains_a_sentence_a_layer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", heterogeneous())
    done = refound(model, "--to", "llama.cpp", "--check", cwd=tmp_path)
    assert done.returncode == 0
    assert "fits, with replacements that compute the same" in done.stdout
    assert "layer 3: attention with 2 KV heads; no FFN is not for llama.cpp" in done.stdout
    done = refound(model, "--to", "sglang", "--check", "--json", cwd=tmp_path)
    assert done.returncode == 3
    told = json.loads(done.stdout)["engines"]["sglang"]["findings"]
    assert {finding["layer"] for finding in told if not finding["exact"]} == {1, 4}
    assert "the nearest that it takes: attention with 2 KV heads" in told[1]["told"]
    done = refound(model, "--to", "sglang", cwd=tmp_path)
    assert done.returncode == 3
    assert "layer 1" in done.stderr
    assert names(tmp_path) == {"model"}


def test_dry_run_writes_nothing(tmp_path: Path, model: Path) -> None:
    done = refound(model, "--to", "transformers,llama.cpp", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0
    planned = json.loads(done.stdout)["parts"]
    assert names(tmp_path) == {"model"}
    refound(model, "--to", "transformers,llama.cpp", "--no-verify", cwd=tmp_path)
    for part in planned:
        sizes = {file["name"]: file["bytes"] for file in part["files"]}
        folder = tmp_path / "model-export" / part["layout"]
        assert names(folder) == sizes.keys()
        for file in folder.iterdir():
            assert abs(file.stat().st_size - sizes[file.name]) < 20_000


@pytest.fixture
def no_engines(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "no-engines")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--to", "vllm", "--verify"), 1, "make engines"),
        (("--to", "vllm", "--quantize", "q8_0"), 2, "is for none of vllm"),
    ],
)
def test_what_cannot_be_done_is_said_first(
    tmp_path: Path, model: Path, no_engines: str, arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = refound(model, *arguments, cwd=tmp_path, REFOUND_ENGINES=no_engines)
    assert done.returncode == code
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert names(tmp_path) == {"model"}


def test_llama_cpp_serves_nothing_without_a_vocabulary(tmp_path: Path) -> None:
    source = open_directory(write_model(tmp_path / "model", decoder(layers=1), tokenizer=False), tokenizer=False)
    config = ExportConfig(model=source.path, engines=("transformers",), out=tmp_path / "out", tokenizer=False)
    assert make_plan(config, source).parts
    with pytest.raises(ModelDirectoryError, match=r"leave llama\.cpp out"):
        make_plan(replace(config, engines=("transformers", "llama.cpp")), source)


def test_a_damaged_model_is_exit_code_3(tmp_path: Path, model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    done = refound(model, "--to", "transformers", cwd=tmp_path)
    assert done.returncode == 3
    assert "is cut short" in done.stderr
    assert names(tmp_path) == {"model"}


def test_tokenizers_that_gguf_cannot_hold_are_refused(tmp_path: Path, model: Path) -> None:
    found = json.loads((model / "tokenizer.json").read_text())
    found["model"]["byte_fallback"] = True
    (model / "tokenizer.json").write_text(json.dumps(found))
    done = refound(model, "--to", "llama.cpp", "--no-verify", cwd=tmp_path)
    assert done.returncode == 1
    assert "only byte-level BPE" in done.stderr
    assert names(tmp_path / "model-export") == set()


def test_zero_padding_is_what_makes_a_width_fit(tmp_path: Path) -> None:
    """Engines that read ffn_mult only get multiples of 256; transformers shows that it computes the same."""
    model = write_model(tmp_path / "model", heterogeneous())
    source = open_directory(model)
    config = ExportConfig(model=model, engines=("tensorrt-llm",), out=tmp_path / "out", verify=False)
    (part,) = make_plan(config, source).parts
    assert {layer.ffn.width for layer in part.decoder.layers if layer.ffn.kind == "dense"} == {256}
    (done,) = run.export_model(config, lambda line: None)
    checking = proof.Proof(source, lambda line: None)
    try:
        figures = checking.check(done.part, done.part.model_path, "transformers")
    finally:
        checking.close()
    assert figures.equal_tokens == 512
    assert "tensorrt-llm" in ENGINES
