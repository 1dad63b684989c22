# SPDX-License-Identifier: Apache-2.0
"""What a global distillation is asked for. Imports nothing heavy."""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import DistillUsageError
from .parallel import parallel_problem


@dataclass(frozen=True, kw_only=True)
class Training:
    """The loss and how it is followed down. Puzzle's ablation: divergence and cosine without the LM loss is best."""

    tokens: int = 65536
    """Trained on, once each; 0: no distillation."""
    length: int = 256
    """Tokens a window."""
    batch: int = 4
    """Windows a step, over all ranks together."""
    lr: float = 1e-4
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls to a tenth of `lr` by a cosine."""
    kl: float = 1.0
    cosine: float = 1.0
    lm: float = 0.0
    divergence: str = "forward"
    """forward, reverse or jsd."""
    beta: float = 0.5
    temperature: float = 1.0
    save_every: int = 20
    """Steps between two states on disk, where torchrun keeps none in memory."""
    quality_every: int = 16384
    """Tokens between two looks at held-out text."""

    def problems(self, name: str) -> list[str]:
        """What cannot be, a sentence each."""
        found = [
            f"{name}.{key} is {getattr(self, key)}; it must be at least {least}"
            for key, least in (("tokens", 0), ("length", 2), ("batch", 1), ("save_every", 1), ("quality_every", 1))
            if getattr(self, key) < least
        ]
        found += [
            f"{name}.{key} is {getattr(self, key)}; it must be positive"
            for key in ("lr", "temperature")
            if not getattr(self, key) > 0
        ]
        weights = (self.kl, self.cosine, self.lm)
        if min(weights) < 0 or not sum(weights) > 0:
            found.append(f"{name}: kl, cosine and lm are {weights}; none may be negative and one must be positive")
        if self.divergence not in ("forward", "reverse", "jsd"):
            found.append(f"{name}.divergence is {self.divergence!r}, none of forward, reverse, jsd")
        if not 0 < self.beta < 1 or not 0 <= self.warmup <= 1:
            found.append(f"{name}: beta must lie between 0 and 1, and so must warmup")
        return found


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A child, its teacher, and what it learns from."""

    child: Path
    teacher: Path
    out: Path
    sources: tuple[str, ...] = ("python-docs", "python-source")
    """Names of `texts.SOURCES`, or paths of UTF-8 files."""
    training: Training = Training()
    held_out: int = 8
    """Windows on which quality is measured."""
    seed: int = 0
    logits: Path | None = None
    """A directory for the teacher's logits, asked for once and used again by other children; see `logit_store`."""
    stored: int = 64
    """Logits that are kept of a token."""
    overwrite: bool = False
    parallel: str = "ddp"
    """How ranks share the models: see `parallel`."""

    def __post_init__(self) -> None:
        problems = self.training.problems("training")
        if problem := parallel_problem(self.parallel):
            problems.append(problem)
        if not self.sources:
            problems.append("name at least one text")
        if self.training.tokens and self.training.tokens < self.training.length * self.training.batch:
            problems.append(f"{self.training.tokens} tokens are less than one batch")
        if self.logits is not None and (self.training.cosine, self.training.divergence, self.training.lm) != (
            0,
            "forward",
            0,
        ):
            problems.append(
                "stored logits hold no hidden states: with them cosine and lm must be 0, divergence forward"
            )
        if self.stored < 1:
            problems.append("stored must be at least 1")
        if self.held_out < 1:
            problems.append("held_out must be at least 1")
        if problems:
            raise DistillUsageError("; ".join(problems))


def read_training(settings: Sequence[str]) -> Training:
    """`key=value` settings over the defaults.

    Raises:
        DistillUsageError: naming every unknown key, with the nearest known one, and every value that is none.
    """
    known = {item.name: type(item.default) for item in fields(Training)}
    values, problems = {}, []
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if key not in known or not equals:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"
            problems.append(f"--set {setting!r} is no known KEY=VALUE{hint}")
            continue
        try:
            values[key] = known[key](text)
        except ValueError:
            problems.append(f"--set {setting!r}: a {known[key].__name__} is wanted")
    if problems:
        raise DistillUsageError("; ".join(problems))
    return Training(**values)


def digest(value: Any) -> str:
    """The SHA-256 of a dataclass or of plain values, by their canonical JSON."""
    plain = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()
