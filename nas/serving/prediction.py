# SPDX-License-Identifier: Apache-2.0
"""Which experts a token will take, said before it gets there (ExpertFlow 2410.17954; EdgeMoE 2308.14352 preloads so).

Tables counted on a trace: how often experts are taken at all, by this token's id, by the id before it, by the experts
that the token before took in the same layer, and by those that this token took one layer earlier. The first three are
known of every token of a prompt (*queue*), the fourth before a token's first layer (*ahead*), the last as it goes
(*path*). A guess is the sum of logarithms of shares,
each by a weight that is chosen on a part of the trace that the tables were not counted on. ExpertFlow trains a small
transformer on token ids for the same end; tables need no training and no torch, and are a bar that one has to pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from .affinity import load_of
from .errors import MismatchError

Known = Literal["queue", "ahead", "path"]
_FEATURES: dict[Known, tuple[str, ...]] = {
    "queue": ("id", "id_before"),
    "ahead": ("id", "id_before", "token_before"),
    "path": ("id", "id_before", "token_before", "layer_before"),
}
_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
_MOST_IDS = 8192
"""Ids with a row of their own, the most frequent ones; others go by what is taken at all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """Tables of shares. E experts a layer, L layers, n ids; the last row of `by_id` stands for all other ids."""

    ids: np.ndarray
    """(n,) ascending."""
    marginal: np.ndarray
    """(L, E): shares that sum to 1 in a layer."""
    by_id: np.ndarray
    """(n + 1, L, E), given this token's id."""
    by_id_before: np.ndarray
    """(n + 1, L, E), given the id before it."""
    by_token_before: np.ndarray
    """(L, E, E), given an expert that the token before took in the layer."""
    by_layer_before: np.ndarray
    """(L, E, E), given an expert that the token took a layer earlier; of layer 0 the marginal."""
    weights: Mapping[str, Mapping[str, float]] = field(hash=False)
    """Of each feature, for `queue`, `ahead` and `path`."""

    def scores(self, experts: np.ndarray, tokens: np.ndarray, starts: np.ndarray, known: Known) -> np.ndarray:
        """How likely each expert is, as a logarithm up to a constant: (layers, tokens, E) float32.

        Of `experts` (layers, tokens, top_k) only what is known at each point is looked at.
        """
        return np.stack([self._of_layer(layer, experts, tokens, starts, known) for layer in range(len(experts))])

    def _of_layer(
        self, layer: int, experts: np.ndarray, tokens: np.ndarray, starts: np.ndarray, known: Known
    ) -> np.ndarray:
        total = np.log(self.marginal[layer]).astype(np.float32)[None, :].repeat(len(tokens), axis=0)
        for name, weight in self.weights[known].items():
            if weight:
                total += np.float32(weight) * _feature(self, name, layer, experts, tokens, starts)
        return total

    def guess(
        self, experts: np.ndarray, tokens: np.ndarray, starts: np.ndarray, known: Known, candidates: int
    ) -> np.ndarray:
        """The likeliest experts, best first: (layers, tokens, candidates) int16. A layer at a time is in memory."""
        found = np.empty((len(experts), len(tokens), candidates), np.int16)
        for layer in range(len(experts)):
            scores = self._of_layer(layer, experts, tokens, starts, known)
            found[layer] = np.argsort(-scores, axis=1, kind="stable")[:, :candidates]
        return found


def hit_rate(guessed: np.ndarray, experts: np.ndarray) -> float:
    """Share of the experts taken that were among those guessed. (layers, tokens, candidates), (…, top_k)."""
    hits = sum(_hits(row, taken) for row, taken in zip(guessed, experts, strict=True))
    return hits / experts.size


def _hits(guessed: np.ndarray, taken: np.ndarray) -> int:
    return int((taken[:, :, None] == guessed[:, None, :]).any(2).sum())


def marginal_guess(marginal: np.ndarray, tokens: int, candidates: int) -> np.ndarray:
    """The baseline: always the experts that are taken most."""
    best = np.argsort(-marginal, axis=1, kind="stable")[:, :candidates]
    return np.broadcast_to(best[:, None, :], (len(marginal), tokens, candidates))


