# SPDX-License-Identifier: Apache-2.0
"""What a pre-gating model and its experts are asked for. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

from ...distill.config import Training
from .errors import CarveUsageError

HEADS = 4
"""Of the pre-gating model's attention."""


@dataclass(frozen=True, kw_only=True)
class PreGateConfig:
    """A carved model, the dense one that it came from, and how both halves of a round are trained."""

    model: Path
    dense: Path
    out: Path
    """Where the model goes; its sidecar goes beside it, into OUT.pregate."""
    sources: tuple[str, ...] = ("python-docs", "python-source")
    tokens: int = 65536
    """That the pre-gating model learns from; it may see them several times."""
    length: int = 256
    rounds: int = 2
    steps: int = 300
    """Of the pre-gating model, a round."""
    batch: int = 8
    """Windows of such a step."""
    lr: float = 2e-3
    size: int = 96
    blocks: int = 2
    training: Training = field(default_factory=lambda: Training(tokens=16384))
    """Of the experts, a round; tokens = 0: none."""
    likeness: float = 0.01
    """Of the loss by which gates learn to say what the pre-gating model says."""
    balance: float = 0.01
    held_out: int = 8
    """Windows."""
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        problems = self.training.problems("training")
        if min(self.rounds, self.steps, self.batch, self.held_out) < 1 or not self.lr > 0:
            problems.append("rounds, steps, batch and held_out must be at least 1, and lr positive")
        if self.length < 2 or self.tokens < self.length * self.batch:
            problems.append(f"{self.tokens} tokens are less than a batch of {self.batch} windows of {self.length}")
        if min(self.likeness, self.balance) < 0 or not self.sources:
            problems.append("likeness and balance must not be negative, and at least one text must be named")
        if self.blocks < 1 or self.size < 1 or self.size % (2 * HEADS):
            problems.append(
                f"blocks is {self.blocks} and size {self.size}: at least 1 block, and a size that divides into {HEADS} "
                f"heads of an even width, as {max(round(self.size / (2 * HEADS)), 1) * 2 * HEADS} does, are wanted"
            )
        if problems:
            raise CarveUsageError("; ".join(problems))

    @property
    def sidecar(self) -> Path:
        return self.out.with_name(f"{self.out.name}.pregate")

    def gates_out(self, number: int) -> Path:
        """What the state of the pre-gating model's half of a round is named after."""
        return self.out.with_name(f"{self.out.name}.gates{number}")

    def experts_out(self, number: int) -> Path:
        """What the state of the experts' half of a round is named after."""
        return self.out.with_name(f"{self.out.name}.experts{number}")
