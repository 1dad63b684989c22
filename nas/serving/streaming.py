# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts that is larger than memory: experts come from disk over host memory to the device as needed.

Two levels, each with slots that are made once (SE-MoE 2205.10034 calls it a 2D prefetch): *host slots*, filled from the
model's safetensors files by a thread, and *device slots*, filled from those. What is resident beside them is the model
without its experts. While a layer computes, the experts that the next layers are expected to need are read ahead; the
expectation is a plan's tables or simply what each layer needed last, and being wrong costs a read and no correctness.

The mathematics is that of transformers' own experts loop, operation for operation, so outputs are equal to the bit to
those of the same model with all of its experts in memory and `experts_implementation="eager"`. No gradients: what is
streamed is evaluated, not trained.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...export.directory import ModelDirectory, open_directory
from .errors import CapacityError, MismatchError

Key = tuple[int, int]
"""Layer (its number in the model) and expert."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How much memory experts may take, in experts of the model."""

    device_slots: int = 8
    host_slots: int = 32
    read_ahead: int = 1
    """Layers whose expected experts are read while one computes. 0: none."""


@dataclass(kw_only=True)
class Counts:
    """What has happened since the model was opened."""

    asked: int = 0
    on_device: int = 0
    """Of those asked for, found in a device slot."""
    in_host: int = 0
    """Found in a host slot, or on their way into one."""
    from_disk: int = 0
    read_ahead: int = 0
    """Read before a layer asked, used or not."""


