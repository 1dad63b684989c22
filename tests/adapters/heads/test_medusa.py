# SPDX-License-Identifier: Apache-2.0
"""Medusa heads: they begin as the model, learn to foresee it, come back from a kill, and are exported as they are."""

import json
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from refound.adapters.heads.cached import CachedModel
from refound.adapters.heads.decode import decode
from refound.adapters.heads.decode_medusa import MedusaDraft, head_logits
from refound.adapters.heads.errors import HeadsMismatchError, HeadsUsageError
from refound.adapters.heads.medusa_run import open_medusa
from refound.adapters.heads.record import heads_record
from refound.adapters.heads.run import run_heads
from refound.adapters.heads.settings import HeadsConfig, MedusaSettings, read_settings
from refound.cli import main
from refound.distill.models import load, open_blocks
from refound.export.errors import OutputExistsError
from refound.export.medusa import read_medusa
from safetensors.torch import load_file

from ...export.models import decoder, write_model
from .small import foreseeable, model, surely

SETTINGS = MedusaSettings(
    tokens=1536, length=24, batch=4, lr=1e-2, prompt=8, held_out=8, heads=2, save_every=3, measured=2, new_tokens=12,
    nodes=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreseeable(tmp_path_factory.mktemp("base") / "model", 2)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    run_heads(config(base, out), quiet)
    return out


def config(base: Path, out: Path, settings: MedusaSettings = SETTINGS) -> HeadsConfig:
    return HeadsConfig(model=base, kind="medusa", out=out, settings=settings)


def quiet(_: str) -> None: ...


def killed_after(config: HeadsConfig, step: int) -> None:
    """A process of its own that gets SIGKILL once it has said that this step is done."""

    def progress(line: str) -> None:
        if line.startswith(f"step {step} "):
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            run_heads(config, progress)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_untrained_heads_say_what_the_model_says(base: Path, tmp_path: Path) -> None:
    run_heads(config(base, tmp_path / "out", replace(SETTINGS, tokens=0, measured=0)), quiet)
    heads, _ = open_medusa(tmp_path / "out", open_blocks(base))
    of = load(open_blocks(base))
    states = torch.randn(5, 64)
    for logits in head_logits(heads, states):
        assert torch.equal(logits, of.lm_head(states))


def test_heads_learn_and_greedy_tokens_stay_the_models_own(base: Path, trained: Path, tmp_path: Path) -> None:
    untrained = run_heads(config(base, tmp_path / "none", replace(SETTINGS, tokens=0, measured=0)), quiet)
    found = heads_record(trained)
    assert found and untrained
    told = found["heads"]
    assert told["steps"] == 16 and told["nodes"] == 6
    assert told["accuracy"][0][0] > untrained.record["heads"]["accuracy"][0][0] + 0.02
    assert all(0 < sum(head) <= 1 for head in told["accuracy"])
    assert told["measured"]["medusa"]["equal"] and told["predicted"]["medusa"]["tokens_a_pass"] > 1
    heads, shape = open_medusa(trained, open_blocks(base))
    of = CachedModel(load(open_blocks(base), dtype=torch.float64))
    prompt = [7, 50, 3]
    assert decode(of, prompt, MedusaDraft(heads, shape), new_tokens=20).tokens == surely(of, prompt, 20)
    said: list[str] = []
    again = run_heads(config(base, trained), said.append)
    assert again and again.record["heads"] == told and "already" in said[-1]
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run_heads(config(base, trained, replace(SETTINGS, lr=1e-4)), quiet)


def test_a_killed_training_ends_with_the_same_bytes(base: Path, trained: Path, tmp_path: Path) -> None:
    told = {"tokens", "length", "batch", "lr", "prompt", "held_out", "heads", "save_every", "measured", "nodes"}
    command = ["heads", str(base), "--kind", "medusa", "--out", str(tmp_path / "out")]
    for key in sorted(told | {"new_tokens"}):
        command += ["--set", f"{key}={getattr(SETTINGS, key)}"]
    killed_after(config(base, tmp_path / "out"), 7)  # a state of step 6 is on disk
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    # own text is there already, and is not said again
    assert done.stderr.splitlines()[0] == "going on from step 6 of 16"
    whole, killed = (path / "heads" / "model.safetensors" for path in (trained, tmp_path / "out"))
    assert whole.read_bytes() == killed.read_bytes()
    assert [path.name for path in tmp_path.glob(".*.state")] == []


def test_trained_together_the_model_moves_a_little_and_has_its_own_heads(base: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, joint=True, joint_lr=1e-3, joint_after=0.5, shared=False, blocks=2)
    found = run_heads(config(base, tmp_path / "out", settings), quiet)
    assert found and found.record["heads"]["measured"]["medusa"]["equal"]
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out" / "base"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.mlp.up_proj.weight" in moved
    assert (before["lm_head.weight"] - after["lm_head.weight"]).abs().max() < 0.1
    heads, _ = open_medusa(tmp_path / "out", open_blocks(tmp_path / "out" / "base"))
    assert len(heads.heads[0].weights) == 2 and heads.heads[0].output is not None
    with pytest.raises(HeadsMismatchError, match="Medusa-2"):
        open_medusa(tmp_path / "out", open_blocks(base))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_while_heads_are_trained_alone_the_model_stays_as_it_is(shared: bool, tied: bool, tmp_path: Path) -> None:
    """Its output matrix too, which the heads use, and its embedding where the two are one."""
    base = write_model(tmp_path / "model", decoder(layers=1, tied=tied))
    late = replace(SETTINGS, tokens=384, measured=0, joint=True, joint_lr=1e-2, joint_after=1.0, shared=shared)
    run_heads(config(base, tmp_path / "late", late), quiet)
    before, kept = (load_file(path / "model.safetensors") for path in (base, tmp_path / "late" / "base"))
    assert all(torch.equal(before[name], kept[name]) for name in before)


def test_export_writes_both_layouts(trained: Path, tmp_path: Path) -> None:
    out, given, state = trained, read_medusa(trained / "heads"), torch.randn(3, 64)
    for layout, options in (("vllm", []), ("fasterdecoding", ["--family", "fasterdecoding"])):
        command = ["export", str(out), "--to", "vllm", "--out", str(tmp_path / "to"), *options]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        written = read_medusa(tmp_path / "to" / layout)
        assert torch.allclose(head_logits(written, state), head_logits(given, state), atol=1e-5)
    done = CliRunner().invoke(main, ["export", str(out), "--to", "llama.cpp", "--out", str(tmp_path / "to")])
    assert done.exit_code == 3 and "has no such heads" in done.output
    other = write_model(tmp_path / "other", decoder(layers=2), seed=5)
    done = CliRunner().invoke(main, ["export", str(out), "--to", "vllm", "--like", str(other), "--overwrite"])
    assert done.exit_code == 3 and "was trained on the model" in done.output


def test_heads_of_another_model_or_damaged_ones_are_refused(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_heads(config(base, out, replace(SETTINGS, tokens=0, measured=0)), quiet)
    other = write_model(tmp_path / "other", decoder(layers=2), seed=5)
    with pytest.raises(HeadsMismatchError, match="was trained on the model"):
        open_medusa(out, open_blocks(other))
    body = bytearray((out / "heads" / "model.safetensors").read_bytes())
    body[-1] ^= 1
    (out / "heads" / "model.safetensors").write_bytes(body)
    with pytest.raises(HeadsMismatchError, match="is not what was written"):
        open_medusa(out, open_blocks(base))
    with pytest.raises(HeadsUsageError, match="these are none"):
        open_medusa(other, open_blocks(base))


def test_a_dry_run_says_what_would_be_and_does_nothing(base: Path, tmp_path: Path) -> None:
    command = ["heads", str(base), "--kind", "medusa", "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    done = CliRunner().invoke(main, [*command, "--set", "heads=2", "--set", "blocks=1", "--set", "tokens=4096"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["trained"] == 2 * (64 * 64 + 64) and told["steps"] == 4
    assert told["own_tokens"] == (32 + 32) * 96 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["token=1"], "did you mean 'tokens'"),
        (["lr=fast", "shared=perhaps"], "a float is wanted.*a true or false is wanted"),
        (["heads=0"], "heads is 0"),
        (["prompt=128"], "leaves no room"),
    ],
)
def test_settings_that_cannot_be_are_all_told(settings: list[str], wanted: str) -> None:
    with pytest.raises(HeadsUsageError, match=wanted):
        HeadsConfig(model=Path(), kind="medusa", out=Path(), settings=read_settings("medusa", settings))


def test_an_unknown_kind_ends_with_2() -> None:
    done = CliRunner().invoke(main, ["heads", "nowhere", "--kind", "hydra"])
    assert done.exit_code == 2 and "none of medusa, draft, exit" in done.output


def test_the_models_own_text_is_its_own() -> None:
    from refound.adapters.heads.own_text import _continued

    of = model("llama", 0, torch.float32)
    prompts = torch.tensor([[5, 6, 7], [9, 9, 2]])
    said = _continued(of.model, prompts, 9, 0.0, 0, eos=1)
    for row, prompt in zip(said.tolist(), prompts.tolist(), strict=True):
        wanted = surely(of, prompt, 6)
        stop = wanted.index(1) if 1 in wanted else 6
        assert tuple(row[:3]) == tuple(prompt) and tuple(row[3 : 3 + stop]) == wanted[:stop] and 1 not in row[3:]
    warm = [_continued(of.model, prompts, 9, 1.0, seed, eos=1) for seed in (1, 1, 2)]
    assert torch.equal(warm[0], warm[1]) and not torch.equal(warm[0], warm[2])
