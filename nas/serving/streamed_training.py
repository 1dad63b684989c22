# SPDX-License-Identifier: Apache-2.0
"""Train a mixture of experts whose experts, gradients and optimizer states do not fit into memory together.

Experts are streamed as in `streaming`, with AdamW's two moments beside them, from one file that is made for the
training. An expert's gradient is complete when its layer's backward pass is, so its step is taken there and then, in
its device slot, and the gradient is forgotten: what is in memory is the model without experts, activations, and the
slots (SE-MoE 2205.10034 streams parameters and states so too). Backward computes an expert's inner activations again
instead of keeping them. The arithmetic is torch's own `adamw`, a step count for each expert; an expert that no token
took in a step is left alone, as torch leaves a parameter without gradient. So the result equals, to the bit, training
with every expert a parameter of its own in memory.

What differs from training that is not streamed: gradients of experts cannot be clipped by a norm over all parameters,
nor accumulated over several backward passes (each one takes a step). The file is no checkpoint: a training that is
killed starts from the last model that `save` wrote.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.adamw import adamw

from ...distill.save import save_model
from ...export.atomic import require_space, size_text
from ...export.directory import ModelDirectory
from ...export.errors import OutputSpaceError
from .errors import PlanError
from .expert_store import CPU, Buffers, ExpertFiles, ExpertStore, Key, StreamConfig
from .streaming import Ahead, StreamedExperts, gated, module_name, open_streamed


@dataclass(frozen=True, kw_only=True)
class ExpertAdamW:
    """AdamW of the experts; the other parameters have an optimizer of the caller's."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


class TrainedFiles(ExpertFiles):
    """Weights, moments and step counts of all experts in one file of float32.

    Raises:
        OutputSpaceError: if there is no room for it. The room is taken at once: a write into a mapped file's hole on a
            disk that has filled since would kill the process (SIGBUS).
    """

    def __init__(self, source: ModelDirectory, dtype: torch.dtype, path: Path) -> None:
        super().__init__(source, dtype)
        if dtype != torch.float32:
            raise PlanError(
                f"experts are trained in float32, not {dtype}: a step is often less than half of a bit there"
            )
        sizes = [source.decoder.layers[layer].ffn.experts for layer in self.layers]
        self._row = {
            (layer, expert): row
            for row, (layer, expert) in enumerate(
                (layer, expert) for layer, size in zip(self.layers, sizes, strict=True) for expert in range(size)
            )
        }
        self._size = 3 * self.width * self.hidden
        columns = 3 * self._size + 1
        require_space(path.parent, len(self._row) * columns * 4)
        _reserve(path, len(self._row) * columns * 4)
        self._rows = np.memmap(path, np.float32, "r+", shape=(len(self._row), columns))
        buffers = super().buffers(CPU)
        for key, row in self._row.items():
            super().read(key, buffers)
            self._rows[row, : self._size] = torch.cat([weight.flatten() for weight in buffers]).numpy()

    @property
    def keys(self) -> list[Key]:
        return list(self._row)

    def buffers(self, device: torch.device) -> Buffers:
        """gate_up and down, their first moments, their second moments, and the number of steps."""
        several = [super(TrainedFiles, self).buffers(device) for _ in range(3)]
        return (*several[0], *several[1], *several[2], torch.zeros((), dtype=torch.float32))

    def read(self, key: Key, buffers: Buffers) -> None:
        row = torch.from_numpy(self._rows[self._row[key]])
        for buffer, part in zip(buffers, row.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view(buffer.shape))

    def write(self, key: Key, buffers: Buffers) -> None:
        row = torch.from_numpy(self._rows[self._row[key]])
        for buffer, part in zip(buffers, row.split([buffer.numel() for buffer in buffers]), strict=True):
            part.copy_(buffer.flatten())


def _reserve(path: Path, size_bytes: int) -> None:
    """A file of so many zeros, whose blocks are there."""
    try:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
    except OSError as error:
        raise OutputSpaceError(
            f"{path} cannot have its {size_text(size_bytes)}: {error.strerror}. Name another place for it"
        ) from error


