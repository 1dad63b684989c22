# SPDX-License-Identifier: Apache-2.0
"""`refound tune`: recipes, a run that is killed, what its result becomes, and what is wrong with each."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from refound.adapters.base import load_model, open_base
from refound.adapters.kinds import KINDS
from refound.adapters.peft_methods import set_dropout
from refound.adapters.ranks import lower_rank
from refound.adapters.recipe import TuneRecipe, read_tune
from refound.adapters.saved import open_tuned
from refound.adapters.tune import make_samples, plan_tune, tune
from refound.cli import main
from refound.distill.exclusive import only_one
from refound.distill.follow import Follower
from refound.distill.resume import STATE, state_folder
from refound.distill.texts import open_tokenizer
from refound.export.errors import OutputExistsError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..export.models import decoder, heterogeneous, write_model, write_tokenizer
from .families import write_family

RECIPE = """
base = "{base}"
out = "{out}"
engines = ["transformers", "vllm", "llama.cpp"]

[method]
kind = "lora"
rank = 4
alpha = 8

[data]
sources = ["python-docs"]
length = 16
windows = 40
held_out = 4

[train]
epochs = 1
batch = 4
lr = 1e-2
save_every = 2
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", decoder(layers=2, tied=True))


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(base=base, out=tmp_path / "out"))
    return file


def refound(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24).reshape(2, 12)).logits


def test_a_killed_run_ends_with_the_bits_of_the_undisturbed_one(recipe: Path, tmp_path: Path) -> None:
    whole = refound("tune", recipe, "--set", f"out={tmp_path / 'whole'}", "--json")
    assert whole.exit_code == 0, whole.output
    told = json.loads(whole.stdout)
    assert told["after"] < told["before"] and told["steps"] == 9

    killed_while(recipe, "step 5 ")  # before its state is taken: that of step 4 is on disk
    state = state_folder(tmp_path / "out") / STATE
    with safe_open(state, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith("model.")]  # noqa: SIM118
    assert names and all("lora_" in name for name in names), "the base is in no snapshot"
    again = refound("tune", recipe)
    assert again.exit_code == 0, again.output
    assert "going on from step 4 of 9" in again.output
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not state.exists()
    third = refound("tune", recipe)
    assert third.exit_code == 0 and "is the result of this very run already" in third.output


def killed_while(recipe: Path, says: str) -> None:
    """A process of its own tunes, and kills itself when it says this."""

    def stop(line: str) -> None:
        if line.startswith(says):
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        signal.alarm(300)  # so that nobody waits for ever
        try:
            tune(read_tune(recipe), stop)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("then", ["the same", "another"])
def test_a_run_that_is_killed_once_its_result_is_there_leaves_no_state(
    then: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Follower, "close", lambda follower: (_ for _ in ()).throw(_Stopped))
        with pytest.raises(_Stopped):
            tune(read_tune(recipe), lambda line: None)
    folder = state_folder(tmp_path / "out")
    assert (folder / STATE).is_file() and (tmp_path / "out").is_dir()
    if then == "the same":
        assert "is the result of this very run already" in refound("tune", recipe).output
    else:
        done = refound("tune", recipe, "--overwrite", "--set", "seed=5")
        assert done.exit_code == 0 and "going on" not in done.output, done.output
    assert not folder.exists()


def test_the_state_of_another_run_is_kept_and_told(recipe: Path, tmp_path: Path) -> None:
    assert refound("tune", recipe, "--set", "train.steps=1").exit_code == 0

    def stop(line: str) -> None:
        if line.startswith("step 3 "):
            raise _Stopped

    with pytest.raises(_Stopped):
        tune(read_tune(recipe), stop, overwrite=True)
    state = state_folder(tmp_path / "out") / STATE
    assert "very run already" in refound("tune", recipe, "--set", "train.steps=1").output and state.is_file()
    other = refound("tune", recipe, "--overwrite", "--set", "seed=5")
    assert other.exit_code == 3 and "Choose another place" in other.output, other.output
    assert "going on from step 2" in refound("tune", recipe, "--overwrite").output


def test_one_at_a_time_tunes_into_a_place(recipe: Path, tmp_path: Path) -> None:
    holder = only_one(state_folder(tmp_path / "out"), "tuning", "", taken=ValueError, unwritable=ValueError)
    with holder:
        done = refound("tune", recipe)
    assert done.exit_code == 3 and "another tuning writes" in done.output, done.output


