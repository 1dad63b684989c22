# SPDX-License-Identifier: Apache-2.0
"""The end of the demo on its own: a model leaves a snapshot process's memory and is continued by the engines here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from refound.demo.config import DemoConfig
from refound.demo.model import model_directory
from refound.demo_serving import NEW_TOKENS, PROMPT, Served
from refound.export.engines import ENGINES
from refound.export.environments import engine_python
from refound.export.install import RECIPES
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ..ckpt.alone import alone
from ..ckpt.shards import shard_of


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    model = AutoModelForCausalLM.from_pretrained(model_directory(tiny=True), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    config = DemoConfig(tiny=True, out=out, steps=3)
    found = Served(config)
    with alone() as job:
        job.snapshot(3, shard_of({"model": model}, 0))
        found.take(job.job)
    found.run(lambda line: None)
    return found, out, dict(model.state_dict())


def test_the_model_is_the_one_in_memory(served: tuple[Served, Path, dict[str, Any]]) -> None:
    found, out, weights = served
    taken = load_file(out / "model" / "model.safetensors")
    assert taken.keys() == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(taken[name], weights[name]) for name in taken)
    assert "step 3" in found.to_json()["made_of"]
    tokenizer = Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    assert tokenizer.encode("\nöa").ids == list("\nöa".encode())


def test_every_engine_that_is_here_goes_on_with_the_same_words(served: tuple[Served, Path, dict[str, Any]]) -> None:
    found, _, _ = served
    engines = [name for name in ENGINES if engine_python(name)]
    told = found.to_json()["engines"]
    assert found.alike
    assert [one["engine"] for one in told] == engines
    assert [one["equal_tokens"] for one in told] == [NEW_TOKENS] * len(engines)
    text = found.to_text()
    assert repr(PROMPT) in text and "transformers" in text
    assert text.count(f"the same {NEW_TOKENS} tokens") == len(engines) - 1
    absent = [name for name in RECIPES if engine_python(name) is None]
    assert ("make engines" in text) == bool(absent)
