# SPDX-License-Identifier: Apache-2.0
"""A placement whose devices share the work: experts change places until no device is busier than it may be.

Hops are fewest where the experts that are taken most lie together, and then one device does most of the work. So a
layer's busiest device may have as many tokens as the busiest has with the experts in their order, or a tenth more than
the mean, whichever is more. Pairs of experts of one layer change places: first those that cost least for what they take
off the busiest device, then those that save hops and keep to the limit. Within a layer costs do not depend on each
other, so a swap's cost is exact.
"""

import numpy as np

from .placement import contiguous, cost_of, layer_costs

_MARGIN = 1.1


def limits_of(load: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """How many tokens the busiest device of each layer may have: (layers,). load: (layers, experts)."""
    usual = contiguous(len(load), capacity)
    busiest = [np.bincount(row, weights=tokens).max() for row, tokens in zip(usual, load, strict=True)]
    return np.maximum(busiest, _MARGIN * load.sum(1) / len(capacity))


def balanced(
    device_of: np.ndarray, affinity: np.ndarray, distance: np.ndarray, load: np.ndarray, capacity: np.ndarray
) -> np.ndarray:
    """A placement within the limits that costs little more than `device_of`, and no more than the engines' order."""
    found, limits = device_of.copy(), limits_of(load, capacity)
    layers = len(found)
    for layer in range(layers):
        _unload(found, layer, layer_costs(found, layer, affinity, distance), load[layer], limits[layer])
    for _ in range(10):
        changed = [
            _improve(found, layer, layer_costs(found, layer, affinity, distance), load[layer], limits[layer])
            for layer in range(layers)
        ]
        if not any(changed):
            break
    usual = contiguous(layers, capacity)
    over = any(_loads(found[layer], load[layer], len(distance)).max() > limits[layer] for layer in range(layers))
    # Swaps may end where no single one helps; the engines' order is within the limits by their making.
    if over or cost_of(found, affinity, distance) > cost_of(usual, affinity, distance):
        return usual
    return found


def _loads(row: np.ndarray, load: np.ndarray, devices: int) -> np.ndarray:
    return np.bincount(row, weights=load, minlength=devices)


def _swaps(row: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """What it costs that two experts change places: (experts, experts)."""
    here = costs[np.arange(len(row)), row]
    return costs[:, row] + costs[:, row].T - here[:, None] - here[None, :]


def _unload(found: np.ndarray, layer: int, costs: np.ndarray, load: np.ndarray, limit: float) -> None:
    row, devices = found[layer], costs.shape[1]
    for _ in range(len(row) ** 2):
        loads = _loads(row, load, devices)
        busiest = int(loads.argmax())
        if loads[busiest] <= limit:
            return
        less = load[:, None] - load[None, :]  # what the first's device is rid of
        after = loads[row][None, :] + less
        fits = (row == busiest)[:, None] & (row != busiest)[None, :] & (less > 0) & (after < loads[busiest])
        if not fits.any():
            return
        gain = np.minimum(less, loads[busiest] - limit)
        price = np.where(fits, (_swaps(row, costs) + 1e-9) / np.where(fits, gain, 1.0), np.inf)
        first, second = np.unravel_index(int(price.argmin()), price.shape)
        row[first], row[second] = row[second], row[first]


def _improve(found: np.ndarray, layer: int, costs: np.ndarray, load: np.ndarray, limit: float) -> bool:
    row, devices, changed = found[layer], costs.shape[1], False
    for _ in range(len(row) ** 2):
        loads, less = _loads(row, load, devices), load[:, None] - load[None, :]
        fits = (loads[row][None, :] + less <= limit) & (loads[row][:, None] - less <= limit)
        price = np.where(fits & (row[:, None] != row[None, :]), _swaps(row, costs), np.inf)
        if price.min() >= -1e-9 * max(float(np.abs(costs).max()), 1.0):
            return changed
        first, second = np.unravel_index(int(price.argmin()), price.shape)
        row[first], row[second] = row[second], row[first]
        changed = True
    return changed
