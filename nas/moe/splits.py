# SPDX-License-Identifier: Apache-2.0
"""Splitting the channels of one FFN into experts: what a split is, and the ways to make one.

Every way but upcycling puts each channel into exactly one place, shared or an expert; upcycling puts each into `copies`
experts. Experts are of one width. Which are together decides what a token must pay for: a good split has what is used
by the same tokens in the same expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from .config import Shape
from .errors import CarveUsageError
from .evidence import LayerEvidence

Needs = Literal["nothing", "activations", "gradients"]


@dataclass(frozen=True, kw_only=True)
class LayerSplit:
    """Channels of one FFN, in ascending order within each place."""

    experts: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...] = ()

    @property
    def order(self) -> list[int]:
        """All places one after the other, the shared one first: the order in which weights are kept."""
        return [*self.shared, *(channel for expert in self.experts for channel in expert)]

    def problem(self, shape: Shape) -> str | None:
        """What is wrong with it, if anything."""
        sizes = {len(expert) for expert in self.experts}
        if len(self.experts) != shape.experts or sizes != {shape.expert_width} or len(self.shared) != shape.shared:
            return f"experts of widths {sorted(sizes)} and {len(self.shared)} shared channels are not {shape}"
        held = np.bincount(self.order, minlength=shape.width)
        wanted = np.full(shape.width, shape.copies)
        wanted[list(self.shared)] = 1
        wrong = np.flatnonzero(held != wanted) if len(held) == shape.width else [max(self.order)]
        if len(wrong):
            return f"channel {wrong[0]} is in {held[wrong[0]]} places"
        return None


class Split(Protocol):
    """A way to split. The same evidence and seed give the same split."""

    needs: Needs
    """What of the model's work it looks at."""

    def problems(self, shape: Shape, domains: int) -> list[str]:
        """What of the settings it cannot do, a sentence each."""
        ...

    def split(self, shape: Shape, seen: LayerEvidence | None, draw: np.random.Generator) -> LayerSplit:
        """seen: None if it needs nothing."""
        ...


def made_of(assigned: np.ndarray, experts: int, channels: np.ndarray, shared: Sequence[int] | np.ndarray) -> LayerSplit:
    """The split in which channel `channels[n]` is in expert `assigned[n]`."""
    found = [np.sort(channels[assigned == expert]).tolist() for expert in range(experts)]
    return LayerSplit(experts=tuple(map(tuple, found)), shared=tuple(np.sort(np.asarray(shared, int)).tolist()))


class RandomSplit:
    """Any channels together, shared ones too: what every other split must beat (LLaMA-MoE 2406.16554)."""

    needs: Needs = "nothing"

    def problems(self, shape: Shape, domains: int) -> list[str]:
        return []

    def split(self, shape: Shape, seen: LayerEvidence | None, draw: np.random.Generator) -> LayerSplit:
        order = draw.permutation(shape.width)
        shared, rest = order[: shape.shared], order[shape.shared :]
        return made_of(np.arange(len(rest)) % shape.experts, shape.experts, rest, shared)


class UpcycleSplit:
    """`copies` of the FFN, each cut into shards; experts of one copy form a virtual group (2410.07524).

    Their gates are equal (see `gates.virtual_gates`), so a token takes whole copies, and each shard once of each.
    """

    needs: Needs = "nothing"

    def problems(self, shape: Shape, domains: int) -> list[str]:
        return ["upcycling shares nothing: leave --shared out"] if shape.shared else []

    def split(self, shape: Shape, seen: LayerEvidence | None, draw: np.random.Generator) -> LayerSplit:
        shards = shape.experts // shape.copies
        one = made_of(np.arange(shape.width) // shape.expert_width, shards, np.arange(shape.width), ())
        return LayerSplit(experts=one.experts * shape.copies)


def find_split(name: str) -> Split:
    """Raises CarveUsageError if there is none of that name."""
    from .coactivation import CoactivationSplit
    from .domains import DomainSplit, GradientSplit

    known: dict[str, Split] = {
        "coactivation": CoactivationSplit(),
        "domains": DomainSplit(),
        "gradient": GradientSplit(),
        "random": RandomSplit(),
        "upcycle": UpcycleSplit(),
    }
    if name not in known:
        raise CarveUsageError(f"there is no split {name!r}; there are {', '.join(known)}")
    return known[name]
