# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts that is larger than memory: experts come from disk over host memory to the device as needed.

Two levels (SE-MoE 2205.10034 calls it a 2D prefetch): *host slots*, filled from the model's safetensors files by a
thread, and *device slots*, filled from those. What is resident beside them is the model without its experts. While a
layer computes, the experts that the next layers are expected to need are read ahead; the expectation is what each layer
needed last, and being wrong costs a read and no correctness.

The mathematics is that of transformers' own experts loop, operation for operation, so outputs are equal to the bit to
those of the same model with all of its experts in memory and `experts_implementation="eager"`. `streamed_training` adds
gradients.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...export.directory import ModelDirectory, open_directory
from .errors import MismatchError
from .expert_store import CPU, ExpertFiles, ExpertStore, StreamConfig


class StreamedExperts(torch.nn.Module):
    """In the place of a layer's experts: the same loop, each expert asked for when its turn comes."""

    def __init__(self, layer: int, count: int, act_fn: Callable[..., torch.Tensor], store: ExpertStore, plan: "Ahead"):
        super().__init__()
        self.layer, self.count, self.act_fn, self.store, self._plan = layer, count, act_fn, store, plan

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(tokens, hidden), (tokens, top_k), (tokens, top_k) to (tokens, hidden)."""
        out = torch.zeros_like(hidden_states)
        mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.count).permute(2, 1, 0)
        needed = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist()
        self._plan.entered(self.layer, needed)
        for expert in needed:
            place, token = torch.where(mask[expert])
            found = self.one(expert, hidden_states[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, found.to(out.dtype))
        return out

    def one(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        """What one expert answers: (tokens, hidden) in and out."""
        gate_up, down = self.store.get((self.layer, expert))[:2]
        return gated(inputs, gate_up, down, self.act_fn)


def gated(
    inputs: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, act_fn: Callable[..., torch.Tensor]
) -> torch.Tensor:
    gate, up = torch.nn.functional.linear(inputs, gate_up).chunk(2, dim=-1)
    return torch.nn.functional.linear(act_fn(gate) * up, down)


class Ahead:
    """Tells the store what comes: the rest of this layer, then what later layers needed last."""

    def __init__(self, layers: Sequence[int], store: ExpertStore) -> None:
        self._layers, self._store = list(layers), store
        self._last: dict[int, list[int]] = {}

    def entered(self, layer: int, needed: Sequence[int]) -> None:
        self._last[layer] = list(needed)
        if self._store.config.read_ahead < 1:
            return
        place = self._layers.index(layer)
        following = [
            self._layers[(place + step) % len(self._layers)] for step in range(1, self._store.config.read_ahead + 1)
        ]
        keys = [(layer, expert) for expert in needed]
        self._store.expect(keys + [(later, expert) for later in following for expert in self._last.get(later, ())])


@contextmanager
def open_streamed(
    path: Path,
    config: StreamConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    files: Callable[[ModelDirectory, torch.dtype], ExpertFiles] = ExpertFiles,
    experts: Callable[..., StreamedExperts] = StreamedExperts,
) -> Iterator[tuple[Any, ExpertStore]]:
    """The model in `path` as transformers' class, with streamed experts: (model, store), in evaluation mode.

    files: what reads experts, where they shall be other than they are stored. experts: what computes with them.

    Raises:
        ExportError: see `export.directory.open_directory`.
        MismatchError: if it has no experts, or experts of different widths.
        CapacityError: if there is no slot.
    """
    source = open_directory(path, tokenizer=False)
    reader = files(source, dtype)
    store = ExpertStore(reader, config, device)
    try:
        yield _without_experts(source, store, device, experts), store
    finally:
        store.close()


def _without_experts(
    source: ModelDirectory, store: ExpertStore, device: torch.device, experts: Callable[..., StreamedExperts]
) -> Any:
    """The model on the meta device, experts replaced, and all else filled from the files."""
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    config, files = AutoConfig.from_pretrained(source.path), store.files
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=files.dtype)
    ahead = Ahead(files.layers, store)
    for index in files.layers:
        block = model.model.layers[index].mlp
        count = source.decoder.layers[index].ffn.experts
        block.experts = experts(index, count, block.experts.act_fn, store, ahead)
    names = [name for name in source.decoder.tensors() if not files.is_expert(name)]
    weights: Mapping[str, torch.Tensor] = {
        module_name(source, name): tensor.to(device, files.dtype) for name, tensor in source.weights(names)
    }
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    tied = {"lm_head.weight"} if source.decoder.tied else set()
    if unexpected or set(missing) - tied:
        odd = sorted({*unexpected, *(set(missing) - tied)})
        raise MismatchError(f"{source.path}: transformers names weights otherwise than its files: {', '.join(odd[:4])}")
    if source.decoder.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config).to(device)  # not a weight, so it was left without storage
    return model.eval().requires_grad_(False)


def module_name(source: ModelDirectory, name: str) -> str:
    """Mixtral's files call the block otherwise than its module does."""
    return name.replace(".block_sparse_moe.", ".mlp.") if source.decoder.family == "mixtral" else name
