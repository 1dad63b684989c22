# SPDX-License-Identifier: Apache-2.0
"""Tiny models, and what they say by the longest and surest way: every token by a pass over the whole text."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from refound.adapters.heads.cached import CachedModel
from refound.adapters.heads.decode import Proposal, decode_plain, pick
from refound.adapters.heads.decode_tree import Tree
from refound.distill.models import load, open_blocks
from safetensors.torch import load_file, save_file

from ...export.models import VOCAB, decoder, heterogeneous, write_model


@cache
def folder(kind: str = "llama", seed: int = 0) -> Path:
    path = Path(mkdtemp(prefix="refound-heads-"))
    made = {"llama": decoder(layers=3), "mixed": heterogeneous(), "small": decoder(layers=1, width=32)}[kind]
    return write_model(path / kind, made, seed=seed)


@cache
def model(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float64) -> CachedModel:
    return CachedModel(load(open_blocks(folder(kind, seed)), dtype=dtype))


def foreseeable(path: Path, layers: int) -> Path:
    """A directory of a model that hears little of what came before the last token: its text turns in circles, which
    heads can learn in a few steps."""
    write_model(path, decoder(layers=layers))
    file = path / "model.safetensors"
    quiet = {
        name: tensor * (0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        for name, tensor in load_file(file).items()
    }
    save_file(quiet, file, metadata={"format": "pt"})
    return path


def surely(of: CachedModel, prompt: Sequence[int], new_tokens: int) -> tuple[int, ...]:
    """What the model says after `prompt`: plain decoding, held against transformers' own pass over the whole text,
    which has no cache, no tree and no draft."""
    found = decode_plain(of, prompt, new_tokens=new_tokens).tokens
    with torch.no_grad():
        logits = of.model(input_ids=torch.tensor([[*prompt, *found]])).logits[0, len(prompt) - 1 : -1]
    assert tuple(pick(logits).tolist()) == found
    return found


class Adversary:
    """Guesses random trees: tokens that are right or wrong, twice under one node, too deep."""

    def __init__(self, truth: Sequence[int], seed: int) -> None:
        self._truth, self._draw, self._start = truth, torch.Generator().manual_seed(seed), 0

    def start(self, model: CachedModel, prompt: Sequence[int]) -> None:
        self._start = len(prompt)

    def propose(self, tokens: Sequence[int], state: torch.Tensor, room: int) -> Proposal:
        told, parents, depths = [tokens[-1]], [-1], [0]
        for _ in range(self._below(9)):
            parent = self._below(len(told))
            depth = depths[parent] + 1
            at = len(tokens) - self._start + depth - 1
            right = self._below(3) > 0 and at < len(self._truth)
            told.append(self._truth[at] if right else self._below(VOCAB))
            parents.append(parent)
            depths.append(depth)
        return Proposal(tree=Tree(tokens=tuple(told), parents=tuple(parents)))

    def settle(self, accepted: int, path: Sequence[int]) -> None: ...

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=self._draw))
