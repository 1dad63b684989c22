# SPDX-License-Identifier: Apache-2.0
"""Pre-gating: one small causal model on token ids that gives every layer's experts before layer one (Read-ME).

A layer's own gate looks at the state that the layers before it computed, so the experts of layer 20 are known when
layer 19 is done, and not before. This model looks at token ids alone: what it answers for a whole queue of requests is
known before the first layer runs, and experts can be fetched and requests batched by it (`scheduler`).

It is a transformer of a few narrow blocks over an embedding of its own, that starts as the principal directions of the
language model's embedding; a linear head gives layers x E logits a token. It learns, by cross entropy, the shares of
output energy that the experts hold in the model at work: the oracle that gates are distilled from, too (`gates`).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...distill.errors import DamagedFileError
from ...distill.proven import read_proven, write_proven
from .errors import MoeError, TraceError

WEIGHTS, FACTS = "pregate.safetensors", "pregate.json"
FORMAT = "refound-pregate-1"


@dataclass(frozen=True, kw_only=True)
class PreGateShape:
    """Sizes of a pre-gating model."""

    vocab_size: int
    layers: int
    """Layers with experts."""
    experts: int
    top_k: int
    size: int = 96
    """Of its embedding and blocks."""
    blocks: int = 2
    heads: int = 4

    def problems(self) -> list[str]:
        """What cannot be, a sentence each."""
        found = [f"{item.name} must be a positive number" for item in fields(self) if not _positive(self, item.name)]
        if not found and (self.size % self.heads or self.size // self.heads % 2):
            found.append(f"size {self.size} does not divide into {self.heads} heads of an even width")
        if not found and self.top_k > self.experts:
            found.append(f"top {self.top_k} of {self.experts} experts cannot be")
        return found


def _positive(shape: PreGateShape, name: str) -> bool:
    value = getattr(shape, name)
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


class _Block(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)
        self.wide, self.narrow = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, state: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, length, size = state.shape
        parts = self.qkv(self.attention_norm(state)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = _turned(parts[0], turns), _turned(parts[1], turns), parts[2]
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        state = state + self.out(seen.transpose(1, 2).reshape(batch, length, size))
        return state + self.narrow(functional.gelu(self.wide(self.ffn_norm(state))))


def _turned(heads: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = heads.chunk(2, -1)
    cosines, sines = turns
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)


class PreGate(nn.Module):
    """See the module's words. Causal: what it says of a token depends on that token and those before it."""

    def __init__(self, shape: PreGateShape) -> None:
        super().__init__()
        if problems := shape.problems():
            raise MoeError(f"a pre-gating model cannot be so: {'; '.join(problems)}")
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.size)
        self.blocks = nn.ModuleList(_Block(shape.size, shape.heads) for _ in range(shape.blocks))
        self.norm = nn.LayerNorm(shape.size)
        self.head = nn.Linear(shape.size, shape.layers * shape.experts)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, layers, E) for ids (batch, length)."""
        state, turns = self.embedding(ids), self._turns(ids.shape[1])
        for block in self.blocks:
            state = block(state, turns)
        return self.head(self.norm(state)).view(*ids.shape, self.shape.layers, self.shape.experts)

    def choice(self, ids: torch.Tensor) -> torch.Tensor:
        """The experts of every layer, (batch, length, layers, k), the likeliest first."""
        return self(ids).topk(self.shape.top_k, dim=-1).indices

    def _turns(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        half = self.shape.size // self.shape.heads // 2
        rate = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        angle = torch.arange(length)[:, None] * rate
        return angle.cos(), angle.sin()


def start(shape: PreGateShape, embedding: torch.Tensor, seed: int) -> PreGate:
    """A model whose embedding holds what most tells the language model's embeddings apart: their first principal
    directions, at a mean square of 1. embedding: (vocabulary, hidden)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PreGate(shape)
    centred = embedding.float() - embedding.float().mean(0)
    _, directions = torch.linalg.eigh((centred.T @ centred).double())
    kept = min(shape.size, centred.shape[1])
    found = centred @ directions.flip(1)[:, :kept].float()
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.embedding.weight[:, :kept] = found / found.square().mean().sqrt().clamp_min(1e-12)
    return model


def pregate_loss(logits: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the experts' shares, the mean over tokens and layers. Both (…, layers, E)."""
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-30)
    return -(share * functional.log_softmax(logits, -1)).sum(-1).mean()


def agreement(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of `wanted` experts that are among `found`. Both (…, k), each row without repetition."""
    same = (found[..., :, None] == wanted[..., None, :]).any(-1)
    return same.float().mean().item()


def write_sidecar(directory: Path, model: PreGate, *, of: str, facts: Mapping[str, Any]) -> None:
    """Write the two files of a sidecar into `directory`: weights, and what they are of.

    of: `trace.model_sha256` of the model whose experts it gives. facts: measured figures, for people.
    """
    write_proven(directory / WEIGHTS, dict(model.state_dict()), {"shape": asdict(model.shape)})
    with (directory / WEIGHTS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    told = {"format": FORMAT, "model": of, "shape": asdict(model.shape), "weights_sha256": sha256, **facts}
    (directory / FACTS).write_text(json.dumps(told, indent=2) + "\n")


def read_sidecar(directory: Path, *, of: str | None = None) -> PreGate:
    """The pre-gating model in `directory`, its bytes proven, ready to be asked.

    of: the model that it must be of; None: of any.

    Raises:
        TraceError: if it is not there, is damaged, or is one of another model.
    """
    try:
        told = json.loads((directory / FACTS).read_text())
        if told.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        tensors, facts = read_proven(directory / WEIGHTS)
        if told["shape"] != facts["shape"]:
            raise ValueError(f"{FACTS} and {WEIGHTS} are of different shapes")
        model = PreGate(PreGateShape(**told["shape"]))
        model.load_state_dict(tensors)
        its = str(told["model"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, DamagedFileError) as error:
        raise TraceError(f"{directory} holds no sound pre-gating model: {error}") from error
    if of is not None and its != of:
        raise TraceError(
            f"{directory} gives the experts of another model ({its[:12]}… and not {of[:12]}…); make one of its own "
            "with: refound pregate MODEL"
        )
    return model.eval().requires_grad_(False)
