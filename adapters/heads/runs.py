# SPDX-License-Identifier: Apache-2.0
"""How many guesses in a row are right, from where each single guess is."""

import torch


def run_lengths(right: torch.Tensor, most: int) -> torch.Tensor:
    """right: (windows, length) of bool. Of every place from which `most` guesses can be followed: how many in a row are
    right, at most `most`; (places,) of int64. Empty if windows are shorter."""
    count = right.shape[1] - most + 1
    if count < 1:
        return torch.zeros(0, dtype=torch.int64)
    ahead = torch.stack([right[:, start : start + count] for start in range(most)]).long()
    return ahead.cumprod(0).sum(0).flatten()


def expected_of_chain(lengths: torch.Tensor) -> float:
    """The mean; 0 if there are none."""
    return lengths.double().mean().item() if len(lengths) else 0.0
