# SPDX-License-Identifier: Apache-2.0
"""Carving as a whole: with all experts the dense model, in every layout; killed, it goes on to the same bytes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from refound.cli import main
from refound.distill.config import Training
from refound.distill.errors import TextError
from refound.distill.models import load, open_blocks
from refound.distill.quality import measure
from refound.distill.save import save_model
from refound.export.directory import open_directory
from refound.export.errors import OutputExistsError
from refound.nas.moe.calibration import windows_of
from refound.nas.moe.carve import Carving, plan_carve, run_carve
from refound.nas.moe.config import CarveConfig, Shape
from refound.nas.moe.errors import CarveUsageError, LayoutError
from refound.nas.moe.gates import DEAD
from refound.nas.moe.hearing import loads
from refound.nas.moe.layouts import lay_out
from refound.nas.moe.module import MoeFFN, carved_weights, load_carved, mixtures
from refound.nas.moe.qk_norm import widened
from refound.nas.moe.routing import TraceConfig, run_trace
from refound.nas.moe.trace import model_sha256, read_trace
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ...export.models import decoder, with_layer, write_model
from .small import config, dense


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense(tmp_path_factory.mktemp("dense") / "model")


def logits_of(path: Path) -> torch.Tensor:
    ids = torch.arange(48).reshape(2, 24) * 7 % 384
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- identities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "changes", "layout"),
    [
        ("llama", {"experts": 8, "active": 8, "split": "random"}, "mixtral"),
        ("llama", {"experts": 6, "active": 6, "split": "coactivation"}, "mixtral"),
        ("llama", {"experts": 8, "active": 8, "split": "random"}, "qwen2_moe"),
        ("llama", {"experts": 8, "active": 8, "split": "gradient", "shared": 32}, "qwen2_moe"),
        ("llama", {"experts": 8, "active": 8, "split": "random", "dense_layers": (1,)}, "qwen2_moe"),
        ("mistral", {"experts": 8, "active": 8, "split": "domains"}, "mixtral"),
        ("qwen2", {"experts": 8, "active": 8, "split": "random", "shared": 64}, "qwen2_moe"),
        ("qwen3", {"experts": 8, "active": 8, "split": "random"}, "qwen3_moe"),
        ("qwen3", {"experts": 6, "active": 6, "split": "coactivation", "dense_layers": (0,)}, "qwen3_moe"),
        ("llama", {"experts": 8, "active": 8, "split": "random"}, "qwen3_moe"),
        ("qwen2", {"experts": 8, "active": 8, "split": "random"}, "qwen3_moe"),
        ("llama", {"experts": 8, "active": 2, "copies": 4, "split": "upcycle"}, "mixtral"),
        ("llama", {"experts": 8, "active": 4, "copies": 4, "split": "upcycle"}, "qwen2_moe"),
        ("qwen3", {"experts": 8, "active": 4, "copies": 2, "split": "upcycle"}, "qwen3_moe"),
    ],
)
def test_all_experts_are_the_dense_model(tmp_path: Path, source: str, changes: dict[str, Any], layout: str) -> None:
    """As transformers computes both."""
    path = dense(tmp_path / "model", source)
    found = run_carve(config(path, tmp_path / "out", layout=layout, **changes), quiet)
    assert open_directory(found.path).decoder.family == found.layout == layout
    wanted = logits_of(path)
    assert (logits_of(found.path) - wanted).abs().max().item() < 2e-5 * wanted.abs().max().item()


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"split": "coactivation"}, "mixtral"),
        ({"split": "domains", "shared": 48}, "qwen2_moe"),
        ({"split": "random", "dense_layers": (0,)}, "qwen2_moe"),
        ({"split": "upcycle", "copies": 3, "active": 4}, "mixtral"),
    ],
)
def test_what_is_measured_and_trained_is_what_transformers_runs(
    model: Path, tmp_path: Path, changes: dict[str, Any], layout: str
) -> None:
    found = run_carve(config(model, tmp_path / "out", **changes), quiet)
    assert found.layout == layout
    own, ids = load_carved(open_directory(found.path)), torch.arange(48).reshape(2, 24) * 7 % 384
    with torch.no_grad():
        assert torch.allclose(own(input_ids=ids).logits, logits_of(found.path), atol=2e-5)
    weights = load_file(found.path / "model.safetensors")
    again = carved_weights(own, open_directory(found.path).decoder)
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


# --- what comes out ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CarveConfig, Any]:
    wanted = config(
        model,
        tmp_path_factory.mktemp("carved") / "out",
        training=Training(tokens=32 * 4 * 12, length=32, batch=4, lr=3e-4, cosine=0.0, save_every=5),
    )
    return wanted, run_carve(wanted, quiet)


def test_training_helps_and_the_record_is_whole(trained: tuple[CarveConfig, Any]) -> None:
    wanted, found = trained
    assert found.trained.after.kl < found.trained.before.kl
    assert found.quality["kl"] == pytest.approx(found.trained.before.kl, rel=1e-5)
    told = json.loads((wanted.out / "refound.json").read_text())
    assert told["carved"]["layers"][1]["layer"] == 1 and told["recipe"]["split"] == "coactivation"
    assert told["source"]["sha256"] == open_directory(wanted.model).fingerprint()
    assert told["files"].keys() == {p.name for p in wanted.out.iterdir()} - {"refound.json"}
    card = (wanted.out / "README.md").read_text()
    assert "2 of 6 experts of 16" in card and f"{found.trained.after.kl:.4f}" in card
    assert [p.name for p in wanted.out.parent.iterdir()] == [wanted.out.name]


def test_loads_after_training_are_those_of_the_written_gates(trained: tuple[CarveConfig, Any]) -> None:
    wanted, found = trained
    told = loads(load_carved(open_directory(wanted.out)), windows_of(open_blocks(wanted.model), wanted, "test", 4))
    assert [layer["load_after"] for layer in found.layers] == [layer["load_after"] for layer in told]
    assert any(layer["load_after"] != layer["load"] for layer in found.layers)
    assert all(sum(layer["load_after"]) == pytest.approx(6) for layer in found.layers)


def test_one_expert_of_weight_1_leaves_its_gate_as_it_was(model: Path, tmp_path: Path) -> None:
    """Its output says nothing of the gate, and balance alone led it away from what it was distilled to."""
    base = config(model, tmp_path / "one", active=1, balance=1.0, refit=(), keep=tmp_path / "kept")
    run_carve(base, quiet)
    training = Training(tokens=32 * 4 * 2, length=32, batch=4, lr=1e-2)
    run_carve(replace(base, out=tmp_path / "two", training=training), quiet)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    gates = [name for name in one if name.endswith("block_sparse_moe.gate.weight")]
    assert len(gates) == 2 and all(torch.equal(one[name], two[name]) for name in gates)
    assert not torch.equal(
        one["model.layers.0.block_sparse_moe.experts.0.w1.weight"],
        two["model.layers.0.block_sparse_moe.experts.0.w1.weight"],
    )


def test_the_written_model_is_the_one_that_was_measured(trained: tuple[CarveConfig, Any]) -> None:
    wanted, found = trained
    source = open_blocks(wanted.model)
    child = load_carved(open_directory(wanted.out))
    quality = measure(child, load(source), windows_of(source, wanted, "test", wanted.held_out))
    assert quality.kl == pytest.approx(found.trained.after.kl, rel=1e-4)


def test_every_expert_is_alive(trained: tuple[CarveConfig, Any]) -> None:
    _, found = trained
    assert all(min(layer["load"]) > DEAD for layer in found.layers)
    assert all(layer["after"] <= layer["before"] for layer in found.layers)


def test_the_same_run_is_done_once(trained: tuple[CarveConfig, Any]) -> None:
    wanted, found = trained
    said: list[str] = []
    (wanted.out.parent / f".{wanted.out.name}.state").mkdir()  # of a process killed just after its model was written
    assert run_carve(wanted, said.append).to_json() == json.loads(json.dumps(found.to_json()))
    assert "already" in said[0]
    assert [path.name for path in wanted.out.parent.iterdir()] == [wanted.out.name]
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run_carve(replace(wanted, seed=1), quiet)


@pytest.mark.parametrize("at", [pytest.param("splits", marks=pytest.mark.campaign), "gates", "step 7"])
def test_cut_off_it_goes_on_to_the_same_bytes(trained: tuple[CarveConfig, Any], tmp_path: Path, at: str) -> None:
    wanted, _ = trained

    class CutOff(Exception):
        pass

    def say(line: str) -> None:
        if line.startswith(at):
            raise CutOff

    other = replace(wanted, out=tmp_path / wanted.out.name)
    with pytest.raises(CutOff):
        run_carve(other, say)
    assert not other.out.exists()
    run_carve(other, quiet)
    for name in ("model.safetensors", "config.json"):
        assert (other.out / name).read_bytes() == (wanted.out / name).read_bytes()


def test_kept_work_serves_another_carving(model: Path, tmp_path: Path) -> None:
    first = config(model, tmp_path / "one", keep=tmp_path / "kept")
    run_carve(first, quiet)
    assert plan_carve(replace(first, out=tmp_path / "two", active=3)).done == {
        "calibration": 2,
        "splits": 0,
        "gates": 0,
    }
    assert plan_carve(replace(first, out=tmp_path / "two", refit=())).done == {
        "calibration": 2,
        "splits": 2,
        "gates": 0,
    }


def test_damaged_work_is_made_anew(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = config(model, tmp_path / "one", keep=tmp_path / "kept")
    run_carve(wanted, quiet)
    for file in (tmp_path / "kept" / "store").glob("*/*.safetensors"):
        body = bytearray(file.read_bytes())
        body[-1] ^= 1
        file.write_bytes(body)
    run_carve(replace(wanted, out=tmp_path / "two"), quiet)
    assert "was set aside and is made anew" in capsys.readouterr().err
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_the_plan_says_what_comes_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    plan = plan_carve(config(model, tmp_path / "out", shared=48, active=3))
    assert "3 of 6 experts of 8 beside 48 shared channels: 75% of an FFN" in plan.to_text()
    told = plan.to_json()
    assert told["layout"] == "qwen2_moe" and told["scale"] == 6 and told["jobs"]["gates"] == 2
    assert list(tmp_path.iterdir()) == []


# --- routing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_trace_is_what_the_gates_of_the_running_model_take(tmp_path: Path, family: str) -> None:
    base = decoder(family, layers=3)
    if family != "mixtral":
        base = with_layer(base, 1, ffn=replace(base.layers[1].ffn, kind="dense", width=64, experts=0, top_k=0))
    path = write_model(tmp_path / "model", base)
    run_trace(TraceConfig(model=path, out=tmp_path / "t", sources=("python-docs",), tokens=64, length=16), quiet)
    trace = read_trace(tmp_path / "t", model=model_sha256(path))
    assert (trace.layers, trace.sequences, trace.experts, trace.top_k) == (3 - (family != "mixtral"), 4, 4, 2)
    theirs: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(trace.tokens.reshape(4, 16)).long(), output_router_logits=True)
    wanted = [torch.softmax(layer.float(), -1).topk(2).indices.reshape(64, 2) for layer in logits.router_logits]
    assert torch.equal(torch.from_numpy(trace.choice).long(), torch.stack(wanted))


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"active": 7}, CarveUsageError, "cannot take 7 of 6"),
        ({"experts": 7}, CarveUsageError, "do not divide into 7 experts"),
        ({"split": "coactivatoin"}, CarveUsageError, "there is no split 'coactivatoin'"),
        ({"copies": 2}, CarveUsageError, "--copies belongs to --split upcycle"),
        ({"split": "domains", "experts": 3, "active": 1}, CarveUsageError, "3 experts cannot be dealt out to 2 texts"),
        ({"split": "gradient", "tokens": 128}, CarveUsageError, "4 windows cannot be clustered for 6 experts"),
        ({"tokens": 16}, CarveUsageError, "less than a window"),
        ({"tokens": 10**9}, TextError, "too little text"),
        ({"layout": "llama"}, CarveUsageError, "no layout 'llama'"),
        ({"layout": "mixtral", "shared": 48}, LayoutError, "no shared expert.*--layout qwen2_moe"),
        ({"layout": "mixtral", "dense_layers": (0,)}, LayoutError, "mixtral has no dense layers"),
        ({"layout": "qwen3_moe", "training": Training(tokens=512, length=32)}, LayoutError, "these are qwen3_moe"),
        ({"dense_layers": (2,)}, CarveUsageError, "no layer 2"),
        ({"dense_layers": (0, 1)}, CarveUsageError, "no layer is left"),
        ({"sources": ("bibel",)}, TextError, "did you mean 'bible'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(
    model: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        run_carve(config(model, tmp_path / "out", **changes), quiet)
    assert not (tmp_path / "out").exists()


def test_a_domain_with_too_little_text_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a few words. " * 20)
    with pytest.raises(TextError, match=r"few\.txt has \d+ tokens for train"):
        run_carve(config(model, tmp_path / "out", sources=("python-docs", str(tmp_path / "few.txt"))), quiet)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (decoder("mixtral"), "has experts already"),
        (with_layer(decoder(), 1, ffn=replace(decoder().layers[0].ffn, width=64)), "layers whose FFNs differ"),
    ],
)
def test_models_that_cannot_be_carved(tmp_path: Path, source: Any, told: str) -> None:
    with pytest.raises(LayoutError, match=told):
        run_carve(config(write_model(tmp_path / "model", source), tmp_path / "out"), quiet)


def test_only_llamas_blocks_are_trained(tmp_path: Path) -> None:
    path = dense(tmp_path / "model", "qwen3")
    with pytest.raises(LayoutError, match="only Llama's blocks are trained"):
        run_carve(config(path, tmp_path / "out", training=Training(tokens=1024, length=32)), quiet)


def test_norms_that_are_there_have_no_place_elsewhere() -> None:
    with pytest.raises(LayoutError, match="in qwen3 queries and keys pass a norm"):
        lay_out(decoder("qwen3", width=96), Shape(width=96, experts=6, top_k=2), "mixtral")
    turned = decoder(width=96, rope={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(LayoutError, match="kind 'yarn'"):
        lay_out(turned, Shape(width=96, experts=6, top_k=2), "qwen3_moe")


@pytest.mark.parametrize("width", [32, 64, 80, 96, 128])
def test_a_norm_of_widened_heads_does_nothing(width: int) -> None:
    """As Qwen3 norms and scores, in bfloat16 weights: the scores of heads without norms."""
    draw = torch.Generator().manual_seed(0)
    source = decoder(heads=1, head_dim=width, hidden_size=width)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    own = {f"{name}.weight": torch.randn(width, width, generator=draw).bfloat16() for name in names}
    wide = {name: tensor.float() for name, tensor in widened(own, source, kv_heads=1).items()}
    x = torch.randn(16, width, generator=draw)
    plain = [x @ own[f"{name}.weight"].float().T for name in ("q_proj", "k_proj")]
    normed = []
    for name in ("q", "k"):
        head = x @ wide[f"{name}_proj.weight"].T + wide[f"{name}_proj.bias"]
        scale = torch.rsqrt(head.square().mean(-1, keepdim=True) + 1e-6)
        normed.append(head * scale * wide[f"{name}_norm.weight"])
    wanted = plain[0] @ plain[1].T / width**0.5
    found = normed[0] @ normed[1].T / (2 * width) ** 0.5
    assert torch.allclose(found, wanted, atol=2e-5 * wanted.abs().max().item())


def test_biases_have_no_place_in_mixtral() -> None:
    with pytest.raises(LayoutError, match="biases, which it has not"):
        lay_out(decoder("qwen2", width=96), Shape(width=96, experts=6, top_k=2), "mixtral")


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command(model: Path, tmp_path: Path) -> None:
    base = ["carve", str(model), "--out", str(tmp_path / "out"), "--experts", "6", "--active", "2"]
    base += ["--length", "32", "--tokens", "512"]
    run = CliRunner()
    done = run.invoke(main, [*base, "--dry-run", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["layout"] == "mixtral"
    done = run.invoke(main, [*base, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["path"] == str(tmp_path / "out")
    done = run.invoke(main, ["trace", str(tmp_path / "out"), "--out", str(tmp_path / "t"), "--tokens", "64"])
    assert done.exit_code == 2 and "--tokens" in done.output
    done = run.invoke(main, ["trace", str(tmp_path / "out"), "--out", str(tmp_path / "t"), "--length", "0"])
    assert done.exit_code == 2 and "not one sequence of 0" in done.output
    trace = ["trace", str(tmp_path / "out"), "--out", str(tmp_path / "t"), "--tokens", "64", "--length", "32", "--json"]
    done = run.invoke(main, trace)
    assert done.exit_code == 0 and json.loads(done.stdout)["sequences"] == 2
    assert read_trace(tmp_path / "t", model=model_sha256(tmp_path / "out")).top_k == 2


def test_a_trace_replaces_nothing_unasked(model: Path, tmp_path: Path) -> None:
    path, run = write_model(tmp_path / "moe", decoder("mixtral")), CliRunner()
    base = ["trace", str(path), "--tokens", "64", "--length", "32", "--out"]
    mine = tmp_path / "mine"
    mine.write_text("mine")
    done = run.invoke(main, [*base, str(mine)])
    assert done.exit_code == 1 and "--overwrite" in done.output and mine.read_text() == "mine"
    assert run.invoke(main, [*base, str(mine), "--overwrite"]).exit_code == 0 and read_trace(mine).sequences == 2
    before = model_sha256(path)
    for name in ("model.safetensors", "trace.safetensors"):
        done = run.invoke(main, [*base, str(path / name), "--overwrite"])
        assert done.exit_code == 1 and "take every *.safetensors for weights" in done.output
    assert model_sha256(path) == before
    mine.write_text("mine")
    carve = ["carve", str(model), "--out", str(tmp_path / "out"), "--trace", str(mine)]
    done = run.invoke(main, carve)
    assert done.exit_code == 1 and "--overwrite" in done.output and mine.read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_carving_with_a_trace_is_done_once_too(model: Path, tmp_path: Path) -> None:
    words = ["carve", str(model), "--out", str(tmp_path / "out"), "--trace", str(tmp_path / "t"), "--split", "random"]
    words += ["--experts", "6", "--active", "6", "--length", "32", "--tokens", "512"]
    for _ in range(2):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
    assert "already" in done.output and "traced" not in done.output
    assert read_trace(tmp_path / "t", model=model_sha256(tmp_path / "out")).sequences == 16


def test_too_little_text_for_the_trace_is_said_before_carving(model: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a few words and a line end.\n" * 4000)
    words = ["carve", str(model), "--out", str(tmp_path / "out"), "--trace", str(tmp_path / "t"), "--length", "8"]
    words += ["--text", str(tmp_path / "few.txt"), "--tokens", "256", "--experts", "6"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1 and "too little text" in done.output and "for test" in done.output
    assert not (tmp_path / "out").exists() and "calibration" not in done.output


@pytest.mark.parametrize("place", ["model", "."])
def test_a_carving_never_replaces_the_model_it_is_of(tmp_path: Path, place: str) -> None:
    path = dense(tmp_path / "all" / "model")
    before = sorted(path.iterdir())
    with pytest.raises(OutputExistsError, match="itself"):
        run_carve(config(path, tmp_path / "all" / place, split="random", active=6, overwrite=True), quiet)
    assert sorted(path.iterdir()) == before
    with pytest.raises(OutputExistsError, match="itself"):
        source = open_directory(path)
        weights = dict(source.weights(list(source.decoder.tensors())))
        save_model(path, source.decoder, weights, companions_of=source, record={}, overwrite=True)
    assert sorted(path.iterdir()) == before


def test_another_text_of_the_same_name_is_another_run(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven.\n" * 6000)
    wanted = config(model, tmp_path / "out", sources=(str(text),), split="random", active=6)
    run_carve(wanted, quiet)
    text.write_text("seven six five four three two one.\n" * 6000)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run_carve(wanted, quiet)


def test_longer_windows_of_the_same_tokens_are_other_work(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven.\n" * 6000)
    first = config(model, tmp_path / "one", sources=(str(text),), keep=tmp_path / "kept", tokens=512)
    run_carve(first, quiet)
    plan = plan_carve(replace(first, out=tmp_path / "two", length=16))
    assert plan.done == {"calibration": 0, "splits": 0, "gates": 0}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--active", "17"], 2, "cannot take 17 of 16 experts"),
        (["--layout", "mixtral", "--shared", "32"], 3, "no shared expert"),
        (["--dense-layers", "x"], 2, "no list of layers"),
        (["--set", "token=3"], 2, "did you mean 'tokens'"),
        (["--text", "nothing"], 1, "there is no text"),
    ],
)
def test_mistakes_end_in_one_line(model: Path, tmp_path: Path, arguments: list[str], code: int, told: str) -> None:
    done = CliRunner().invoke(main, ["carve", str(model), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == code and told in done.output and "Traceback" not in done.output


def test_mixtures_of_a_layer_that_stayed_dense(model: Path, tmp_path: Path) -> None:
    wanted = config(model, tmp_path / "out", split="random", dense_layers=(1,))
    found = load_carved(open_directory(run_carve(wanted, quiet).path))
    assert len(mixtures(found)) == 1 and isinstance(found.model.layers[0].mlp, MoeFFN)
    assert Carving(wanted, None).layout.sparse == (0,)  # type: ignore[arg-type]
