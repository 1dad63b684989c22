# SPDX-License-Identifier: Apache-2.0
"""Several ranks: each takes its share of every batch."""

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
