# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of other ranks: VeRA as the LoRA that it is, any merge as its nearest LoRA, a LoRA of less rank.

The best change of rank r in the Frobenius norm is the truncated singular value decomposition (Eckart and Young 1936).
For B A of rank R it is had from the R x R core of two QR decompositions, never from the whole matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..export.adapter import Adapter
from ..export.atomic import fresh_directory
from .method import Recast
from .peft_methods import PeftAttached, write_lora
from .saved import write_record

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A (rank, columns) and B (rows, rank), the scale in B, by the base's names of the modules."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """A LoRA, and how far it is from what it stands for."""

    pairs: Pairs
    errors: Mapping[str, float]
    """Of each module: Frobenius norm of what is missing, by that of the change."""
    error: float
    """The same over all modules together."""

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        rank = max(a.shape[0] for a, _ in self.pairs.values())
        return (
            f"LoRA of rank {rank}: {self.error:.2%} of the change is lost in the Frobenius norm; most, "
            f"{self.errors[worst]:.2%}, in {worst}"
        )


def vera_as_lora(attached: PeftAttached) -> Pairs:
    """d_b B d_d A with frozen A and B is a LoRA with A' = d_d A, B' = d_b B, exactly."""
    pairs: Pairs = {}
    with torch.no_grad():
        for name, layer in attached.layers():
            (key,) = layer.vera_lambda_d
            columns, rows = layer.in_features, layer.out_features
            a = layer.vera_lambda_d[key][:, None] * layer.vera_A[key][:, :columns]
            b = layer.vera_lambda_b[key][:, None] * layer.vera_B[key][:rows]
            pairs[name] = (a, b)
    return pairs


def nearest_lora(recast: Recast, before: Mapping[str, torch.Tensor], rank: int) -> Nearest:
    """The LoRA of this rank that is nearest to a merge, whatever was merged.

    before: the base's weights, by name.
    """
    pairs, kept, lost = Pairs(), dict[str, float](), dict[str, float]()
    for name, after in recast.weights.items():
        change = after.float() - before[name].float()
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        module = name.removesuffix(".weight")
        pairs[module] = _halves(u, s, v, rank)
        kept[module], lost[module] = float(s.square().sum()), float(s[rank:].square().sum())
    return _nearest(pairs, kept, lost)


def lower_rank(pairs: Pairs, rank: int) -> Nearest:
    """Each change with at most this rank."""
    found, kept, lost = Pairs(), dict[str, float](), dict[str, float]()
    for name, (a, b) in pairs.items():
        left, upper = torch.linalg.qr(b.double())
        right, lower = torch.linalg.qr(a.double().T)
        u, s, v = torch.linalg.svd(upper @ lower.T)
        found[name] = _halves(left @ u, s, v @ right.T, rank)
        kept[name], lost[name] = float(s.square().sum()), float(s[rank:].square().sum())
    return _nearest(found, kept, lost)


def pairs_of(adapter: Adapter) -> Pairs:
    """The changes of a LoRA directory that has been checked."""
    return {
        change.weight.removesuffix(".weight"): (adapter.read(change.a), change.scale * adapter.read(change.b))
        for change in adapter.changes
    }


def compress(adapter: Adapter, rank: int, base: Mapping[str, str], out: Path, *, overwrite: bool = False) -> Nearest:
    """Write the adapter with at most `rank` into the directory `out`.

    base: path and sha256 of what it belongs to.
    """
    nearest = lower_rank(pairs_of(adapter), rank)
    with fresh_directory(out, overwrite=overwrite) as folder:
        targets = adapter.config.get("target_modules")
        write_lora(folder, nearest.pairs, base=base["path"], targets=targets if isinstance(targets, list) else ())
        lost = {"of": str(adapter.path.absolute()), "rank": rank, "error": nearest.error}
        write_record(folder, {"base": dict(base), "compressed": lost})
    return nearest


def _halves(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()


def _nearest(pairs: Pairs, kept: Mapping[str, float], lost: Mapping[str, float]) -> Nearest:
    errors = {name: (lost[name] / kept[name]) ** 0.5 if kept[name] else 0.0 for name in pairs}
    total = sum(kept.values())
    return Nearest(pairs=pairs, errors=errors, error=(sum(lost.values()) / total) ** 0.5 if total else 0.0)
