# SPDX-License-Identifier: Apache-2.0
"""What a method of tuning is: the contract that `tests/adapters/test_methods.py` holds all of them to.

A method is a frozen dataclass of its settings, one `[method]` table of a recipe. It attaches to a model, whose own
weights stay as they are; what it trains is saved alone, and recast into weights of the base where that is exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Recast:
    """The base with what was trained in its weights: a model that needs nothing beside it."""

    how: str
    """"merged": the same shapes. "folded": wider FFNs. "sliced": fewer channels and heads."""
    weights: "Mapping[str, torch.Tensor]"
    """By the base's names: those that change."""
    widths: Mapping[int, int] = field(default_factory=dict)
    """Of the FFN of each layer that has another width now."""
    kv_heads: Mapping[int, int] = field(default_factory=dict)
    """Of each layer that has fewer now, with the queries that read them."""


class Steady:
    """A method whose parameters are all that changes."""

    def changing(self) -> "dict[str, torch.Tensor]":
        return {}

    def after_step(self, step: int, steps: int) -> None: ...


class Attached(Protocol):
    """A method on a model."""

    model: "torch.nn.Module"
    """What is run: called with `input_ids` (batch, length), its result has `logits` (batch, length, vocabulary)."""

    def trained(self) -> "dict[str, torch.nn.Parameter]":
        """What the optimizer gets; nothing else of the model changes."""
        ...

    def changing(self) -> "dict[str, torch.Tensor]":
        """What else changes as it is trained, and belongs to a snapshot."""
        ...

    def after_step(self, step: int, steps: int) -> None:
        """Called when `step` of `steps` are done, before their state is taken."""
        ...

    def save(self, folder: Path) -> None:
        """Write what was trained into the directory `folder`."""
        ...

    def load(self, folder: Path) -> None:
        """Take what `save` wrote. Raises AdapterDamageError if it is not that of these settings and this model."""
        ...

    def recast(self) -> Recast:
        """Raises NotServableError, which says why not, and what is nearest."""
        ...


class Method(Protocol):
    """The settings of one, which make it."""

    identity: ClassVar[str]
    """Empty: at step 0 the model computes what the base does. Else why not."""

    def problems(self) -> list[str]:
        """What cannot be, a sentence each."""
        ...

    def attach(self, model: "torch.nn.Module", *, seed: int) -> Attached:
        """Attach to `model`, whose own parameters then want no gradients. The same seed, the same start.

        Raises:
            TargetsError, UnknownBlocksError: see `sites`.
        """
        ...


def record_of(method: Any, kind: str) -> dict[str, Any]:
    """The `[method]` table that makes `method` again."""
    from dataclasses import asdict

    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(method).items()}
    return {"kind": kind, **plain}
