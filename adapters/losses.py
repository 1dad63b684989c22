# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of the tokens that are learned, weighted by hooks that multiply.

A hook looks at a batch and at what the model says of it, and gives each token a weight. With weights of one the loss is
plain cross entropy, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .data import Batch
from .fait import Fait, fait_weights

Hook = Callable[[Any, Batch, torch.Tensor], torch.Tensor]
"""(model, batch, logits) to (batch, length) weights, without gradients."""


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    """(batch, length, vocabulary)"""
    return model(input_ids=batch.ids, attention_mask=batch.attention).logits


def token_loss(
    model: Any, batch: Batch, hooks: Sequence[Hook] = (), *, normalize: bool = True, together: bool = False
) -> torch.Tensor:
    """The mean over the tokens that are learned.

    normalize: scale the weights so that they sum to the number of these tokens.
    together: of the tokens in the batches of all ranks, what this rank's add to their mean. All ranks must call it.
    """
    logits = logits_of(model, batch)
    mask = batch.learn[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][mask].float(), batch.ids[:, 1:][mask], reduction="none")
    learned = mask.sum()
    if together:
        learned = _over_ranks(learned)
    if hooks:
        weights = torch.ones_like(batch.weights)
        for hook in hooks:
            weights = weights * hook(model, batch, logits)
        chosen = weights[:, 1:][mask]
        if normalize:
            total = _over_ranks(chosen.sum()) if together else chosen.sum()
            chosen = chosen * (learned / total)  # a number by a tensor would be its reciprocal, rounded
        losses = losses * chosen
    return losses.sum() / learned


def _over_ranks(number: torch.Tensor) -> torch.Tensor:
    """Their sum."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(number)
    return number


def static_weights(model: Any, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """What the data says of its tokens; see `transforms`."""
    return batch.weights


def fait_hook(settings: Fait) -> Hook:
    """FAIT's weights; one more forward pass without gradients where they follow the model."""

    def hook(model: Any, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        other = None
        if batch.wrong is not None and settings.dynamic:
            with torch.no_grad():
                other = logits_of(model, batch.wrong)
        return fait_weights(settings, batch, logits, other)

    return hook
