# SPDX-License-Identifier: Apache-2.0
"""How often one expert follows another, and what a placement makes of it.

A trace's routing is `experts` (layers, tokens, top_k), int, each token's k experts of a layer all different. A *hop* is
a pair of one token: an expert of layer l and one of layer l + 1. A token whose k experts work in k places counts
k x k pairs, each as 1 / k², so that a token makes one hop from layer to layer; with k = 1 that is ExFlow's count
(2401.08383), where the token itself moves. A hop crosses devices if its two experts lie on different ones.
"""

from dataclasses import dataclass

import numpy as np


def affinity_of(experts: np.ndarray, count: int) -> np.ndarray:
    """Expected hops from expert i of layer l to expert j of layer l + 1: (layers - 1, count, count) float64."""
    layers, tokens, top_k = experts.shape
    found = np.zeros((max(layers - 1, 0), count * count))
    wide = experts.astype(np.int64)
    for layer in range(layers - 1):
        for first in range(top_k):
            for second in range(top_k):
                pairs = wide[layer, :, first] * count + wide[layer + 1, :, second]
                found[layer] += np.bincount(pairs, minlength=count * count)
    return found.reshape(-1, count, count) / (top_k * top_k) if tokens else found.reshape(-1, count, count)


def load_of(experts: np.ndarray, count: int) -> np.ndarray:
    """How many tokens each expert of each layer serves: (layers, count) int64."""
    return np.stack([np.bincount(layer.ravel(), minlength=count) for layer in experts])


@dataclass(frozen=True, kw_only=True)
class Hops:
    """What a placement does to a trace. Shares of all hops, 0 to 1."""

    cross_device: float
    cross_node: float
    messages: float
    """Hidden states that one token sends from device to device, from layer to layer on average: one for each ordered
    pair of different devices where it was and where it goes. What a device computed of the token is summed there."""
    imbalance: float
    """The busiest device's tokens by the mean, the worst layer's."""

    def to_json(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.__dict__.items()}


def hops_of(experts: np.ndarray, device_of: np.ndarray, node_of: np.ndarray) -> Hops:
    """device_of: (layers, experts) int. node_of: (devices,)."""
    layers, tokens, _ = experts.shape
    where = np.stack([device_of[layer][experts[layer]] for layer in range(layers)])  # (layers, tokens, top_k)
    devices, per_layer = len(node_of), []
    crossing = crossing_node = messages = 0.0
    for layer in range(layers - 1):
        before, after = where[layer][:, :, None], where[layer + 1][:, None, :]
        crossing += float((before != after).mean())
        crossing_node += float((node_of[before] != node_of[after]).mean())
        messages += float((_presence(where[layer], devices) * (_messages_to(where[layer + 1], devices))).sum()) / tokens
    for layer in range(layers):
        load = np.bincount(where[layer].ravel(), minlength=devices)
        per_layer.append(float(load.max() / load.mean()))
    steps = max(layers - 1, 1)
    return Hops(
        cross_device=crossing / steps,
        cross_node=crossing_node / steps,
        messages=messages / steps,
        imbalance=max(per_layer),
    )


def _presence(where: np.ndarray, devices: int) -> np.ndarray:
    """Whether a token has an expert on a device: (tokens, devices) bool."""
    found = np.zeros((len(where), devices), bool)
    found[np.arange(len(where))[:, None], where] = True
    return found


def _messages_to(where: np.ndarray, devices: int) -> np.ndarray:
    """Devices other than this one to which the token goes: (tokens, devices)."""
    present = _presence(where, devices)
    return present.sum(1, keepdims=True) - present
