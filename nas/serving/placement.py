# SPDX-License-Identifier: Apache-2.0
"""Which expert lies on which device: fewest costly hops from layer to layer, as many experts on each device as before.

The cost of a placement p is Σ_l Σ_ij A_l[i, j] D[p_l(i), p_l+1(j)]: A from `affinity_of`, D what a hop between two
devices costs, so that nodes and GPUs are one problem. ExFlow (2401.08383) solves it as an integer programme with a
binary for every token and step. With all layers but one held, that layer is a linear assignment of experts to slots,
solved exactly; sweeps over the layers go on until none helps. A second move relabels the devices of all layers from
one on, by a permutation that leaves D as it is. Several starts, the contiguous placement of the engines among them,
so the result is never worse than that on the affinity it was made from. Where the placements of a single layer are
few, the chain of layers is solved exactly instead (dynamic programming over placements).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from .errors import PlanError

EXACT_STATES = 2600
"""Placements of one layer up to which the exact method is used: 8 experts on 4 devices are 2,520."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """A device for each expert of each layer."""

    device_of: np.ndarray
    """(layers, experts) int64."""
    cost: float
    """On the affinity it was made from."""
    is_optimal: bool
    """No placement costs less, on that affinity."""


def capacities(experts: int, devices: int) -> np.ndarray:
    """Experts of a layer on each device, as vLLM shares them out: the first ones have one more. (devices,)

    Raises:
        PlanError: if there are fewer experts than devices.
    """
    if experts < devices:
        raise PlanError(
            f"{experts} experts cannot be shared out over {devices} devices: some would have none. Plan for at most "
            f"{experts} devices"
        )
    base, more = divmod(experts, devices)
    return np.array([base + (device < more) for device in range(devices)])


def contiguous(layers: int, capacity: np.ndarray) -> np.ndarray:
    """What engines do by themselves: experts in their order, (layers, experts)."""
    return np.tile(np.repeat(np.arange(len(capacity)), capacity), (layers, 1))


def cost_of(device_of: np.ndarray, affinity: np.ndarray, distance: np.ndarray) -> float:
    total = 0.0
    for layer, hops in enumerate(affinity):
        total += float((hops * distance[device_of[layer][:, None], device_of[layer + 1][None, :]]).sum())
    return total


def place(affinity: np.ndarray, distance: np.ndarray, *, starts: int = 8, seed: int = 0) -> Placement:
    """The best placement that was found. affinity: (layers - 1, E, E). distance: (devices, devices), symmetric.

    Raises:
        PlanError: if there are fewer experts than devices.
    """
    capacity = capacities(affinity.shape[1], len(distance))
    if states_of(capacity) <= EXACT_STATES:
        return exact(affinity, distance, capacity)
    return sweep(affinity, distance, capacity, starts=starts, seed=seed)


def sweep(
    affinity: np.ndarray, distance: np.ndarray, capacity: np.ndarray, *, starts: int = 8, seed: int = 0
) -> Placement:
    """The best of what sweeps make of `starts` placements."""
    best, best_cost = contiguous(len(affinity) + 1, capacity), np.inf
    for start in _starts(affinity, distance, capacity, starts, seed):
        found = improve(start, affinity, distance, capacity)
        cost = cost_of(found, affinity, distance)
        if cost < best_cost:
            best, best_cost = found, cost
    return Placement(device_of=best, cost=best_cost, is_optimal=best_cost == 0)


def improve(start: np.ndarray, affinity: np.ndarray, distance: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Sweeps over the layers there and back, until one changes nothing for the better."""
    device_of, cost = start.copy(), cost_of(start, affinity, distance)
    layers = len(device_of)
    while True:
        for layer in [*range(layers), *range(layers - 2, -1, -1)]:
            _assign_layer(device_of, layer, affinity, distance, capacity)
        if len(set(capacity.tolist())) == 1:
            for layer in range(1, layers):
                _relabel_from(device_of, layer, affinity, distance)
        now = cost_of(device_of, affinity, distance)
        if now >= cost - 1e-9 * max(cost, 1.0):
            return device_of
        cost = now


def _assign_layer(
    device_of: np.ndarray, layer: int, affinity: np.ndarray, distance: np.ndarray, capacity: np.ndarray
) -> None:
    device_of[layer] = assign(layer_costs(device_of, layer, affinity, distance), capacity)


