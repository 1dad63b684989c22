# SPDX-License-Identifier: Apache-2.0
"""Two ranks train what one does: each its share of every batch, gradients averaged, own text said by turns."""

from dataclasses import replace
from pathlib import Path

import torch
from refound.adapters.heads.run import run_heads
from refound.adapters.heads.settings import HeadsConfig, MedusaSettings
from refound.export.medusa import read_medusa
from safetensors.torch import load_file

from ...ckpt.ranks import run_ranks
from .small import foreseeable

SETTINGS = MedusaSettings(
    tokens=480, length=24, batch=4, lr=1e-2, prompt=8, held_out=8, heads=2, save_every=100, measured=0, nodes=2
)


def train(base: Path, out: Path, settings: MedusaSettings) -> None:
    run_heads(HeadsConfig(model=base, kind="medusa", out=out, settings=settings), lambda _: None)


def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    base = foreseeable(tmp_path / "model", 2)
    train(base, tmp_path / "one", SETTINGS)
    run_ranks(tmp_path / "ranks", 2, lambda rank: train(base, tmp_path / "two", SETTINGS))
    one, two = (read_medusa(tmp_path / name / "heads") for name in ("one", "two"))
    for a, b in zip(one.heads, two.heads, strict=True):
        assert torch.allclose(a.weights[0], b.weights[0], atol=1e-3) and a.weights[0].abs().max() > 0.01


def test_two_ranks_move_the_model_as_one_does(tmp_path: Path) -> None:
    """AdamW's first steps are its longest: what waits while heads are trained alone must not be counted as a step."""
    settings = replace(SETTINGS, joint=True, joint_after=0.6, joint_lr=1e-3)
    base = foreseeable(tmp_path / "model", 2)
    train(base, tmp_path / "one", settings)
    run_ranks(tmp_path / "ranks", 2, lambda rank: train(base, tmp_path / "two", settings))
    before = load_file(base / "model.safetensors")
    one, two = (load_file(tmp_path / name / "base" / "model.safetensors") for name in ("one", "two"))
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        moved = (one[name] - before[name]).abs().mean()
        assert moved > 1e-4 and (two[name] - one[name]).abs().mean() < 0.1 * moved
