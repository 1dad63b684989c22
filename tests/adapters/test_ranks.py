# SPDX-License-Identifier: Apache-2.0
"""Several ranks: each takes its share of every batch."""

import json
from pathlib import Path

import pytest
import torch
from refound.adapters.recipe import read_tune
from refound.adapters.tune import tune
from safetensors.torch import load_file

from ..ckpt.ranks import run_ranks
from ..export.models import decoder, write_model
from .test_tune import RECIPE

FILE = "adapter_model.safetensors"


def write_recipe(folder: Path, out: Path) -> Path:
    base = folder / "base"
    if not base.exists():
        write_model(base, decoder(layers=2, tied=True))
    file = folder / f"{out.name}.toml"
    file.write_text(RECIPE.format(base=base, out=out).replace("alpha = 8", "alpha = 8\ndropout = 0.0"))
    return file


def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    alone, together = (read_tune(write_recipe(tmp_path, tmp_path / name)) for name in ("alone", "together"))
    one = tune(alone, lambda line: None)
    found = run_ranks(tmp_path / "ranks", 2, lambda rank: tune(together, lambda line: None).after)
    assert found[0] == found[1] == pytest.approx(one.after, rel=1e-4)
    pair = [load_file(tmp_path / name / FILE) for name in ("alone", "together")]
    assert all(torch.allclose(pair[0][name], pair[1][name], atol=1e-3) for name in pair[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_two_ranks_weigh_tokens_as_one_does(weighted: bool, tmp_path: Path) -> None:
    """Completions of one token and of thirty: a mean of both ranks' means would be another one."""
    lines = [
        {"prompt": f"{n} = ", "completion": "y" if n % 2 else "x z " * 15, "wrong": "q" if n % 2 else "x z " * 14 + "q"}
        for n in range(9)
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [f"data.sources=['{file}']", "data.length=64", "data.held_out=1", "train.batch=2", "train.steps=4"]
    settings.append(f"loss.fait.enabled={str(weighted).lower()}")
    alone, together = (read_tune(write_recipe(tmp_path, tmp_path / name), settings) for name in ("alone", "together"))
    said: list[str] = []
    tune(alone, said.append)

    def rank(number: int) -> list[str]:
        told: list[str] = []
        tune(together, told.append)
        return told

    found = run_ranks(tmp_path / "ranks", 2, rank)
    assert found[0] == found[1] and [losses(lines) for lines in found] == [pytest.approx(losses(said), abs=2e-3)] * 2


def losses(lines: list[str]) -> list[float]:
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("step ")]
