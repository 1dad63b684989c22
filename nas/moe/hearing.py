# SPDX-License-Identifier: Apache-2.0
"""What a carved model's experts and gates do on a text: output energies, choices, and loads."""

from typing import Any

import torch

from .calibration import listening
from .gates import DEAD
from .module import mixtures

_BATCH = 4
"""Windows at a time."""


def oracle_energy(child: Any, windows: torch.Tensor) -> torch.Tensor:
    """The output energy of every expert, (n, length, layers, E) float32, as shares, in the model as it runs."""
    own, found = mixtures(child), []
    places = [index for index, layer in enumerate(child.model.layers) if layer.mlp in own]
    for ids in windows.split(_BATCH):
        with torch.no_grad(), listening(child) as heard:
            child.model(input_ids=ids, use_cache=False)
            layers = [mixture.output_energy(heard[place]) for mixture, place in zip(own, places, strict=True)]
        energy = torch.stack(layers, 2)
        found.append(energy / energy.sum(-1, keepdim=True).clamp_min(1e-30))
    return torch.cat(found)


def gate_choice(child: Any, windows: torch.Tensor) -> torch.Tensor:
    """What the layers' own gates take, (n, length, layers, k), in the model as it runs."""
    own, found = mixtures(child), []
    places = [index for index, layer in enumerate(child.model.layers) if layer.mlp in own]
    for ids in windows.split(_BATCH):
        with torch.no_grad(), listening(child) as heard:
            child.model(input_ids=ids, use_cache=False)
            layers = [mixture.choice(heard[place]) for mixture, place in zip(own, places, strict=True)]
        found.append(torch.stack(layers, 2))
    return torch.cat(found)


def loads(child: Any, windows: torch.Tensor) -> list[dict[str, list[Any]]]:
    """By layer with experts: `load_after`, how often each is chosen as a multiple of an equal load, and `dead_after`,
    those that are chosen less often than `gates.DEAD` of it."""
    chosen, found = gate_choice(child, windows), []
    for layer, mixture in enumerate(mixtures(child)):
        taken = chosen[:, :, layer].flatten()
        load = (torch.bincount(taken, minlength=mixture.experts) * mixture.experts / taken.numel()).tolist()
        found.append({"load_after": load, "dead_after": [e for e, one in enumerate(load) if one < DEAD]})
    return found
