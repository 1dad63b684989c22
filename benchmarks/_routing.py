# SPDX-License-Identifier: Apache-2.0
"""Real routing without a trained router: SmolLM2-135M's FFN channels in experts, each token's strongest ones taken.

Channels of a layer are clustered by co-activation: on training text, which of them are among a token's strongest tenth
(a row of 0 and 1 a channel, projected to 64 numbers); balanced k-means, each round a linear assignment of channels to
slots of the nearest centre. A token's experts are those with the largest log Σ a_i² |down_i|² less a bias, which is
chosen on training text so that all experts of a layer are taken about equally often, as trained routers are balanced
(DeepSeek-V3's bias for selection alone, 2408.15664). Nothing here is drawn from a distribution: it is what the model
computes on the text, with an oracle in the router's place.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = ("python-docs", "python-source", "bible")


def windows_of(part: str, tokens: int, length: int) -> tuple[Any, Any]:
    """(model directory, windows (n, length) int64 tensor) of SmolLM2 and its text."""
    import torch
    from refound.distill.loop import eos_of
    from refound.distill.models import open_blocks
    from refound.distill.smollm2 import smollm2_directory
    from refound.distill.texts import open_tokenizer, pack

    source = open_blocks(smollm2_directory())
    found = pack(
        SOURCES,
        part,  # pyright: ignore[reportArgumentType]
        tokenizer=open_tokenizer(source.path),
        eos=eos_of(source),
        count=tokens // length,
        length=length,
    )
    return source, torch.from_numpy(found)


def strengths(model: Any, windows: Any) -> Any:
    """Yields for each layer a_i |down_i| of every token: (tokens, width) float32."""
    import torch
    from refound.distill.models import attention_output, positions_of
    from refound.nas.ffn_init import activations

    positions = positions_of(model, windows.shape[1])
    with torch.no_grad():
        hidden = model.model.embed_tokens(windows)
        for layer in model.model.layers:
            hidden = hidden + attention_output(layer, hidden, positions)
            inner = activations(layer.mlp, layer.post_attention_layernorm(hidden))
            yield (inner * layer.mlp.down_proj.weight.norm(dim=0)).flatten(0, 1).float().numpy()
            hidden = hidden + layer.mlp.down_proj(inner)


def clusters(strong: np.ndarray, experts: int, *, seed: int, rounds: int = 2) -> np.ndarray:
    """The expert of each channel, equally many of each: (width,). strong: (tokens, width)."""
    from refound.nas.serving.placement import assign

    draw, width = np.random.default_rng(seed), strong.shape[1]
    size = np.abs(strong)
    markers = size >= np.partition(size, -(width // 10), axis=1)[:, -(width // 10), None]
    rows = markers.T.astype(np.float32) @ draw.standard_normal((len(strong), 64)).astype(np.float32)
    rows -= rows.mean(0)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    centres = [rows[draw.integers(width)]]
    while len(centres) < experts:  # far from those before
        nearest = np.max(rows @ np.stack(centres).T, axis=1)
        centres.append(rows[int(nearest.argmin())])
    middle, of = np.stack(centres), np.zeros(width, np.int64)
    for _ in range(rounds):
        of = assign(-(rows @ middle.T).astype(np.float64), np.full(experts, width // experts))
        middle = np.stack([rows[of == expert].mean(0) for expert in range(experts)])
    return of


def balancing(energy: np.ndarray, top_k: int, *, rounds: int = 200) -> np.ndarray:
    """A bias for each expert with which `energy` (tokens, experts) takes all about equally often: (experts,)."""
    bias, step, experts = np.zeros(energy.shape[1]), 0.5, energy.shape[1]
    for _ in range(rounds):
        load = np.bincount(taken(energy, bias, top_k).ravel(), minlength=experts)
        bias += step * np.sign(load - load.mean())
        step *= 0.97
    return bias


def taken(energy: np.ndarray, bias: np.ndarray, top_k: int) -> np.ndarray:
    """(tokens, top_k), the strongest first."""
    return np.argsort(bias - energy, axis=1, kind="stable")[:, :top_k]


def energies(
    keep: Path, *, experts: int = 16, fit_tokens: int = 2048, tokens: int = 8192, length: int = 256, seed: int = 0
) -> dict[str, np.ndarray]:
    """log energy of each expert, `fit` (layers, fit_tokens, experts) on training text and `held` (layers, tokens,
    experts) on held-out text, with the latter's `tokens` and `starts`. What the folder `keep` has is not made anew."""
    from refound.distill.models import load

    keep.mkdir(parents=True, exist_ok=True)
    source, fit = windows_of("train", fit_tokens, length)
    _, text = windows_of("test", tokens, length)
    model = load(source)

    def make_fit() -> dict[str, np.ndarray]:
        of, seen = [], []
        for index, strong in enumerate(strengths(model, fit)):
            of.append(clusters(strong, experts, seed=seed + index))
            seen.append(_energy(strong, of[-1], experts))
        return {"of": np.stack(of), "fit": np.stack(seen)}

    made = _kept(keep / f"experts-{experts}-{fit_tokens}-{length}-{seed}.npz", make_fit)
    parts = []
    for number, chunk in enumerate(text.split(4)):

        def make_held(chunk: Any = chunk) -> dict[str, np.ndarray]:
            rows = zip(made["of"], strengths(model, chunk), strict=True)
            return {"held": np.stack([_energy(strong, own, experts) for own, strong in rows])}

        name = f"held-{experts}-{fit_tokens}-{tokens}-{length}-{seed}-{number}.npz"
        parts.append(_kept(keep / name, make_held)["held"])
    return {
        "fit": made["fit"],
        "held": np.concatenate(parts, axis=1),
        "tokens": text.flatten().numpy().astype(np.int32),
        "starts": np.arange(len(text) + 1, dtype=np.int64) * length,
    }


def _kept(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if file.is_file():
        with np.load(file) as kept:
            return dict(kept)
    found = make()
    part = file.with_suffix(".part.npz")
    np.savez(part, **found)
    part.replace(file)
    print(f"{file.name} is made", file=sys.stderr, flush=True)
    return found


def _energy(strong: np.ndarray, of: np.ndarray, experts: int) -> np.ndarray:
    squares = [np.square(strong[:, of == expert]).sum(1) for expert in range(experts)]
    return np.log(np.maximum(np.stack(squares, axis=1), 1e-12)).astype(np.float32)


def routing(made: dict[str, np.ndarray], top_k: int, *, unbiased: bool = False) -> np.ndarray:
    """The experts of each held-out token: (layers, tokens, top_k) int16. unbiased: however unevenly they are taken."""
    layers = []
    for fit, held in zip(made["fit"], made["held"], strict=True):
        bias = np.zeros(fit.shape[1]) if unbiased else balancing(fit, top_k)
        layers.append(taken(held, bias, top_k))
    return np.stack(layers).astype(np.int16)
