# SPDX-License-Identifier: Apache-2.0
"""Exits: they begin as the model's own norm, learn, come back from disk, and transformers drafts from their layer."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from refound.adapters.heads.cached import CachedModel
from refound.adapters.heads.decode import decode
from refound.adapters.heads.decode_self import SelfDraft
from refound.adapters.heads.errors import HeadsMismatchError, HeadsUsageError
from refound.adapters.heads.exit_run import choose_exit, open_exits
from refound.adapters.heads.exits import Seen, evaluate, leaving, stopping
from refound.adapters.heads.run import plan_heads, run_heads
from refound.adapters.heads.settings import ExitSettings, HeadsConfig
from refound.cli import main
from refound.distill.models import load, open_blocks
from transformers import AutoModelForCausalLM

from ...export.models import decoder, write_model
from .small import surely

SETTINGS = ExitSettings(
    tokens=3072, length=24, batch=4, lr=1e-2, held_out=64, layers=(1, 2), width=16, gate_width=8, prompt=8, measured=2,
    new_tokens=12, risk=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", decoder(layers=3))


def config(base: Path, out: Path, settings: ExitSettings = SETTINGS) -> HeadsConfig:
    return HeadsConfig(model=base, kind="exit", out=out, settings=settings)


@pytest.mark.parametrize("gate", ["mlp", "gru", "ssm"])
def test_exits_learn_and_greedy_tokens_stay_the_models_own(base: Path, tmp_path: Path, gate: str) -> None:
    settings = replace(SETTINGS, gate=gate) if gate == "ssm" else replace(SETTINGS, gate=gate, tokens=192, held_out=4)
    found = run_heads(config(base, tmp_path / "out", settings), lambda _: None)
    assert found
    told = found.record["heads"]
    trained = plan_heads(config(base, tmp_path / "out", settings)).trained
    source = open_blocks(base)
    model = load(source)
    part, thresholds = open_exits(tmp_path / "out", source, model)
    assert sum(parameter.numel() for parameter in part.parameters()) == trained
    assert thresholds.keys() == {"leave", "stop"}
    for name, one in told["thresholds"].items():
        assert one["risk"] <= settings.risk and (one["value"] is not None or math.isinf(thresholds[name]))
    assert told["measured"]["exit"]["equal"] and told["measured"]["exit, gated"]["equal"]
    if gate == "ssm":
        assert told["agreement"]["2"]["trained"] > told["agreement"]["2"]["bare"]
    of, prompt = CachedModel(load(source, dtype=torch.float64)), [7, 50, 3]
    double = part.double()
    for index, layer in enumerate(part.layers):
        drafter = SelfDraft(
            layer, length=5, head=double.exits[index], gate=double.gates[index], threshold=0.2  # type: ignore[arg-type]
        )  # fmt: skip
        assert decode(of, prompt, drafter, new_tokens=20).tokens == surely(of, prompt, 20)


def test_an_untrained_exit_is_the_models_norm(base: Path, tmp_path: Path) -> None:
    found = run_heads(config(base, tmp_path / "out", replace(SETTINGS, tokens=0, measured=0)), lambda _: None)
    assert found
    assert all(one["trained"] == one["bare"] for one in found.record["heads"]["agreement"].values())
    source = open_blocks(base)
    part, _ = open_exits(tmp_path / "out", source, load(source))
    seen = evaluate(part, load(source), torch.arange(24).reshape(2, 12))
    assert all(torch.equal(a, b) for a, b in zip(seen.right, seen.bare, strict=True))
    with pytest.raises(HeadsMismatchError, match="was trained on the model"):
        other = open_blocks(write_model(tmp_path / "other", decoder(layers=3), seed=4))
        open_exits(tmp_path / "out", other, load(other))


def test_transformers_drafts_from_the_exit_and_says_the_same(base: Path, tmp_path: Path) -> None:
    run_heads(config(base, tmp_path / "out", replace(SETTINGS, tokens=0, measured=0)), lambda _: None)
    command = ["export", str(tmp_path / "out"), "--to", "transformers", "--out", str(tmp_path / "to")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "to" / "transformers" / "generation_config.json").read_text())
    assert told["assistant_early_exit"] in (1, 2)
    drafting = AutoModelForCausalLM.from_pretrained(tmp_path / "to" / "transformers", dtype=torch.float32)
    assert drafting.generation_config.assistant_early_exit == told["assistant_early_exit"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 17, 4]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(drafting.generate(ids, **options), plain.generate(ids, **options))
    done = CliRunner().invoke(main, ["export", str(tmp_path / "out"), "--to", "vllm"])
    assert done.exit_code == 3 and "has no early exits" in done.output


def test_transformers_gets_the_exit_that_is_best_with_the_models_own_norm(base: Path, tmp_path: Path) -> None:
    always, never = torch.ones(4, 12).bool(), torch.zeros(4, 12).bool()
    guess_s, pass_s = {1: 0.1, 2: 0.2}, {1: 1.0, 9: 1.0}
    assert choose_exit({1: never, 2: always}, guess_s, pass_s, depth=3).layer == 2
    best = choose_exit({1: always, 2: never}, guess_s, pass_s, depth=3)
    assert (best.layer, best.guesses, best.predicted["tokens_a_pass"]) == (1, 8, 9)
    assert choose_exit({1: always, 2: never}, guess_s, pass_s, depth=3, guesses=3).guesses == 3
    found = run_heads(config(base, tmp_path / "out", replace(SETTINGS, tokens=192, guesses=2)), lambda _: None)
    assert found
    told = found.record["heads"]
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert told["guesses"] == told["transformers"]["guesses"] == written["num_assistant_tokens"] == 2
    assert told["transformers"]["exit_layer"] == written["assistant_early_exit"]
    assert told["measured"]["exit, bare"]["equal"]


def test_leaving_is_at_the_first_exit_that_is_sure_enough() -> None:
    right = (torch.tensor([[0, 0, 1]]).bool(), torch.tensor([[1, 1, 0]]).bool())
    scores = (torch.tensor([[0.9, 0.1, 0.1]]), torch.tensor([[0.9, 0.9, 0.8]]))
    nothing = torch.zeros(1, 3)
    seen = Seen(right=right, bare=right, scores=scores, stop=nothing, hits=nothing.bool())
    acts, mistakes = leaving(seen, 0)(0.5)
    assert acts.tolist() == [[True] * 3] and mistakes.tolist() == [[True, False, True]]
    acts, mistakes = leaving(seen, 1)(0.85)
    assert acts.tolist() == [[True, False]] and not mistakes.any()


def test_stopping_is_a_mistake_where_the_text_would_have_been_right() -> None:
    hits = torch.tensor([[1, 1, 0, 1, 0]]).bool()  # the last place has no next token
    nothing = torch.zeros(1, 5)
    seen = Seen(right=(hits,), bare=(hits,), scores=(nothing,), stop=torch.ones(1, 5), hits=hits)
    acts, mistakes = stopping(seen, 2, 0)(0.5)
    assert acts.tolist() == [[True] * 3] and mistakes.tolist() == [[True, False, False]]


def test_an_exit_that_is_not_there(base: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadsUsageError, match="the model has 3, so an exit is after 1 to 2"):
        plan_heads(config(base, tmp_path / "out", replace(SETTINGS, layers=(3,))))
    with pytest.raises(HeadsUsageError, match="none of mlp, gru, ssm"):
        config(base, tmp_path / "out", replace(SETTINGS, gate="lstm"))
