# SPDX-License-Identifier: Apache-2.0
"""What rounding does to each expert, and to the model: measured with experts that are streamed, so memory is no limit.

Rounding is symmetric and to the nearest, a scale for each 32 weights of a row: q = round(w / s) with s twice the
largest |w| by 2^bits - 1, as `export/compressed.py` writes it for 4 and 8 bits.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from ...export.directory import ModelDirectory
from .bits import GROUP
from .expert_store import Buffers, ExpertFiles, Key, StreamConfig
from .streaming import StreamedExperts, gated, open_streamed

_CONFIG = StreamConfig(device_slots=4, host_slots=8)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """`weight` (rows, columns) as it comes back from so many bits. The last group of a row may be shorter."""
    rows, columns = weight.shape
    short = -columns % GROUP
    groups = torch.nn.functional.pad(weight.float(), (0, short)).unflatten(1, (-1, GROUP))
    scale = 2 * groups.abs().amax(-1, keepdim=True) / (2**bits - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    levels = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (levels * scale).flatten(1)[:, :columns].reshape(rows, columns).to(weight.dtype)


class _Measured(torch.nn.Module):
    """A layer's experts that also add up what each width would change."""

    def __init__(self, own: StreamedExperts, widths: Sequence[int]) -> None:
        super().__init__()
        self.own, self.widths = own, widths
        self.harm = np.zeros((own.count, len(widths)))
        self.seen = np.zeros(own.count, bool)
        self.energy = 0.0

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = self.own(hidden_states, top_k_index, top_k_weights)
        self.energy += float(out.double().square().sum())
        for expert in torch.unique(top_k_index).tolist():
            self.seen[expert] = True
            token, place = torch.where(top_k_index == expert)
            inputs, weight = hidden_states[token], top_k_weights[token, place, None]
            gate_up, down = self.own.store.get((self.own.layer, expert))[:2]
            before = gated(inputs, gate_up, down, self.own.act_fn) * weight
            for index, width in enumerate(self.widths):
                after = gated(inputs, rounded(gate_up, width), rounded(down, width), self.own.act_fn) * weight
                self.harm[expert, index] += float((after - before).double().square().sum())
        return out


def measure_harm(path: Path, windows: torch.Tensor, widths: Sequence[int]) -> np.ndarray:
    """(layers, experts, widths + 1), the last column zeros: the source's own bits. windows: (n, length) int64.

    An expert that no token of the windows took has the mean of its layer's others: nothing says that it bears more.

    Raises:
        ExportError, MismatchError: see `streaming.open_streamed`.
    """
    with open_streamed(path, _CONFIG) as (model, store):
        measured = []
        for index in store.files.layers:
            block = model.model.layers[index].mlp
            block.experts = _Measured(block.experts, widths)
            measured.append(block.experts)
        with torch.no_grad():
            for window in windows.split(4):
                model.model(window)
        harm = np.stack([_with_unseen(one.harm, one.seen) / max(one.energy, 1e-30) for one in measured])
    return np.concatenate([harm, np.zeros((*harm.shape[:2], 1))], axis=2)


def _with_unseen(harm: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen[:, None], harm, harm[seen].mean(0)) if seen.any() else harm


class _RoundedFiles(ExpertFiles):
    """Experts as they come back from their bits."""

    def __init__(self, source: ModelDirectory, dtype: torch.dtype, bits: dict[Key, int]) -> None:
        super().__init__(source, dtype)
        self._bits = bits

    def read(self, key: Key, buffers: Buffers) -> None:
        super().read(key, buffers)
        if key in self._bits:
            for weight in buffers:
                weight.copy_(rounded(weight, self._bits[key]))


def divergences(path: Path, windows: torch.Tensor, plans: Sequence[np.ndarray], source_bits: int) -> list[float]:
    """Mean KL(source || rounded) a token in nats, for each table of bits (layers, experts). windows: (n, length).

    All are open at once, each with its few slots, so that one window's logits are in memory at a time.
    """
    totals = np.zeros(len(plans))
    with ExitStack() as stack, torch.no_grad():
        source, *others = (
            stack.enter_context(open_streamed(path, _CONFIG, files=_files(bits, source_bits)))[0]
            for bits in (None, *plans)
        )
        for window in windows.split(1):
            wanted = source(window).logits.double().log_softmax(-1)
            for index, model in enumerate(others):
                found = model(window).logits.double().log_softmax(-1)
                totals[index] += float((wanted.exp() * (wanted - found)).sum())
    return (totals / windows.numel()).tolist()


def _files(bits: np.ndarray | None, source_bits: int) -> Callable[[ModelDirectory, torch.dtype], ExpertFiles]:
    def open_files(source: ModelDirectory, dtype: torch.dtype) -> ExpertFiles:
        plain = ExpertFiles(source, dtype)
        if bits is None:
            return plain
        narrow = {
            (layer, expert): int(width)
            for layer, row in zip(plain.layers, bits, strict=True)
            for expert, width in enumerate(row.tolist())
            if width < source_bits
        }
        return _RoundedFiles(source, dtype, narrow)

    return open_files