def fit(experts: np.ndarray, tokens: np.ndarray, starts: np.ndarray, count: int) -> Predictor:
    """Tables counted on the first three quarters of the sequences, weights chosen on the last, then counted on all."""
    sequences = len(starts) - 1
    inner = int(starts[max(sequences * 3 // 4, 1)]) if sequences > 1 else len(tokens) * 3 // 4
    tables = _count(experts[:, :inner], tokens[:inner], _within(starts, 0, inner), count)
    held = (experts[:, inner:], tokens[inner:], _within(starts, inner, len(tokens)))
    weights = {known: _choose(tables, names, *held) for known, names in _FEATURES.items()} if len(held[1]) else {}
    return _count(experts, tokens, starts, count, weights)


def _within(starts: np.ndarray, first: int, last: int) -> np.ndarray:
    """Where sequences begin in a part of the trace."""
    inside = starts[(starts > first) & (starts < last)] - first
    return np.concatenate([[0], inside, [last - first]]).astype(np.int64)


def _choose(tables: Predictor, names: tuple[str, ...], *held: np.ndarray) -> dict[str, float]:
    """Weights with the most hits, one feature after the other, twice around. A layer's features are in memory."""
    experts, tokens, _ = held
    top_k, weights = experts.shape[2], dict.fromkeys(names, 0.0)
    marginal = np.log(tables.marginal).astype(np.float32)

    def best_of(name: str) -> float:
        hits = np.zeros(len(_WEIGHTS), np.int64)
        for layer in range(len(experts)):
            base = marginal[layer][None, :].repeat(len(tokens), axis=0)
            for other, weight in weights.items():
                if weight and other != name:
                    base += np.float32(weight) * _feature(tables, other, layer, *held)
            feature = _feature(tables, name, layer, *held)
            for place, weight in enumerate(_WEIGHTS):
                top = np.argpartition(-(base + np.float32(weight) * feature), top_k - 1, axis=1)[:, :top_k]
                hits[place] += _hits(top, experts[layer])
        return _WEIGHTS[int(hits.argmax())]

    for _ in range(2):
        for name in names:
            weights[name] = best_of(name)
    return weights


def _feature(
    tables: Predictor, name: str, layer: int, experts: np.ndarray, tokens: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """log of the share given what is known, less that of the share at all: (tokens, E) float32."""
    before, marginal = np.arange(len(tokens)) - 1, tables.marginal[layer]
    if name in ("id", "id_before"):
        table = tables.by_id if name == "id" else tables.by_id_before
        row = _rows(tables.ids, tokens if name == "id" else tokens[before])
        if name == "id_before":
            row = np.where(_first(tokens, starts), len(tables.ids), row)
        share = table[row, layer]
    elif name == "token_before":
        given = _mean_rows(tables.by_token_before[layer], experts[layer][before])
        share = np.where(_first(tokens, starts)[:, None], marginal, given)
    elif layer:
        share = _mean_rows(tables.by_layer_before[layer], experts[layer - 1])
    else:
        share = marginal[None, :].repeat(len(tokens), axis=0)
    return (np.log(share) - np.log(marginal)).astype(np.float32)


def _first(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Which tokens begin a sequence: (tokens,) bool."""
    return np.isin(np.arange(len(tokens)), starts)


def _mean_rows(table: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The mean of the rows (E) that each token's experts name: (tokens, E)."""
    total = table[given[:, 0]].astype(np.float32)
    for column in given[:, 1:].T:
        total += table[column]
    return total / given.shape[1]


def _rows(ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    place = np.searchsorted(ids, tokens).clip(max=max(len(ids) - 1, 0))
    return np.where(ids[place] == tokens, place, len(ids)) if len(ids) else np.zeros(len(tokens), np.int64)


def _count(
    experts: np.ndarray,
    tokens: np.ndarray,
    starts: np.ndarray,
    count: int,
    weights: Mapping[str, Mapping[str, float]] | None = None,
) -> Predictor:
    layers = len(experts)
    load = load_of(experts, count) + 0.5
    marginal = load / load.sum(1, keepdims=True)
    seen, often = np.unique(tokens, return_counts=True)
    ids = np.sort(seen[np.argsort(-often, kind="stable")[:_MOST_IDS]]).astype(np.int64)
    row, inside = _rows(ids, tokens), ~np.isin(np.arange(len(tokens)), starts)
    before = np.arange(len(tokens)) - 1
    by_id = _by_row(experts, row, len(ids), marginal)
    by_id_before = _by_row(experts[:, inside], row[before][inside], len(ids), marginal)
    by_token, by_layer = np.empty((layers, count, count)), np.empty((layers, count, count))
    by_layer[0] = marginal[0]
    for layer in range(layers):
        by_token[layer] = _by_expert(experts[layer, before][inside], experts[layer, inside], marginal[layer])
        if layer:
            by_layer[layer] = _by_expert(experts[layer - 1], experts[layer], marginal[layer])
    return Predictor(
        ids=ids,
        marginal=marginal,
        by_id=by_id,
        by_id_before=by_id_before,
        by_token_before=by_token,
        by_layer_before=by_layer,
        weights=weights or {known: dict.fromkeys(names, 1.0) for known, names in _FEATURES.items()},
    )


def _by_row(experts: np.ndarray, row: np.ndarray, rows: int, marginal: np.ndarray) -> np.ndarray:
    """Shares given a row, drawn towards the marginal by as much as one token weighs: (rows + 1, L, E)."""
    layers, count = marginal.shape
    found = np.zeros((rows + 1, layers, count), np.float32)
    layer = np.broadcast_to(np.arange(layers)[:, None, None], experts.shape)
    np.add.at(found, (np.broadcast_to(row[None, :, None], experts.shape), layer, experts.astype(np.int64)), 1.0)
    found[rows] = 0.0  # nothing is known of other ids
    found += (experts.shape[2] * marginal).astype(np.float32)
    return found / found.sum(2, keepdims=True)


def _by_expert(given: np.ndarray, taken: np.ndarray, marginal: np.ndarray) -> np.ndarray:
    """Shares of experts taken, given one of another place: (E, E)."""
    count = len(marginal)
    pairs = given.astype(np.int64)[:, :, None] * count + taken.astype(np.int64)[:, None, :]
    found = np.bincount(pairs.ravel(), minlength=count * count).reshape(count, count) + 8 * marginal
    return found / found.sum(1, keepdims=True)


# --- on disk -------------------------------------------------------------------------------------------------------

_FORMAT = "refound-expert-predictor-1"
_TABLES = ("ids", "marginal", "by_id", "by_id_before", "by_token_before", "by_layer_before")


def save_predictor(predictor: Predictor, path: Path, metadata: Mapping[str, str]) -> None:
    """As safetensors, tables in float32. metadata: what the plan is of."""
    import json

    from safetensors.numpy import save_file

    tensors = {}
    for name in _TABLES:
        table = getattr(predictor, name)
        tensors[name] = np.ascontiguousarray(table if name == "ids" else table.astype(np.float32))
    told = {"format": _FORMAT, "weights": json.dumps(predictor.weights), **metadata}
    save_file(tensors, path, metadata=told)


def load_predictor(path: Path) -> tuple[Predictor, dict[str, str]]:
    """The predictor, and what it is of.

    Raises:
        MismatchError: if the file is none, or damaged.
    """
    import json

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            told = opened.metadata() or {}
            if told.get("format") != _FORMAT:
                raise MismatchError(f"{path} is no {_FORMAT}; make it again with refound plan-serving")
            tables = {name: opened.get_tensor(name) for name in _TABLES}
        weights = json.loads(told["weights"])
        layers, count = tables["marginal"].shape
        rows = len(tables["ids"]) + 1
        shapes = [(rows, layers, count)] * 2 + [(layers, count, count)] * 2
        if [tables[name].shape for name in _TABLES[2:]] != shapes or weights.keys() != _FEATURES.keys():
            raise ValueError("its tables do not belong together")
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, MismatchError):
            raise
        raise MismatchError(f"{path} cannot be read as a predictor: {error}") from error
    return Predictor(weights=weights, **tables), told
