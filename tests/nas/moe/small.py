# SPDX-License-Identifier: Apache-2.0
"""Tiny dense models, layers at work, and carvings that are done in a second, for the tests of mixtures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from refound.nas.moe.config import CarveConfig, RouterTraining
from refound.nas.moe.evidence import LayerEvidence

from ...export.models import decoder, write_model


def dense(folder: Path, family: str = "llama", layers: int = 2, **changes: Any) -> Path:
    """A random model of `family` with FFNs of 96 channels."""
    return write_model(folder, decoder(family, layers=layers, **changes))


def config(model: Path, out: Path, **changes: Any) -> CarveConfig:
    base = CarveConfig(
        model=model,
        out=out,
        experts=6,
        active=2,
        sources=("python-docs", "python-source"),
        tokens=32 * 16,
        length=32,
        router=RouterTraining(steps=30, batch=128),
        held_out=4,
    )
    return replace(base, **changes)


def evidence(width: int = 48, hidden: int = 16, windows: int = 12, length: int = 16, seed: int = 0) -> LayerEvidence:
    """A random layer on inputs in which much follows from little: they have four dimensions, and some noise."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    return LayerEvidence(
        inputs=normal(windows * length, 4) @ normal(4, hidden) / 2 + 0.1 * normal(windows * length, hidden),
        gate=normal(width, hidden) / 4,
        up=normal(width, hidden) / 4,
        down=normal(hidden, width) / 7,
        domain=(torch.arange(windows) % 2).repeat_interleave(length),
        windows=windows,
        gradients=normal(windows, width).abs(),
    )


def planted(groups: int = 4, each: int = 12, hidden: int = 32, tokens: int = 480) -> tuple[LayerEvidence, torch.Tensor]:
    """A layer of `groups` kinds of tokens, each with channels of its own that work for it alone: (the layer, the
    kind of each channel). Channels of a kind are scattered."""
    draw = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=draw)).Q
    kind = torch.randint(groups, (tokens,), generator=draw)
    inputs = 4 * basis[kind] + 0.1 * torch.randn(tokens, hidden, generator=draw)
    owner = torch.arange(groups * each)[torch.randperm(groups * each, generator=draw)] % groups
    gate = basis[owner] + 0.01 * torch.randn(groups * each, hidden, generator=draw)
    return (
        LayerEvidence(
            inputs=inputs,
            gate=gate,
            up=gate.clone(),
            down=torch.randn(hidden, groups * each, generator=draw),
            domain=kind,
            windows=tokens // 16,
        ),
        owner,
    )
