# SPDX-License-Identifier: Apache-2.0
"""The FFN of one dense layer at work on the calibration text, which splits, gates and refitting look at."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

CHUNK = 4096
"""Tokens at a time where more than one copy of the activations would be needed."""


def _held_windows(windows: int) -> int:
    return max(windows // 8, 1)


def fitted_windows(windows: int) -> int:
    """Of so many, how many are not held out."""
    return windows - _held_windows(windows) if windows > 1 else windows


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """Shapes: T tokens, H the hidden size, W the width of the FFN. All float32."""

    inputs: torch.Tensor
    """(T, H): what the FFN sees, after the norm."""
    gate: torch.Tensor
    """(W, H)"""
    up: torch.Tensor
    """(W, H)"""
    down: torch.Tensor
    """(H, W)"""
    domain: torch.Tensor
    """(T,) int64: which text a token is of."""
    windows: int
    """Windows that the tokens are of; each has as many."""
    gradients: torch.Tensor | None = None
    """(windows, W): Σ |h · ∂loss/∂h| over the tokens of each window; only where a split needs it."""

    @cached_property
    def channels(self) -> torch.Tensor:
        """(T, W): what goes into the down projection."""
        parts = self.inputs.split(CHUNK)
        return torch.cat([functional.silu(part @ self.gate.T) * (part @ self.up.T) for part in parts])

    @cached_property
    def energy(self) -> torch.Tensor:
        """(T, W): the share of each channel in Σ_i ‖W_d[:, i] h_i‖², so that every token counts alike."""
        found = self.channels.square()
        found *= self.down.square().sum(0)
        found /= found.sum(1, keepdim=True).clamp_min(1e-30)
        return found

    @cached_property
    def held(self) -> slice:
        """Tokens of the last eighth of the windows: nothing is fitted to them."""
        each = len(self.inputs) // self.windows
        return slice(len(self.inputs) - _held_windows(self.windows) * each, len(self.inputs))

    @property
    def fit_windows(self) -> slice:
        """The windows of `fit`, for what is known by window."""
        return slice(0, fitted_windows(self.windows))

    @property
    def fit(self) -> slice:
        """The other tokens; all, where there is one window."""
        return slice(0, self.held.start) if self.windows > 1 else self.held
