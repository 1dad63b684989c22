# SPDX-License-Identifier: Apache-2.0
"""Structured pruning adapters for language models: LoRA, trained while FFN channels and heads are taken away.

After SPA (arXiv:2211.10155), W' = (W + B A) * m with a mask m of whole rows and columns: a channel of an FFN goes with
its rows in the matrices before the activation and its column in the one behind, a KV head with its queries and their
columns in the output. What is left is a smaller base and a standard LoRA for it, which compute what was trained.

Channels go by their first-order importance (Molchanov et al. 2017, arXiv:1611.06440): |dL/dm|, averaged over steps, the
least first, a growing share on a cubic schedule (Zhu and Gupta 2017, arXiv:1710.01878). All layers keep equally many,
so that the sliced base is a plain model of its family.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .errors import TuneUsageError, UnknownBlocksError
from .method import WEIGHTS, Recast
from .peft_methods import Lora, PeftAttached, check_tensors
from .sites import BLOCKS, Site, blocks_of, sites

_SMOOTHING = 0.9


@dataclass(frozen=True, kw_only=True)
class PrunedLora(Lora):
    """LoRA on a base that shrinks meanwhile."""

    ffn: float = 0.25
    """Share of the channels of each FFN that goes, rounded so that `multiple` divides what stays."""
    kv_heads: int = 0
    """Of each layer that go, with the queries that read them. Llama's kind of attention only."""
    multiple: int = 32
    start: float = 0.1
    """Share of the steps before anything goes, and after which all is gone."""
    end: float = 0.6

    def problems(self) -> list[str]:
        found = Lora.problems(self)
        if not 0 <= self.ffn < 1:
            found.append(f"method.ffn is {self.ffn}; it must lie between 0 and 1")
        if self.kv_heads < 0 or self.multiple < 1:
            found.append("method.kv_heads must be at least 0, and method.multiple at least 1")
        if not 0 <= self.start <= self.end <= 1:
            found.append("method.start and method.end must lie between 0 and 1, in this order")
        return found

    def attach(self, model: torch.nn.Module, *, seed: int) -> "PrunedAttached":
        """Raises UnknownBlocksError if FFNs or heads of the family cannot shrink; TuneUsageError if none would stay."""
        if not blocks_of(model).width_key:
            raise UnknownBlocksError(
                "the width of this family's FFN follows from its hidden size: none can be narrower"
            )
        masks = {f"{site.prefix}{site.part}": self._mask(model, site) for site in self._sites(model)}
        return PrunedAttached(model, self.lora_on(model, seed), self, masks)

    def _sites(self, model: torch.nn.Module) -> list[Site]:
        parts = [*(["mlp"] if self.ffn else []), *(["attention"] if self.kv_heads else [])]
        kind: Any = model.config
        if self.kv_heads and (blocks_of(model) is not BLOCKS["llama"] or kind.model_type == "nemotron-nas"):
            raise UnknownBlocksError(
                "heads are taken away from Llama's kind of attention only, alike in all layers: set method.kv_heads = 0"
            )
        return sites(model, parts)

    def _mask(self, model: torch.nn.Module, site: Site) -> "Mask":
        last: Any = model.get_submodule(site.exit)
        columns: int = last.in_features
        if site.part == "mlp":
            stays = max(round(columns * (1 - self.ffn) / self.multiple), 1) * self.multiple
            return Mask(site=site, units=columns, goes=max(columns - stays, 0), unit=1)
        config: Any = model.config
        units = int(config.num_key_value_heads)
        if self.kv_heads >= units:
            raise TuneUsageError(
                f"method.kv_heads is {self.kv_heads} and each layer has {units}; at least one must stay"
            )
        return Mask(site=site, units=units, goes=self.kv_heads, unit=columns // units)


class Mask:
    """Which units of one subblock are there: channels of an FFN, or KV heads with their queries."""

    def __init__(self, *, site: Site, units: int, goes: int, unit: int) -> None:
        self.site, self.goes, self._unit = site, goes, unit
        self.there = torch.ones(units)
        self.importance = torch.zeros(units)
        self._live: torch.Tensor | None = None

    def hook(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        there = self.there
        if torch.is_grad_enabled():
            there = self._live = self.there.detach().clone().requires_grad_()
        return (inputs[0] * there.repeat_interleave(self._unit).to(inputs[0].dtype), *inputs[1:])

    def after_step(self, share: float) -> None:
        """share: of the units that go in the end, that are to be gone now."""
        gradient = self._live.grad if self._live is not None else None
        if gradient is not None:
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(gradient)
            self.importance.mul_(_SMOOTHING).add_((1 - _SMOOTHING) * gradient.abs())
        self._live = None
        missing = round(share * self.goes) - int((self.there == 0).sum())
        if missing > 0:
            least = self.importance.masked_fill(self.there == 0, torch.inf).argsort(stable=True)[:missing]
            self.there[least] = 0

    @property
    def kept(self) -> torch.Tensor:
        """Units, rising."""
        return self.there.nonzero()[:, 0]

    def rows(self, of: int) -> torch.Tensor:
        """What stays of a matrix with `of` rows (or columns) on this side."""
        size = of // len(self.there)
        return (self.kept[:, None] * size + torch.arange(size)).flatten()


class PrunedAttached:
    """See `method.Attached`."""

    def __init__(self, model: Any, lora: PeftAttached, settings: PrunedLora, masks: Mapping[str, Mask]) -> None:
        self.model, self._lora, self._settings, self._masks = lora.model, lora, settings, masks
        self._config = model.config
        modules = dict(model.named_modules())
        for mask in masks.values():
            modules[mask.site.exit].register_forward_pre_hook(mask.hook)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return self._lora.trained()

    def changing(self) -> dict[str, torch.Tensor]:
        found = {f"{name}.there": mask.there for name, mask in self._masks.items()}
        return found | {f"{name}.importance": mask.importance for name, mask in self._masks.items()}

    def after_step(self, step: int, steps: int) -> None:
        first, last = self._settings.start * steps, self._settings.end * steps
        share = min(max((step - first) / max(last - first, 1e-9), 0.0), 1.0)
        for mask in self._masks.values():
            mask.after_step(1 - (1 - share) ** 3 if step < last else 1.0)

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: one.detach().clone() for name, one in self.trained().items()}
        save_file(tensors | self.changing(), folder / WEIGHTS, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        own = {name: one.detach() for name, one in self.trained().items()} | self.changing()
        tensors = load_file(folder / WEIGHTS)
        check_tensors(folder, tensors, own)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    # --- slicing -------------------------------------------------------------------------------------------------

    def recast(self) -> Recast:
        """Merged and sliced."""
        return self._sliced(self._lora.recast().weights)

    def sliced_base(self) -> Recast:
        """The base alone, sliced."""
        return self._sliced({})

    def sliced_pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The LoRA for `sliced_base`: A and B by module, the scale in B."""
        cuts, pairs = self._cuts(), {}
        for name, layer in self._lora.layers():
            (key,) = layer.lora_A
            a = layer.lora_A[key].weight.detach()
            b = layer.scaling[key] * layer.lora_B[key].weight.detach()
            mask, axis = cuts.get(name, (None, 0))
            if mask is not None and axis == 0:
                b = b[mask.rows(b.shape[0])]
            elif mask is not None:
                a = a[:, mask.rows(a.shape[1])]
            pairs[name] = (a.contiguous(), b.contiguous())
        return pairs

    def _cuts(self) -> dict[str, tuple[Mask, int]]:
        """Which axis of each module is cut, and by which mask."""
        cuts: dict[str, tuple[Mask, int]] = {}
        for mask in self._masks.values():
            cuts |= dict.fromkeys(mask.site.entries, (mask, 0)) | {mask.site.exit: (mask, 1)}
        return cuts

    def _sliced(self, changed: Mapping[str, torch.Tensor]) -> Recast:
        state = {
            name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter.detach()
            for name, parameter in self.model.named_parameters()
        } | dict(changed)
        weights = dict(changed)
        for name, (mask, axis) in self._cuts().items():
            weight = state[f"{name}.weight"]
            weights[f"{name}.weight"] = weight.index_select(axis, mask.rows(weight.shape[axis])).contiguous()
            if axis == 0 and f"{name}.bias" in state:
                bias = state[f"{name}.bias"]
                weights[f"{name}.bias"] = bias[mask.rows(len(bias))]
        widths = {m.site.layer: len(m.kept) for m in self._masks.values() if m.site.part == "mlp"}
        heads = {m.site.layer: len(m.kept) for m in self._masks.values() if m.site.part == "attention"}
        return Recast(how="sliced", weights=weights, widths=widths, kv_heads=heads)