class Trainer:
    """Takes each expert's step in the backward pass, and writes the model when it is asked to."""

    def __init__(self, optimizer: ExpertAdamW, store: ExpertStore) -> None:
        self.optimizer, self.store = optimizer, store
        self._taken: list[Key] = []

    def entered(self, key: Key) -> None:
        self._taken.append(key)

    def step(self, key: Key, gradients: tuple[torch.Tensor, torch.Tensor]) -> None:
        """The expert is in the device slot that was asked for last."""
        buffers, how = self.store.get(key), self.optimizer
        weights, first, second, steps = buffers[:2], buffers[2:4], buffers[4:6], buffers[6]
        # the function counts each of its parameters; both matrices of an expert take the same steps
        counts = [steps.clone() for _ in weights]
        adamw(
            list(weights),
            list(gradients),
            list(first),
            list(second),
            [],
            counts,
            foreach=False,
            amsgrad=False,
            beta1=how.betas[0],
            beta2=how.betas[1],
            lr=how.lr,
            weight_decay=how.weight_decay,
            eps=how.eps,
            maximize=False,
        )
        steps.copy_(counts[0])
        self.store.changed(key)

    def left(self, key: Key) -> None:
        """Backward goes the way back: what was entered before comes next."""
        while self._taken and self._taken.pop() != key:
            pass
        if self.store.config.read_ahead:
            self.store.expect(list(dict.fromkeys(reversed(self._taken[-self.store.config.host_slots :]))))


class _Expert(torch.autograd.Function):
    """One expert, whose weights are nobody's parameters."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, key: Key, trainer: Trainer, act_fn: Callable[..., Any]) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.key, ctx.trainer, ctx.act_fn = key, trainer, act_fn
        gate_up, down = trainer.store.get(key)[:2]
        return gated(inputs, gate_up, down, act_fn)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        gate_up, down = ctx.trainer.store.get(ctx.key)[:2]
        with torch.enable_grad():
            variables = [found.detach().requires_grad_() for found in (inputs, gate_up, down)]
            out = gated(variables[0], variables[1], variables[2], ctx.act_fn)
            to_inputs, *to_weights = torch.autograd.grad(out, variables, gradients[0])
        ctx.trainer.step(ctx.key, tuple(to_weights))
        ctx.trainer.left(ctx.key)
        return to_inputs, None, None, None


class _TrainedExperts(StreamedExperts):
    """The loop, with gradients."""

    def __init__(self, *places: Any, trainer: Trainer) -> None:
        super().__init__(*places)
        self.trainer = trainer

    def one(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().one(expert, inputs)
        key = (self.layer, expert)
        self.trainer.entered(key)
        if not inputs.requires_grad:
            inputs.requires_grad_()  # else nothing would come back to the expert
        found: Any = _Expert.apply(inputs, key, self.trainer, self.act_fn)
        return found


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model in training, and what belongs to it."""

    model: Any
    """transformers' class in training mode. Its parameters are all but the experts', and require gradients."""
    store: ExpertStore
    source: ModelDirectory

    def save(self, out: Path, *, record: dict[str, Any], overwrite: bool = False) -> None:
        """Write the whole model as it is now, experts in their places: it is in memory once for that.

        Raises:
            OutputExistsError, OutputSpaceError: see `export.atomic.fresh_directory`.
        """
        self.store.flush()
        files = self.store.files
        state = self.model.state_dict()
        weights: dict[str, torch.Tensor] = {}
        for name in self.source.decoder.tensors():
            if not files.is_expert(name):
                weights[name] = state[module_name(self.source, name)]
        assert isinstance(files, TrainedFiles)
        for key in files.keys:
            buffers = files.buffers(CPU)
            files.read(key, buffers)
            gate_up, down = buffers[:2]
            parts = (gate_up[: files.width], gate_up[files.width :], down)
            weights |= dict(zip(files.names_of(key), parts, strict=True))
        save_model(out, self.source.decoder, weights, companions_of=self.source, record=record, overwrite=overwrite)


@contextmanager
def open_training(
    path: Path,
    scratch: Path,
    config: StreamConfig,
    optimizer: ExpertAdamW,
    *,
    device: torch.device = CPU,
) -> Iterator[Training]:
    """The model in `path` in training, its experts in the file `scratch`, which is made and goes at the end.

    Raises:
        ExportError, MismatchError, CapacityError: see `streaming.open_streamed`.
        PlanError: if `scratch` is there.
        OutputSpaceError: if there is no room for it: 12 bytes a weight of an expert.
    """
    if scratch.exists():
        raise PlanError(f"{scratch} is there already; name a file that may be made, and goes when the training ends")
    trainers: list[Trainer] = []

    def experts(layer: int, count: int, act_fn: Any, store: ExpertStore, ahead: Ahead) -> StreamedExperts:
        if not trainers:
            trainers.append(Trainer(optimizer, store))  # one for all layers: it knows the way back
        return _TrainedExperts(layer, count, act_fn, store, ahead, trainer=trainers[0])

    def files(source: ModelDirectory, dtype: torch.dtype) -> TrainedFiles:
        return TrainedFiles(source, dtype, scratch)

    try:
        with open_streamed(path, config, device=device, files=files, experts=experts) as (model, store):
            yield Training(model=model.train().requires_grad_(True), store=store, source=store.files.source)
    finally:
        scratch.unlink(missing_ok=True)