@pytest.mark.parametrize("out", ["base", "holds", "data"])
def test_what_it_is_made_of_is_never_replaced(out: str, recipe: Path, base: Path, tmp_path: Path) -> None:
    place = {"base": base, "holds": base.parent, "data": tmp_path}[out]
    file = write_lines(tmp_path, lines_of(8))
    before = {path: path.read_bytes() for path in (*base.iterdir(), file)}
    settings = [f"out={place}", f"data.sources=['{file}']"]
    done = refound("tune", recipe, "--overwrite", *[part for setting in settings for part in ("--set", setting)])
    assert done.exit_code == 2 and "and would be replaced" in done.output, done.output
    assert {path: path.read_bytes() for path in before} == before


class _Stopped(Exception):
    pass


def test_a_pruning_that_is_cut_off_goes_on_with_the_same_masks(recipe: Path, tmp_path: Path) -> None:
    settings = ["method.kind=pruned-lora", "method.ffn=0.5", "method.kv_heads=1", "train.save_every=1"]
    whole, cut = (read_tune(recipe, [*settings, f"out={tmp_path / name}"]) for name in ("whole", "cut"))
    tune(whole, lambda line: None)

    def stop(line: str) -> None:
        if line.startswith("step 5 "):  # some channels have gone, others have not
            raise _Stopped

    with pytest.raises(_Stopped):
        tune(cut, stop)
    tune(cut, lambda line: None)
    for file in ("adapter_model.safetensors", "base/model.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    there = load_file(tmp_path / "cut" / "adapter_model.safetensors")["model.layers.0.mlp.there"]
    assert int(there.sum()) == 64 and len(there) == 96  # a multiple of 32


@pytest.mark.parametrize("kind", ["lora", "parallel"])
def test_children_whose_layers_differ_are_tuned_too(kind: str, recipe: Path, tmp_path: Path) -> None:
    child, out = write_model(tmp_path / "child", heterogeneous()), tmp_path / "out"
    method = "method.rank=2" if kind == "lora" else "method={kind='parallel', width=8}"
    done = refound("tune", recipe, "--set", f"base={child}", "--set", method, "--set", "train.steps=2")
    assert done.exit_code == 0, done.output
    wanted = logits(open_tuned(out, open_base(child)).model)
    merge = ["--merge"] if kind == "lora" else []
    exported = refound("export", out, *merge, "--to", "transformers", "--no-verify", "--out", tmp_path / "served")
    assert exported.exit_code == 0, exported.output
    served = load_model(open_base(tmp_path / "served" / "huggingface"))
    assert (logits(served) - wanted).abs().max() < 2e-5 * wanted.abs().max()


METHODS = {
    "dora": ["method.kind=dora"],
    "vera": ["method={kind='vera', rank=8}"],
    "parallel": ["method={kind='parallel', width=8}"],
    "series": ["method={kind='series', width=8, activation='linear'}"],
    "pruned-lora": ["method.kind=pruned-lora", "method.ffn=0.3", "method.kv_heads=1"],
}


@pytest.mark.parametrize("kind", METHODS)
def test_what_servers_do_not_take_beside_the_base_becomes_a_model(
    kind: str, recipe: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = [part for setting in METHODS[kind] for part in ("--set", setting)]
    done = refound("tune", recipe, *settings)
    assert done.exit_code == 0, done.output
    wanted = logits(open_tuned(out, open_base(base)).model)
    assert not torch.allclose(wanted, logits(load_model(open_base(base))))
    exported = refound("export", out, "--to", "transformers", "--no-verify", "--out", tmp_path / "served")
    assert exported.exit_code == 0, exported.output
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served" / "huggingface", dtype=torch.float32)
    assert (logits(served) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    if kind in ("vera", "pruned-lora"):
        like = out / "base" if kind == "pruned-lora" else base
        beside = refound("export", out / "lora", "--like", like, "--merge", "--to", "transformers", "--no-verify")
        assert beside.exit_code == 0, beside.output
        merged = AutoModelForCausalLM.from_pretrained(out / "lora-export" / "huggingface", dtype=torch.float32)
        assert (logits(merged) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    if kind == "dora":
        assert "of the change is lost in the Frobenius norm" in done.output


def test_a_lora_is_exported_beside_its_base_and_compressed(recipe: Path, base: Path, tmp_path: Path) -> None:
    assert refound("tune", recipe).exit_code == 0
    out = tmp_path / "out"
    wanted = logits(open_tuned(out, open_base(base)).model)
    done = refound("export", out, "--merge", "--to", "transformers", "--no-verify", "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "huggingface", dtype=torch.float32)
    assert (logits(merged) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    vllm = refound("export", out, "--to", "vllm", "--no-verify", "--out", tmp_path / "vllm")
    assert "--max-lora-rank 8 " in vllm.output, "vLLM knows no limit of 4"
    small = refound("adapter", "compress", out, "--rank", 2, "--out", tmp_path / "small", "--json")
    assert small.exit_code == 0, small.output
    assert 0 < json.loads(small.stdout)["error"] < 1
    ranks = {
        tensor.shape[0]
        for name, tensor in load_file(tmp_path / "small" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert ranks == {2}
    again = refound("export", tmp_path / "small", "--to", "transformers", "--no-verify", "--out", tmp_path / "x")
    assert again.exit_code == 0, again.output


def test_the_nearest_of_a_smaller_rank_is_the_best_there_is() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 20, generator=generator), torch.randn(30, 6, generator=generator)
    found = lower_rank({"x": (a, b)}, 3)
    singular = torch.linalg.svdvals(b @ a)
    low_a, low_b = found.pairs["x"]
    assert low_a.shape == (3, 20) and low_b.shape == (30, 3)
    lost = torch.linalg.matrix_norm(b @ a - low_b @ low_a) / torch.linalg.matrix_norm(b @ a)
    assert torch.isclose(lost, torch.tensor(found.error), rtol=1e-4)
    assert abs(found.error - float((singular[3:].square().sum() / singular.square().sum()).sqrt())) < 1e-5
    assert lower_rank({"x": (a, b)}, 6).error < 1e-6


def test_a_merge_into_int8_tells_what_rounding_takes(recipe: Path, base: Path, tmp_path: Path) -> None:
    assert refound("tune", recipe, "--set", "train.lr=0.05").exit_code == 0
    done = refound("export", base, "--to", "transformers", "--quantize", "int8", "--no-verify", "--out", tmp_path / "q")
    assert done.exit_code == 0, done.output
    rounded, out = tmp_path / "q" / "huggingface", tmp_path / "merged"
    found = refound("adapter", "merge", tmp_path / "out", "--into", rounded, "--out", out, "--json")
    assert found.exit_code == 0, found.output
    error = json.loads(found.stdout)["error"]
    assert 0 < error < 0.5
    read = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for name, path in (("before", rounded), ("after", out))
    }
    wanted = logits(open_tuned(tmp_path / "out", open_base(base)).model)
    off = {name: float((logits(model) - wanted).norm()) for name, model in read.items()}
    assert off["after"] < 0.5 * off["before"]
    # trained on the rounded weights themselves
    plain = load_model(open_base(rounded))
    assert torch.allclose(logits(plain), logits(read["before"]), atol=1e-5)
    settings = [f"base={rounded}", f"out={tmp_path / 'on-int8'}", "train.lr=0.05", "engines=['vllm']"]
    done = refound("tune", recipe, *[part for setting in settings for part in ("--set", setting)], "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["after"] < json.loads(done.stdout)["before"], done.output
    beside = refound("adapter", "merge", tmp_path / "on-int8", "--into", rounded, "--out", tmp_path / "z")
    assert beside.exit_code == 0 and "matrices of INT8" in beside.output, beside.output
    exported = refound("export", tmp_path / "on-int8", "--to", "vllm")
    assert exported.exit_code == 2 and "vllm serve" in exported.output and "refound adapter merge" in exported.output
    refused = refound("adapter", "merge", tmp_path / "out", "--into", base, "--out", tmp_path / "y")
    assert refused.exit_code == 2 and "is not rounded as" in refused.output


def test_a_merge_is_into_the_rounding_of_the_very_base(recipe: Path, base: Path, tmp_path: Path) -> None:
    assert refound("tune", recipe, "--set", "train.steps=1").exit_code == 0
    other = write_model(tmp_path / "other", decoder(layers=2, tied=True), seed=9)
    rounded = {}
    for name, model in (("own", base), ("other", other)):
        to = tmp_path / f"{name}-int8"
        done = refound("export", model, "--to", "vllm", "--quantize", "int8", "--no-verify", "--out", to)
        assert done.exit_code == 0, done.output
        rounded[name] = to / "huggingface"

    def merge(into: Path, out: str) -> Any:
        return refound("adapter", "merge", tmp_path / "out", "--into", into, "--out", tmp_path / out, "--overwrite")

    refused = merge(rounded["other"], "x")
    assert refused.exit_code == 3 and "was rounded from other weights than those in" in refused.output, refused.output
    replaced = refound("adapter", "merge", tmp_path / "out", "--into", rounded["own"], "--out", rounded["own"])
    assert replaced.exit_code == 2 and "is --into" in replaced.output, replaced.output
    assert merge(rounded["own"], "whole").exit_code == 0
    again = merge(tmp_path / "whole", "again")
    assert again.exit_code == 3, "a merge is no rounding of the base"

    cut_in_two(rounded["own"])
    assert merge(rounded["own"], "sharded").exit_code == 0
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 2
    found = [logits(load_model(open_base(tmp_path / name))) for name in ("whole", "sharded")]
    assert torch.equal(*found)
    file = next(rounded["own"].glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    damaged = merge(rounded["own"], "y")
    assert damaged.exit_code == 3 and damaged.exception.__class__ is SystemExit, damaged.output


def cut_in_two(folder: Path) -> None:
    """Its weights into two files, with an index."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    shards = {f"model-0000{part + 1}-of-00002.safetensors": sorted(tensors)[part::2] for part in (0, 1)}
    for name, held in shards.items():
        save_file({one: tensors[one] for one in held}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {one: name for name, held in shards.items() for one in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("change", [{"files": ["a"]}, {"seed": "x"}, {"files": 3}])
def test_a_mangled_record_is_damage(change: dict[str, Any], recipe: Path, tmp_path: Path) -> None:
    method = "method={kind='parallel', width=8}"
    assert refound("tune", recipe, "--set", method, "--set", "train.steps=1").exit_code == 0
    record = tmp_path / "out" / "refound.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    done = refound("export", tmp_path / "out", "--to", "transformers", "--no-verify", "--out", tmp_path / "served")
    assert done.exit_code == 3 and "refound.json" in done.output, done.output


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> Path:
    file = folder / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def lines_of(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{n} + {n} = ", "completion": f"one\nis {2 * n}\n", "wrong": f"one\nis {3 * n + 1}\n"}
        for n in range(count)
    ]


def on_lines(recipe: Path, file: Path, *settings: str) -> TuneRecipe:
    return read_tune(recipe, [f"data.sources=['{file}']", "data.length=64", "train.epochs=1", *settings])


def test_records_are_held_out_with_all_that_is_made_of_them(recipe: Path, base: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path, lines_of(8))
    wanted = on_lines(recipe, file, "transform.lemma={enabled=true, mode='both'}", "data.held_out=3")
    parts = make_samples(wanted, open_base(base), eos=1)
    tokenizer = open_tokenizer(base)
    said = [{tokenizer.decode(one.ids).partition("=")[0] for one in part} for part in parts]
    assert [len(part) for part in parts] == [15, 9]
    assert [len(prompts) for prompts in said] == [5, 3] and not said[0] & said[1]


def test_another_wrong_answer_makes_another_run(recipe: Path, tmp_path: Path) -> None:
    lines = lines_of(6)
    file = write_lines(tmp_path, lines)
    wanted = on_lines(recipe, file, "loss.fait.enabled=true", "train.steps=1")
    tune(wanted, lambda line: None)
    said: list[str] = []
    tune(wanted, said.append)
    assert any("is the result of this very run already" in line for line in said)
    write_lines(tmp_path, [*lines[:3], lines[3] | {"wrong": "none\n"}, *lines[4:]])
    with pytest.raises(OutputExistsError):
        tune(wanted, said.append)


def test_a_dry_run_counts_what_is_cut(recipe: Path, tmp_path: Path) -> None:
    lines = [line | {"completion": "a b c d e " * (30 if n < 2 else 1)} for n, line in enumerate(lines_of(6))]
    plan = plan_tune(on_lines(recipe, write_lines(tmp_path, lines)))
    assert plan.truncated == 2 and "2 of them are longer than data.length, and cut" in plan.to_text()


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_dropout_acts_while_it_is_trained_and_not_after(kind: str, base: Path) -> None:
    attached = KINDS[kind](rank=4, dropout=0.5).attach(load_model(open_base(base)), seed=0)
    with torch.no_grad():
        for parameter in attached.trained().values():
            parameter.add_(0.3)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return logits(attached.model)

    set_dropout(attached.model, True)
    assert not torch.equal(drawn(1), drawn(2)) and torch.equal(drawn(1), drawn(1))
    set_dropout(attached.model, False)
    assert torch.equal(drawn(1), drawn(2))
    assert not any(isinstance(module, torch.nn.Linear) and module.training for module in base_layers(attached.model))


def base_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("base_layer")]


# --- what cannot be ------------------------------------------------------------------------------------------------


def test_the_recipes_that_come_along_can_be_read(root: Path) -> None:
    for file in sorted((root / "recipes").glob("*.toml")):
        if "[method]" in file.read_text():
            read_tune(file)
            read_tune(file, toy=True)


def test_every_mistake_is_told_at_once(recipe: Path) -> None:
    settings = ["method.rnk=3", "bse=1", "train.epochs='two'", "train.batch=0", "data.sources=['a.jsonl', 'bible']"]
    settings += ["engines=['vlm']", "method.dropout=2"]
    done = refound("tune", recipe, *[part for setting in settings for part in ("--set", setting)])
    assert done.exit_code == 2
    for told in (
        "unknown key method.rnk",
        "unknown key bse; did you mean 'base'",
        "train.epochs is 'two'",
        "train.batch is 0",
        "mixes .jsonl files with text",
        "unknown engine 'vlm'; did you mean 'vllm'",
        "method.dropout is 2",
    ):
        assert told in done.output, told
    done = refound("tune", recipe, "--set", "method.rank=1024")
    assert done.exit_code == 2 and "method.rank is 1024 and vLLM serves LoRA up to rank 512" in done.output
    done = refound("tune", recipe, "--set", "method.kind=lorra", "--set", "train.batch=0")
    assert "train.batch is 0" in done.output
    done = refound("tune", recipe, "--set", "method.kind=lorra")
    assert done.exit_code == 2 and "did you mean 'lora'" in done.output


@pytest.mark.parametrize(
    ("settings", "code", "told"),
    [
        (
            ["method.targets=['q_prj', 'mlp']"],
            2,
            "'q_prj' (did you mean 'q_proj'?). This model has down_proj, gate_proj",
        ),
        (["method.targets=['lm_head']"], 2, "has the weights of the input embedding here"),
        (["data.sources=['bibel']"], 1, "did you mean 'bible'"),
        (["data.sources=['lines.jsonl']"], 2, "line 2 has an empty completion"),
        (["base=nowhere"], 1, "nowhere is not there"),
    ],
)
def test_what_is_wrong_is_told_by_a_dry_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], code: int, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    done = refound("tune", recipe, "--dry-run", *[part for setting in settings for part in ("--set", setting)])
    assert done.exit_code == code and told in done.output, done.output
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def rounded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounded")
    done = refound("export", base, "--to", "vllm", "--quantize", "int8", "--no-verify", "--out", out / "q")
    assert done.exit_code == 0, done.output
    return out / "q" / "huggingface"


@pytest.mark.parametrize(
    ("method", "code", "told"),
    [
        ("{kind='lora', rank=4}", 0, "beside the base, as a PEFT directory; merged into it by `refound adapter merge`"),
        ("{kind='dora', rank=4}", 0, "as its nearest LoRA, in lora/"),
        ("{kind='vera', rank=4}", 0, "as the LoRA that it is, in lora/"),
        ("{kind='parallel', width=8}", 0, "not: weights of INT8 take in a LoRA only"),
        ("{kind='series', width=8, activation='linear'}", 0, "not: weights of INT8 take in a LoRA only"),
        ("{kind='pruned-lora', rank=4}", 2, "of which nothing can be cut away"),
    ],
)
def test_a_dry_run_tells_what_a_rounded_base_takes(
    method: str, code: int, told: str, recipe: Path, rounded: Path
) -> None:
    settings = [f"method={method}", f"base={rounded}", "engines=[]"]
    done = refound("tune", recipe, "--dry-run", *[part for setting in settings for part in ("--set", setting)])
    assert done.exit_code == code and told in done.output and "GGUF" not in done.output, done.output


@pytest.mark.parametrize(
    ("method", "engines", "told"),
    [
        ("{kind='prefix', tokens=3}", "['vllm']", "a trained prefix is keys and values"),
        ("{kind='series', width=8}", "['transformers']", "a series adapter that is not linear"),
        ("{kind='parallel', width=8, placement='both', activation='relu'}", "['vllm']", "an adapter at attention"),
    ],
)
def test_what_a_named_engine_does_not_serve_is_refused_before(
    method: str, engines: str, told: str, recipe: Path, tmp_path: Path
) -> None:
    square = write_model(tmp_path / "square", decoder(layers=2, head_dim=16))
    settings = [f"method={method}", f"engines={engines}", f"base={square}"]
    done = refound("tune", recipe, "--dry-run", *[part for setting in settings for part in ("--set", setting)])
    assert done.exit_code == 2 and told in done.output and "leave engines out" in done.output, done.output


def test_a_rounded_base_is_for_engines_that_load_it(recipe: Path, rounded: Path) -> None:
    done = refound("tune", recipe, "--dry-run", "--set", f"base={rounded}")
    assert done.exit_code == 2 and "llama.cpp cannot load weights rounded" in done.output, done.output


@pytest.mark.parametrize("kind", ["lora", "vera", "series"])
def test_a_family_that_is_not_exported_promises_no_engine(kind: str, recipe: Path, tmp_path: Path) -> None:
    base = write_family(tmp_path / "opt", "opt")
    write_tokenizer(base)
    method = "{kind='series', width=8, activation='linear'}" if kind == "series" else f"{{kind='{kind}', rank=4}}"
    settings = [f"method={method}", f"base={base}"]
    given = [part for setting in settings for part in ("--set", setting)]
    done = refound("tune", recipe, "--dry-run", *given, "--set", "engines=[]")
    assert done.exit_code == 0 and "does not write opt models" in done.output, done.output
    assert "GGUF" not in done.output and ("served: not:" in done.output) == (kind == "series")
    refused = refound("tune", recipe, "--dry-run", *given)
    assert refused.exit_code == 2 and "does not write opt models" in refused.output, refused.output


@pytest.mark.parametrize("prefix", [0, 10])
def test_samples_are_no_longer_than_the_base_has_positions(prefix: int, recipe: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "square", decoder(layers=2, head_dim=16))
    settings = [f"base={base}", f"data.length={257 - prefix}", "engines=[]"]
    settings += [f"method={{kind='prefix', tokens={prefix}}}"] if prefix else []
    done = refound("tune", recipe, "--dry-run", *[part for setting in settings for part in ("--set", setting)])
    assert done.exit_code == 2 and "has 256 positions" in done.output, done.output


def test_a_dry_run_says_what_would_be_trained(recipe: Path, tmp_path: Path) -> None:
    done = refound("tune", recipe, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["steps"] == 9 and told["samples"] == 36 and told["held_out"] == 4
    assert told["state_bytes"] == 12 * told["trained"]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def flip(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    body = bytearray(file.read_bytes())
    body[-3] ^= 1
    file.write_bytes(body)


@pytest.mark.parametrize(
    ("kind", "change", "like", "told"),
    [
        ("parallel", None, "other", "was trained on other weights than those in"),
        ("parallel", flip, "base", "its bytes are not what refound.json says"),
        ("lora", None, "other", "was made for other weights than those in"),
        ("lora", flip, "base", "its bytes are not what refound.json says"),
        ("parallel", lambda folder: (folder / "adapter_model.safetensors").unlink(), "base", "is missing or damaged"),
    ],
)
def test_a_wrong_base_and_a_damaged_adapter_end_with_3(
    recipe: Path,
    base: Path,
    tmp_path: Path,
    kind: str,
    change: Callable[[Path], None] | None,
    like: str,
    told: str,
) -> None:
    out = tmp_path / "out"
    method = f"method={{kind='{kind}', {'rank=2' if kind == 'lora' else 'width=8'}}}"
    assert refound("tune", recipe, "--set", method, "--set", "train.steps=1").exit_code == 0
    other = write_model(tmp_path / "other", decoder(layers=2, tied=True), seed=9)
    if change:
        change(out)
    place = other if like == "other" else base
    done = refound("export", out, "--like", place, "--to", "transformers", "--no-verify", "--out", tmp_path / "served")
    assert done.exit_code == 3 and told in done.output, done.output
    assert not (tmp_path / "served").exists()


def test_a_prefix_is_refused_with_the_nearest_that_is_served(recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "square"
    write_model(other, decoder(layers=2, head_dim=16))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    settings = ["method={kind='prefix', tokens=3}", f"base={other}", "engines=[]"]
    done = refound("tune", recipe, *[part for setting in settings for part in ("--set", setting)])
    assert done.exit_code == 0 and "served: not: a trained prefix is keys and values" in done.output, done.output
    served = refound("export", tmp_path / "out", "--to", "transformers", "--no-verify")
    assert served.exit_code == 3 and 'Nearest that is served: kind = "lora"' in served.output
