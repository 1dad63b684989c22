# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters that PEFT itself made: beside their base in each engine, merged, and what is wrong with others."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model
from refound.cli import main
from refound.export import install
from refound.export.directory import open_directory
from refound.export.environments import engine_python
from refound.export.proof import TOLERANCES, compare, make_prompts, run_engine
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .models import decoder, write_model

# PEFT asks transformers by a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

needs_vllm = pytest.mark.skipif(
    engine_python("vllm") is None, reason="vLLM is not installed: make engines ENGINES=vllm"
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("adapters") / "base", decoder(layers=2))


def make_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """As PEFT saves it, with both halves random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    return make_adapter(base, folder, use_rslora=True, alpha_pattern={"o_proj": 3})


def refound(*words: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words)])


def test_merged_is_what_peft_merges(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = refound(adapter, "--like", base, "--merge", "--to", "transformers", "--no-verify", "--out", out)
    assert done.exit_code == 0, done.output
    found = load_file(out / "huggingface" / "model.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    expected = model.merge_and_unload().state_dict()  # type: ignore[operator]
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)
    before = load_file(base / "model.safetensors")
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) == 2 * len(TARGETS)


def test_beside_its_base_in_every_engine(base: Path, adapter: Path, tmp_path: Path) -> None:
    install.install("llama.cpp")
    engines = "transformers,llama.cpp" + (",vllm" if engine_python("vllm") else "")
    done = refound(adapter, "--like", base, "--to", engines, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    parts = {Path(part["path"]).name: part for part in json.loads(done.stdout)["parts"]}
    proofs = [proof for part in parts.values() for proof in part["proof"]]
    assert [proof["equal_prompts"] >= 7 for proof in proofs] == [True] * len(engines.split(","))
    assert load_file(tmp_path / "out/peft/adapter_model.safetensors").keys() == (
        load_file(adapter / "adapter_model.safetensors").keys()
    )
    record = json.loads((tmp_path / "out" / "peft" / "refound.json").read_text())
    assert record["base"]["sha256"] == open_directory(base).fingerprint()


SERVED = ["transformers", "llama.cpp", pytest.param("vllm", marks=needs_vllm)]


@pytest.mark.parametrize("engine", SERVED)
def test_two_beside_one_base_that_is_loaded_once(engine: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """Each request says which it means; vLLM gets all in one batch. Each answers as its own merged model."""
    if engine == "llama.cpp":
        install.install("llama.cpp")
    adapters = [adapter, make_adapter(base, tmp_path / "second", r=8, target_modules=["q_proj", "up_proj"])]
    loaded, merged = [], []
    for place, one in enumerate(adapters):
        for words, found, part in ((["--to", engine], loaded, ""), (["--to", "transformers", "--merge"], merged, "m")):
            out = tmp_path / f"out{place}{part}"
            done = refound(one, "--like", base, *words, "--no-verify", "--out", out)
            assert done.exit_code == 0, done.output
            found.append(out)
    beside = [next(out.rglob("*.gguf"), out / "peft") for out in loaded]
    model = base
    if engine == "llama.cpp":
        assert refound(base, "--to", engine, "--no-verify", "--out", tmp_path / "base").exit_code == 0
        (model,) = (tmp_path / "base").rglob("*.gguf")
    prompts = make_prompts(open_directory(base))
    wanted = run_engine("transformers", [out / "huggingface" for out in merged], prompts)["models"]
    assert wanted[0]["tokens"] != wanted[1]["tokens"]
    answer = run_engine(engine, [model] * 2, prompts, adapters=beside, together=True)
    found = [
        compare(engine, answer["version"], one, other, TOLERANCES["f32"])
        for one, other in zip(wanted, answer["models"], strict=True)
    ]
    assert [figures.equal_prompts >= 7 and figures.holds for figures in found] == [True, True], found


def test_an_adapter_of_ours_knows_its_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = refound(adapter, "--like", base, "--to", "vllm", "--no-verify", "--out", out)
    assert done.exit_code == 0 and "names no hash" in done.output, done.output
    again = refound(out / "peft", "--like", base, "--to", "vllm", "--no-verify", "--out", tmp_path / "again")
    assert again.exit_code == 0 and "names no hash" not in again.output, again.output
    other = write_model(tmp_path / "other", decoder(layers=2), seed=9)
    wrong = refound(out / "peft", "--like", other, "--to", "vllm", "--no-verify", "--out", tmp_path / "wrong")
    assert wrong.exit_code == 3 and "other weights than those" in wrong.output
    assert not (tmp_path / "wrong").exists()


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def set_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewrite


def drop_half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def make_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"][0, 0] = torch.nan


def rename(tensors: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        old = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"
        tensors[old.replace("layers.0", "layers.7")] = tensors.pop(old)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = torch.zeros(4, 96)


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (set_config(use_dora=True), 1, "has DoRA"),
        (set_config(modules_to_save=["lm_head"]), 1, "whole modules"),
        (set_config(bias="all"), 1, "trained biases"),
        (set_config(peft_type="IA3"), 1, "servers take LoRA only"),
        (set_config(r=None), 3, "no usable r"),
        (set_tensors(drop_half), 3, "lacks one half of model.layers.0.self_attn.q_proj"),
        (set_tensors(make_nan), 3, "NaN or infinity"),
        (set_tensors(rename), 2, "model.layers.7.self_attn.q_proj.weight, which is no matrix of that model"),
        (set_tensors(widen), 2, "is [128, 64], and the adapter is for [128, 96]"),
        (lambda folder: os.truncate(folder / "adapter_model.safetensors", 2000), 3, "is cut short"),
        (lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"), 1, "pickled"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), 3, "cannot be read"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, change: Callable[[Path], None], code: int, told: str
) -> None:
    shutil.copytree(adapter, tmp_path / "bad")
    change(tmp_path / "bad")
    done = refound(tmp_path / "bad", "--like", base, "--to", "vllm", "--no-verify")
    assert done.exit_code == code and told in done.output, done.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad"]


def test_what_is_no_adapter_is_told(base: Path, tmp_path: Path) -> None:
    for path, told in ((base, "has no adapter_config.json"), (tmp_path / "nosuch", "is not there")):
        done = CliRunner().invoke(
            main, ["adapter", "compress", str(path), "--rank", "2", "--out", str(tmp_path / "out")]
        )
        assert done.exit_code == 1 and told in done.output


def test_merge_is_for_adapters(base: Path) -> None:
    done = refound(base, "--merge", "--to", "vllm")
    assert done.exit_code == 2 and "is none" in done.output