def layer_costs(device_of: np.ndarray, layer: int, affinity: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """What each expert of one layer costs on each device, all other layers held: (experts, devices)."""
    costs = np.zeros((device_of.shape[1], len(distance)))
    if layer > 0:
        costs += affinity[layer - 1].T @ distance[device_of[layer - 1]]
    if layer < len(device_of) - 1:
        costs += affinity[layer] @ distance[:, device_of[layer + 1]].T
    return costs


def assign(costs: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """The cheapest device for each row of `costs` (rows, devices), as many rows on each as it has room: (rows,)."""
    from scipy.optimize import linear_sum_assignment

    slots = np.repeat(np.arange(len(capacity)), capacity)
    rows, columns = linear_sum_assignment(costs[:, slots])
    found = np.empty(len(costs), np.int64)
    found[rows] = slots[columns]
    return found


def _relabel_from(device_of: np.ndarray, first: int, affinity: np.ndarray, distance: np.ndarray) -> None:
    """Renames the devices of all layers from `first` on: whole nodes change places, and GPUs within them."""
    from scipy.optimize import linear_sum_assignment

    devices, hops = len(distance), affinity[first - 1].T @ distance[device_of[first - 1]]  # (experts, devices)
    costs = np.zeros((devices, devices))
    np.add.at(costs, device_of[first], hops)
    size = _node_size(distance)
    nodes = devices // size
    between, within = np.zeros((nodes, nodes)), np.empty((nodes, nodes, size), np.int64)
    for old in range(nodes):
        for new in range(nodes):
            block = costs[old * size : (old + 1) * size, new * size : (new + 1) * size]
            rows, columns = linear_sum_assignment(block)
            between[old, new], within[old, new] = block[rows, columns].sum(), columns
    _, chosen = linear_sum_assignment(between)
    renamed = np.concatenate([new * size + within[old, new] for old, new in enumerate(chosen)])
    if costs[np.arange(devices), renamed].sum() < np.trace(costs) - 1e-12:
        device_of[first:] = renamed[device_of[first:]]


def _node_size(distance: np.ndarray) -> int:
    """Devices as near to the first as its nearest; nodes are alike and lie in order."""
    if len(distance) == 1:
        return 1
    return 1 + int((distance[0, 1:] <= distance[0, 1:].min()).sum())


def _starts(
    affinity: np.ndarray, distance: np.ndarray, capacity: np.ndarray, count: int, seed: int
) -> Iterator[np.ndarray]:
    """The engines' own, one by eigenvectors, and layer after layer from a first one that is drawn."""
    draw, layers = np.random.default_rng(seed), len(affinity) + 1
    first = contiguous(layers, capacity)
    yield first
    yield _spectral(affinity, layers, capacity, draw)
    for _ in range(max(count - 2, 0)):
        yield _followed(draw.permutation(first[0]), affinity, distance, capacity)


def _followed(first: np.ndarray, affinity: np.ndarray, distance: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Each layer as is best for what comes before it."""
    found = [first]
    for hops in affinity:
        found.append(assign(hops.T @ distance[found[-1]], capacity))
    return np.stack(found)


def _spectral(affinity: np.ndarray, layers: int, capacity: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Balanced k-means on the leading eigenvectors of the graph of all experts of all layers, normalized by degree."""
    from scipy.sparse import bmat, csr_matrix, diags
    from scipy.sparse.linalg import eigsh

    experts, devices = affinity.shape[1], len(capacity)
    size = layers * experts
    if layers < 2 or devices < 2 or size <= devices + 1:
        return contiguous(layers, capacity)
    blocks: list[list[object]] = [[None] * layers for _ in range(layers)]
    for layer in range(layers):
        blocks[layer][layer] = csr_matrix((experts, experts))
    for layer, hops in enumerate(affinity):
        blocks[layer][layer + 1], blocks[layer + 1][layer] = csr_matrix(hops), csr_matrix(hops.T)
    graph = bmat(blocks).tocsr()
    degree = np.asarray(graph.sum(1)).ravel()
    scale = diags(1 / np.sqrt(np.maximum(degree, 1e-12)))
    # The chain of layers has two sides, so eigenvalues come as ±; the largest positive ones tell groups that hold
    # together.
    _, vectors = eigsh(scale @ graph @ scale, k=devices, which="LA", v0=np.ones(size))
    rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    centres = rows[draw.choice(size, devices, replace=False)]
    found = contiguous(layers, capacity)
    for _ in range(8):
        for layer in range(layers):
            found[layer] = assign(-rows[layer * experts : (layer + 1) * experts] @ centres.T, capacity)
        centres = np.stack([rows[found.ravel() == device].mean(0) for device in range(devices)])
    return found


# --- exact ---------------------------------------------------------------------------------------------------------


def states_of(capacity: np.ndarray) -> int:
    """How many placements one layer has."""
    left, count = int(capacity.sum()), 1
    for size in capacity.tolist():
        count *= comb(left, size)
        left -= size
    return count


def exact(affinity: np.ndarray, distance: np.ndarray, capacity: np.ndarray) -> Placement:
    """The optimum, by dynamic programming over all placements of a layer: for few experts only."""
    states = np.array(list(_all_states(int(capacity.sum()), capacity.tolist())))
    experts, devices = states.shape[1], len(capacity)
    ones = np.zeros((len(states), experts * devices))
    ones[np.arange(len(states))[:, None], np.arange(experts) * devices + states] = 1.0
    cost, back = np.zeros(len(states)), []
    for hops in affinity:
        # to_reach[s, q]: what the hops from state s to state q cost
        price = np.einsum("ij,sig->sjg", hops, distance[states]).reshape(len(states), -1)
        total = cost[:, None] + price @ ones.T
        back.append(total.argmin(0))
        cost = total[back[-1], np.arange(len(states))]
    state = int(cost.argmin())
    chosen = [state]
    for came_from in reversed(back):
        chosen.append(int(came_from[chosen[-1]]))
    device_of = states[chosen[::-1]].astype(np.int64)
    return Placement(device_of=device_of, cost=cost_of(device_of, affinity, distance), is_optimal=True)


def _all_states(experts: int, sizes: list[int]) -> Iterator[list[int]]:
    def fill(device: int, free: tuple[int, ...], state: list[int]) -> Iterator[list[int]]:
        if device == len(sizes):
            yield state.copy()
            return
        for taken in combinations(free, sizes[device]):
            for expert in taken:
                state[expert] = device
            yield from fill(device + 1, tuple(e for e in free if e not in taken), state)

    yield from fill(0, tuple(range(experts)), [0] * experts)
