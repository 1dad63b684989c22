# SPDX-License-Identifier: Apache-2.0
"""What a carving is asked for, and what of it cannot be. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

from ...distill.config import Training
from .errors import CarveUsageError

SPLITS = ("coactivation", "domains", "gradient", "random", "upcycle")
"""Names of the ways to split an FFN; see `splits`."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How an FFN of `width` channels becomes experts."""

    width: int
    """Channels of the dense FFN."""
    experts: int
    top_k: int
    """Experts that a token takes, shared channels not counted."""
    shared: int = 0
    """Channels that every token takes."""
    copies: int = 1
    """How many experts hold each channel: 1, but for upcycling."""

    @property
    def expert_width(self) -> int:
        return (self.width - self.shared) * self.copies // self.experts

    @property
    def active(self) -> int:
        """Channels that a token takes."""
        return self.shared + self.top_k * self.expert_width

    @property
    def whole(self) -> bool:
        """A token takes every channel, so that the mixture is the dense FFN."""
        return self.top_k == self.experts or self.copies > 1

    def __str__(self) -> str:
        shared = f" beside {self.shared} shared channels" if self.shared else ""
        copies = f", {self.copies} copies of each channel" if self.copies > 1 else ""
        share = self.active / self.width
        return f"{self.top_k} of {self.experts} experts of {self.expert_width}{shared}{copies}: {share:.0%} of an FFN"

    def problems(self) -> list[str]:
        """What cannot be, a sentence each, with what is nearest."""
        found = [
            f"{name} is {value}; it must be at least {least}"
            for name, value, least in (
                ("experts", self.experts, 1),
                ("active", self.top_k, 1),
                ("shared", self.shared, 0),
                ("copies", self.copies, 1),
            )
            if value < least
        ]
        if self.top_k > self.experts:
            found.append(f"a token cannot take {self.top_k} of {self.experts} experts; say --active {self.experts}")
        if self.shared >= self.width:
            found.append(f"{self.shared} shared channels leave none of {self.width} for experts")
        if found:
            return found
        if self.experts % self.copies:
            found.append(f"{self.experts} experts cannot hold {self.copies} copies: say a multiple of {self.copies}")
        elif (self.width - self.shared) % (self.experts // self.copies):
            found.append(self._uneven())
        elif self.copies > 1 and self.top_k % (self.experts // self.copies):
            shards = self.experts // self.copies
            found.append(
                f"upcycled, a token takes whole copies of {shards} experts each: --active must be a multiple of "
                f"{shards}, not {self.top_k}"
            )
        return found

    def _uneven(self) -> str:
        each, rest = self.experts // self.copies, self.width - self.shared
        low = rest % each
        near = sorted({self.shared + low, self.shared + low - each} & set(range(self.width)))
        fits = [count for count in range(1, 129) if rest % count == 0]
        near_counts = sorted(sorted(fits, key=lambda count: abs(count - each))[:2])
        return (
            f"{rest} channels do not divide into {each} experts of one width; say --shared "
            f"{' or '.join(map(str, near))}, or {' or '.join(map(str, near_counts))} experts"
        )


@dataclass(frozen=True, kw_only=True)
class RouterTraining:
    """How the gates of one layer are distilled from the oracle, on the dense model's own activations."""

    steps: int = 200
    batch: int = 1024
    """Tokens a step."""
    lr: float = 3e-3
    balance: float = 0.01
    """Of the load-balancing loss beside the distillation."""
    spread: float = 0.1
    """The standard deviation of a gate's logits over tokens. Which experts are chosen does not depend on it; how far
    their weights are from equal does."""


@dataclass(frozen=True, kw_only=True)
class CarveConfig:
    """A dense model, the mixture that is made of it, and what that is decided by."""

    model: Path
    out: Path
    experts: int = 16
    active: int = 4
    shared: int = 0
    copies: int = 1
    split: str = "coactivation"
    layout: str = ""
    """A family with experts; empty: that of the model's own kind which holds them."""
    dense_layers: tuple[int, ...] = ()
    """Layers that stay dense."""
    sources: tuple[str, ...] = ("python-docs", "python-source")
    """Names of `texts.SOURCES`, or paths of UTF-8 files. Each is a domain."""
    tokens: int = 16384
    """Of calibration: splits, gates and refitting are decided by them."""
    length: int = 256
    """Tokens a window."""
    router: RouterTraining = RouterTraining()
    refit: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    """Ridges of the down projections' refitting to what the gates leave active, as shares of the inputs' mean square;
    the best on held-out windows is taken. Empty: they stay the dense model's own."""
    training: Training = field(default_factory=lambda: Training(tokens=0))
    """Of experts and gates together against the dense model; tokens = 0: none."""
    held_out: int = 8
    """Windows on which quality and routing are measured."""
    balance: float = 0.01
    """Of the load-balancing loss in training."""
    seed: int = 0
    keep: Path | None = None
    """A directory for what is computed on the way, used again by other carvings. None: beside `out`, while it runs."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        problems = self.training.problems("training")
        if self.split not in SPLITS:
            problems.append(f"there is no split {self.split!r}; there are {', '.join(SPLITS)}")
        if (self.copies > 1) != (self.split == "upcycle"):
            problems.append("--copies belongs to --split upcycle, which needs at least 2")
        if not self.sources:
            problems.append("name at least one text")
        if self.length < 8 or self.tokens < self.length * max(len(self.sources), 1):
            problems.append(f"{self.tokens} tokens are less than a window of {self.length} (8 or more) for each text")
        if self.router.steps < 0 or self.router.batch < 1 or not self.router.lr > 0 or not self.router.spread > 0:
            problems.append("router: steps must be at least 0, batch 1, and lr and spread positive")
        if min(self.balance, self.router.balance) < 0 or self.held_out < 1 or not all(x > 0 for x in self.refit):
            problems.append("balance must not be negative, refit must be positive, and held_out at least 1")
        if problems:
            raise CarveUsageError("; ".join(problems))

    def shape(self, width: int) -> Shape:
        """For an FFN of `width` channels.

        Raises:
            CarveUsageError: if they cannot be so split, with what is nearest.
        """
        shape = Shape(width=width, experts=self.experts, top_k=self.active, shared=self.shared, copies=self.copies)
        if problems := shape.problems():
            raise CarveUsageError("; ".join(problems))
        return shape
