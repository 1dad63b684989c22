# SPDX-License-Identifier: Apache-2.0
"""A distilled draft: nearer to its model than it began, of the same tokens, and run by transformers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from refound.adapters.heads.draft import require_same_tokenizer, small_decoder, small_weights
from refound.adapters.heads.errors import HeadsMismatchError, HeadsUsageError
from refound.adapters.heads.run import plan_heads, run_heads
from refound.adapters.heads.runs import expected_of_chain, run_lengths
from refound.adapters.heads.settings import DraftSettings, HeadsConfig
from refound.cli import main
from refound.distill.models import open_blocks
from transformers import AutoModelForCausalLM

from ...export.models import decoder, write_model

SETTINGS = DraftSettings(
    tokens=3072, length=24, batch=4, lr=1e-2, prompt=8, held_out=8, layers=1, width=50, measured=2, new_tokens=12
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", decoder(layers=3))


def config(base: Path, out: Path, settings: DraftSettings = SETTINGS) -> HeadsConfig:
    return HeadsConfig(model=base, kind="draft", out=out, settings=settings)


def test_a_draft_learns_and_transformers_decodes_with_it(base: Path, tmp_path: Path) -> None:
    untrained = run_heads(config(base, tmp_path / "none", replace(SETTINGS, tokens=0, measured=0)), lambda _: None)
    found = run_heads(config(base, tmp_path / "out"), lambda _: None)
    assert found and untrained
    told = found.record["heads"]
    assert told["agreement"] > untrained.record["heads"]["agreement"]
    assert all(told["measured"][name]["equal"] for name in ("draft", "draft, sure", "dynamic tree"))
    source = open_blocks(tmp_path / "out")
    assert [layer.ffn.width for layer in source.decoder.layers] == [48]
    require_same_tokenizer(tmp_path / "out", base)
    big, small = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (base, tmp_path / "out"))
    ids = torch.tensor([[5, 9, 17, 4]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    wanted = big.generate(ids, **options)
    assert torch.equal(big.generate(ids, assistant_model=small, **options), wanted)


def test_full_width_and_all_but_no_layer_is_the_models_own(base: Path) -> None:
    source = open_blocks(base)
    draft, chosen = small_decoder(source.decoder, replace(SETTINGS, layers=2, width=100))
    weights, own = small_weights(source, draft, chosen), dict(source.weights(list(source.decoder.tensors())))
    assert chosen == (0, 2)
    assert torch.equal(weights["model.layers.1.mlp.up_proj.weight"], own["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(weights["model.embed_tokens.weight"], own["model.embed_tokens.weight"])


def test_what_cannot_be_a_draft(base: Path, tmp_path: Path) -> None:
    with pytest.raises(HeadsUsageError, match="layers is 3 and the model has 3"):
        plan_heads(config(base, tmp_path / "out", replace(SETTINGS, layers=3)))
    other = write_model(tmp_path / "other", decoder(layers=1))
    told = (other / "tokenizer.json").read_text().replace('"</s>"', '"<end>"')
    (other / "tokenizer.json").write_text(told)
    with pytest.raises(
        HeadsMismatchError, match=r"differ in 2 tokens: '</s>' is none in the first and 1 in the second"
    ):
        require_same_tokenizer(other, base)


def test_a_draft_that_is_given_is_measured_and_one_that_speaks_otherwise_is_not(base: Path, tmp_path: Path) -> None:
    given = write_model(tmp_path / "given", decoder(layers=1, hidden_size=96, width=48), seed=3)
    settings = replace(SETTINGS, start=str(given), tokens=0)
    found = run_heads(config(base, tmp_path / "out", settings), lambda _: None)
    assert found and found.record["heads"]["measured"]["draft"]["equal"]
    assert open_blocks(tmp_path / "out").decoder.hidden_size == 96
    told = (given / "tokenizer.json").read_text().replace('"</s>"', '"<end>"')
    (given / "tokenizer.json").write_text(told)
    command = ["heads", str(base), "--kind", "draft", "--set", f"start={given}", "--out", str(tmp_path / "other")]
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(main, [*command, *more])
        assert done.exit_code == 3 and "tokenizers of" in done.output and not (tmp_path / "other").exists()


def test_runs_of_right_guesses() -> None:
    right = torch.tensor([[1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    assert run_lengths(right, 2).tolist() == [2, 1, 0, 2, 2]
    assert run_lengths(right, 6).tolist() == [2] and len(run_lengths(right, 7)) == 0
    assert expected_of_chain(run_lengths(right, 2)) == 1.4 and expected_of_chain(torch.zeros(0)) == 0
