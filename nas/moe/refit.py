# SPDX-License-Identifier: Apache-2.0
"""The down projection fitted anew to what the gate leaves active.

A token that takes k experts misses what the others would have added. Part of that can be told from what is there: with
b the channels as the mixture weighs them, W' minimizes ‖W_d h - W' b‖² over tokens, a ridge regression towards W_d
(`nas.ridge`). Mixtures with all experts active miss nothing, and are left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ridge import Grams
from .evidence import CHUNK, LayerEvidence
from .gates import expert_weights
from .layouts import Layout
from .splits import LayerSplit


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """A down projection in the split's order, and ‖W_d h - W b‖² / ‖W_d h‖² on tokens that it was not fitted to."""

    down: torch.Tensor
    """(H, P), not yet multiplied by the layout's scale."""
    before: float
    after: float


def refit(
    seen: LayerEvidence, split: LayerSplit, router: torch.Tensor, layout: Layout, ridges: Sequence[float]
) -> Refitted:
    """The best on held-out tokens of W_d itself and one refitting for each of `ridges`. router: (E, H)."""
    own = seen.down[:, torch.tensor(split.order)]
    held = _grams(seen, split, router, layout, seen.held)
    before = held.error(own)
    best, least = own, before
    if ridges:
        fit = _grams(seen, split, router, layout, seen.fit)
        for ridge in ridges:
            found = fit.solve(ridge, own)
            if (error := held.error(found)) < least:
                best, least = found.float(), error
    return Refitted(down=best, before=before, after=least)


def _grams(seen: LayerEvidence, split: LayerSplit, router: torch.Tensor, layout: Layout, tokens: slice) -> Grams:
    order, shape = torch.tensor(split.order), layout.shape
    grams = Grams()
    for inputs, channels in zip(seen.inputs[tokens].split(CHUNK), seen.channels[tokens].split(CHUNK), strict=True):
        weights, _ = expert_weights(inputs @ router.T, shape.top_k, normalized=layout.normalized)
        each = (weights * layout.scale).repeat_interleave(shape.expert_width, 1)
        seen_by_all = torch.ones(len(inputs), shape.shared)
        grams.add(channels[:, order] * torch.cat([seen_by_all, each], 1), channels @ seen.down.T)
    return grams
