# SPDX-License-Identifier: Apache-2.0
"""Routing that was made up, for tests of what holds whatever the routing is."""

import numpy as np


def chained(
    *, layers: int, experts: int, tokens: int, faith: float, seed: int, top_k: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(experts (layers, tokens, top_k) int16, tokens int32): from an expert most tokens go on to its successor.

    The successor is another permutation in each layer; of the first layer's experts, the token's id knows the first.
    """
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 2 * experts, tokens).astype(np.int32)
    found = np.empty((layers, tokens, top_k), np.int16)
    for token in range(tokens):
        found[0, token] = (ids[token] + np.arange(top_k) * 3) % experts
    for layer in range(1, layers):
        follows = draw.permutation(experts)
        for token in range(tokens):
            if draw.random() < faith:
                found[layer, token] = follows[found[layer - 1, token]]
            else:
                found[layer, token] = draw.choice(experts, top_k, replace=False)
    return found, ids
