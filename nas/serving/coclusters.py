# SPDX-License-Identifier: Apache-2.0
"""Token ids and experts grouped together, so that a token starts where its experts are (Speculative MoE 2503.04398).

A table says for each token id on which device its hidden state shall live; experts are placed so that most of what a
device's tokens ask for is on it. Both sides are found in turn: with the tokens held, each layer's experts are a linear
assignment (what each device's tokens ask of each expert); with the experts held, token ids go where most of their
experts are, those with the most to lose first, until a device has its share. The paper searches by cross-entropy
sampling. *Local* is an activation whose expert lies on the device of its token; nothing is sent for it.
"""

from dataclasses import dataclass

import numpy as np

from .placement import assign, capacities, contiguous


@dataclass(frozen=True, kw_only=True, eq=False)
class Coclusters:
    """The table and the placement that belong together."""

    ids: np.ndarray
    """Token ids that were seen, ascending: (n,) int64."""
    home: np.ndarray
    """The device of each of these: (n,) int64."""
    device_of: np.ndarray
    """(layers, experts) int64."""
    devices: int

    def home_of(self, tokens: np.ndarray) -> np.ndarray:
        """The device of each token: by the table, and by the id's remainder where it was never seen."""
        place = np.searchsorted(self.ids, tokens).clip(max=max(len(self.ids) - 1, 0))
        other = tokens.astype(np.int64) % self.devices
        if not len(self.ids):
            return other
        return np.where(self.ids[place] == tokens, self.home[place], other)


@dataclass(frozen=True, kw_only=True)
class Locality:
    """What a table and a placement do to a trace."""

    local: float
    """Share of activations, 0 to 1."""
    imbalance: float
    """Tokens of the busiest device by the mean."""

    def to_json(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.__dict__.items()}


def locality_of(experts: np.ndarray, home: np.ndarray, device_of: np.ndarray, devices: int) -> Locality:
    """experts: (layers, tokens, top_k). home: (tokens,). device_of: (layers, experts)."""
    local = [float((device_of[layer][chosen] == home[:, None]).mean()) for layer, chosen in enumerate(experts)]
    load = np.bincount(home, minlength=devices)
    return Locality(local=float(np.mean(local)), imbalance=float(load.max() / load.mean()))


def cocluster(
    experts: np.ndarray,
    tokens: np.ndarray,
    count: int,
    devices: int,
    *,
    start: np.ndarray | None = None,
    slack: float = 0.1,
    rounds: int = 12,
) -> Coclusters:
    """The best of two starts: the placement `start` (layers, experts), and that of the engines.

    slack: how much more than its share of the tokens a device may get.

    Raises:
        PlanError: if there are fewer experts than devices.
    """
    capacity, layers = capacities(count, devices), len(experts)
    ids, row_of = np.unique(tokens, return_inverse=True)
    asked = _asked(experts, row_of, len(ids), count)
    weights = np.bincount(row_of, minlength=len(ids))
    best, best_local = None, -1.0
    first = [contiguous(layers, capacity)] if start is None else [start, contiguous(layers, capacity)]
    for device_of in first:
        for _ in range(rounds):
            home = _homes(asked @ _ones(device_of, devices), weights, slack)
            device_of = _experts_near(asked, home, layers, capacity)
            local = float((asked @ _ones(device_of, devices))[np.arange(len(ids)), home].sum())
            if local <= best_local + 0.5:
                break
            best, best_local = (home, device_of), local
    assert best is not None
    return Coclusters(ids=ids.astype(np.int64), home=best[0], device_of=best[1], devices=devices)


def _asked(experts: np.ndarray, row_of: np.ndarray, ids: int, count: int) -> "np.ndarray":
    """How often each token id asks for each expert: sparse (ids, layers * count)."""
    from scipy.sparse import csr_matrix

    layers, tokens, top_k = experts.shape
    columns = experts.astype(np.int64) + np.arange(layers)[:, None, None] * count
    rows = np.broadcast_to(row_of[None, :, None], (layers, tokens, top_k))
    ones = np.ones(experts.size)
    return csr_matrix((ones, (rows.ravel(), columns.ravel())), shape=(ids, layers * count))  # type: ignore[return-value]


def _ones(device_of: np.ndarray, devices: int) -> np.ndarray:
    found = np.zeros((device_of.size, devices))
    found[np.arange(device_of.size), device_of.ravel()] = 1.0
    return found


def _homes(local: np.ndarray, weights: np.ndarray, slack: float) -> np.ndarray:
    """A device for each token id. local: activations that each device would have, (ids, devices)."""
    devices = local.shape[1]
    room = np.full(devices, (1 + slack) * weights.sum() / devices)
    home = np.full(len(local), -1)
    sorted_local = np.sort(local, axis=1)
    regret = sorted_local[:, -1] - (sorted_local[:, -2] if devices > 1 else 0)
    for token in np.argsort(-regret, kind="stable"):
        fits = room >= weights[token]
        options = np.where(fits, local[token], -1.0) if fits.any() else room
        home[token] = int(options.argmax())
        room[home[token]] -= weights[token]
    return home


def _experts_near(asked: "np.ndarray", home: np.ndarray, layers: int, capacity: np.ndarray) -> np.ndarray:
    by_device = np.stack(
        [np.asarray(asked[home == device].sum(0)).ravel() for device in range(len(capacity))], axis=1
    ).reshape(layers, -1, len(capacity))
    return np.stack([assign(-layer, capacity) for layer in by_device])