class ExpertFiles:
    """Reads one expert's matrices out of the model's files, in the form in which the experts loop uses them."""

    def __init__(self, source: ModelDirectory, dtype: torch.dtype) -> None:
        moe = source.decoder.blocks.moe
        if moe is None:
            raise MismatchError(
                f"{source.path} has no experts (it is {source.decoder.family}); nothing is to be streamed"
            )
        self.layers = [index for index, layer in enumerate(source.decoder.layers) if layer.ffn.kind == "moe"]
        self._source, self._moe, self.dtype = source, moe, dtype
        ffns = {(source.decoder.layers[index].ffn.width, source.decoder.hidden_size) for index in self.layers}
        if len(ffns) != 1:
            raise MismatchError(f"{source.path} has experts of different widths; slots are of one size")
        self.width, self.hidden = next(iter(ffns))

    @property
    def expert_bytes(self) -> int:
        return 3 * self.width * self.hidden * torch.empty((), dtype=self.dtype).element_size()

    def is_expert(self, name: str) -> bool:
        prefix, _, _ = self._moe.expert.partition("{expert}")
        return name.startswith("model.layers.") and name.split(".", 3)[3].startswith(prefix)

    def read(self, key: Key, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Fill gate_up (2 width, hidden) and down (hidden, width) from disk; the file is mapped, not kept."""
        layer, expert = key
        pattern = f"model.layers.{layer}.{self._moe.expert}.weight".replace("{expert}", str(expert))
        targets = (gate_up[: self.width], gate_up[self.width :], down)
        names = [pattern.format(matrix) for matrix in self._moe.matrices]
        found = dict(self._source.weights(names))
        for name, target in zip(names, targets, strict=True):
            target.copy_(found[name])


class _Slots:
    """Pairs of buffers that are made once, and which expert each holds; what was used longest ago is given up."""

    def __init__(self, count: int, files: ExpertFiles, device: torch.device) -> None:
        self._free = [
            (
                torch.empty(2 * files.width, files.hidden, dtype=files.dtype, device=device),
                torch.empty(files.hidden, files.width, dtype=files.dtype, device=device),
            )
            for _ in range(count)
        ]
        self.held: OrderedDict[Key, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()

    def get(self, key: Key) -> tuple[torch.Tensor, torch.Tensor] | None:
        if key in self.held:
            self.held.move_to_end(key)
        return self.held.get(key)

    def take(
        self, key: Key, *, keep: Callable[[Key], bool] = lambda _: False
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A buffer for `key`; None if all slots hold what must be kept."""
        if self._free:
            self.held[key] = self._free.pop()
            return self.held[key]
        for old in self.held:
            if not keep(old):
                self.held[key] = self.held.pop(old)
                return self.held[key]
        return None

    def give_back(self, key: Key) -> None:
        self._free.append(self.held.pop(key))


class ExpertStore:
    """Experts on disk, in host slots and in device slots. `get` may be called by one thread at a time."""

    def __init__(self, files: ExpertFiles, config: StreamConfig, device: torch.device) -> None:
        if min(config.device_slots, config.host_slots) < 1 or config.read_ahead < 0:
            raise CapacityError(
                f"{config.device_slots} device slots and {config.host_slots} host slots: at least one of each is needed"
            )
        self.files, self.config, self.counts = files, config, Counts()
        self._device, self._host = _Slots(config.device_slots, files, device), _Slots(config.host_slots, files, _CPU)
        self._reading: dict[Key, Future[None]] = {}
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="expert-reader")

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def get(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        """The expert's (gate_up, down) on the device, valid until the next call."""
        self.counts.asked += 1
        found = self._device.get(key)
        if found is not None:
            self.counts.on_device += 1
            return found
        gate_up, down = self._from_host(key)
        slot = self._device.take(key)
        assert slot is not None
        slot[0].copy_(gate_up)
        slot[1].copy_(down)
        return slot

    def expect(self, keys: Sequence[Key]) -> None:
        """Begin to read these into host slots, as far as there is room beside what is being read already."""
        for key in keys:
            with self._lock:
                if key in self._device.held or key in self._host.held:
                    continue
                slot = self._host.take(key, keep=lambda old: old in self._reading)
                if slot is None:
                    return
                self._reading[key] = self._reader.submit(self._read, key, slot)
                self.counts.read_ahead += 1

    def _read(self, key: Key, slot: tuple[torch.Tensor, torch.Tensor]) -> None:
        try:
            self.files.read(key, *slot)
        except BaseException:
            with self._lock:
                self._host.give_back(key)  # it holds half of something
            raise
        finally:
            with self._lock:
                self._reading.pop(key, None)

    def _from_host(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lock:
            found, coming = self._host.get(key), self._reading.get(key)
            self.counts.in_host += found is not None
        if coming is not None:
            coming.result()
        if found is None:
            found = self._read_now(key)
        return found

    def _read_now(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        self.counts.from_disk += 1
        while True:
            with self._lock:
                slot = self._host.take(key, keep=lambda old: old in self._reading)
                waiting = next(iter(self._reading.values()), None)
            if slot is not None:
                try:
                    self.files.read(key, *slot)
                except BaseException:
                    with self._lock:
                        self._host.give_back(key)
                    raise
                return slot
            assert waiting is not None  # every slot is being read into: one of them will be done
            waiting.result()


_CPU = torch.device("cpu")


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
            gate_up, down = self.store.get((self.layer, expert))
            gate, up = torch.nn.functional.linear(hidden_states[token], gate_up).chunk(2, dim=-1)
            found = torch.nn.functional.linear(self.act_fn(gate) * up, down)
            found = found * top_k_weights[token, place, None]
            out.index_add_(0, token, found.to(out.dtype))
        return out


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
    device: torch.device = _CPU,
    files: Callable[[ModelDirectory, torch.dtype], ExpertFiles] = ExpertFiles,
) -> Iterator[tuple[Any, ExpertStore]]:
    """The model in `path` as transformers' class, with streamed experts: (model, store), in evaluation mode.

    files: what reads experts, where they shall be other than they are stored.

    Raises:
        ExportError: see `export.directory.open_directory`.
        MismatchError: if it has no experts, or experts of different widths.
        CapacityError: if there is no slot.
    """
    source = open_directory(path, tokenizer=False)
    reader = files(source, dtype)
    store = ExpertStore(reader, config, device)
    try:
        yield _without_experts(source, reader, store, device), store
    finally:
        store.close()


def _without_experts(source: ModelDirectory, files: ExpertFiles, store: ExpertStore, device: torch.device) -> Any:
    """The model on the meta device, experts replaced, and all else filled from the files."""
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.path)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=files.dtype)
    ahead = Ahead(files.layers, store)
    for index in files.layers:
        block = model.model.layers[index].mlp
        count = source.decoder.layers[index].ffn.experts
        block.experts = StreamedExperts(index, count, block.experts.act_fn, store, ahead)
    names = [name for name in source.decoder.tensors() if not files.is_expert(name)]
    weights: Mapping[str, torch.Tensor] = {
        _in_module(source, name): tensor.to(device, files.dtype) for name, tensor in source.weights(names)
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


def _in_module(source: ModelDirectory, name: str) -> str:
    """Mixtral's files call the block otherwise than its module does."""
    return name.replace(".block_sparse_moe.", ".mlp.") if source.decoder.family == "mixtral" else name
