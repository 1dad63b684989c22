# SPDX-License-Identifier: Apache-2.0
"""What a variant costs: parameters and bytes exactly, times measured on this device.

Times are differences between whole models, so that caches and the cost of calling are as in use: in a model as large as
the teacher every layer gets the variant, and what that saves (or costs) is divided by the number of layers. A child's
time is then the teacher's plus the sum of its differences. Weights in another format cost the time of the source's:
transformers unpacks them before it computes. Their bytes are exact.
"""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distill.models import build
from ..export.architecture import FFN, Attention, Decoder, Layer
from .blocks import Module, fill, make, parameters, part_of, shapes
from .experts import bias_parameters, idle_parameters, served_body
from .formats import Block, rounding_in, source_of, stored_bytes
from .jobs import Job, Result
from .recipe import TORCH, Recipe, Workload
from .space import SearchSpace, name_of
from .speed import Times, by_turns, measure_once, median, threads

METHOD = 1
_NORM = "post_attention_layernorm.weight"


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Times of a child: those of the base model plus one difference for each subblock."""

    base: Layer
    """The teacher's most frequent layer, which the base model has everywhere."""
    base_times: dict[str, Times]
    """By workload, of the base model."""
    blocks: dict[tuple[str, str], dict[str, Times]]
    """(part, name) to workload to the difference from the base's own subblock. Those that failed are left out."""

    def difference(self, block: Block, workload: str) -> Times:
        return self.blocks[_kind(block)][workload]

    def knows(self, block: Block) -> bool:
        return _kind(block) in self.blocks

    def child(self, decoder: Decoder, workload: Workload) -> Times:
        """Predicted times of a child."""
        total = self.base_times[workload.name]
        for layer in decoder.layers:
            total = total + self.difference(layer.attention, workload.name)
            total = total + self.difference(layer.ffn, workload.name)
        return total


def _kind(block: Block) -> tuple[str, str]:
    return part_of(block), name_of(source_of(block))


def distinct_blocks(space: SearchSpace) -> list[Block]:
    """Every kind of subblock once, whatever its format; layers that are alike cost alike."""
    found: dict[tuple[str, str], Block] = {}
    for layer in space.layers:
        for block in (*layer.attention, *layer.ffn):
            found.setdefault(_kind(block), source_of(block))
    return list(found.values())


def base_layer(teacher: Decoder) -> Layer:
    return Counter(teacher.layers).most_common(1)[0][0]


def cost_job(teacher: Decoder, recipe: Recipe, block: Block) -> Job:
    """Measures the block; the base's own blocks give the base model's times."""
    costs = recipe.costs
    engine = {} if costs.engine == TORCH else {"engine": costs.engine, "quantize": costs.quantize}
    return Job(
        kind="costs",
        key={
            "method": METHOD,
            "base": [name_of(base_layer(teacher).attention), name_of(base_layer(teacher).ffn)],
            "sizes": [teacher.hidden_size, teacher.heads, teacher.head_dim, len(teacher.layers), teacher.vocab_size],
            "part": part_of(block),
            "block": name_of(block),
            "workloads": [asdict(workload) for workload in recipe.costs.workloads],
            "repeats": recipe.costs.repeats,
            "device": device_name(),
            "torch": str(torch.__version__),
            "threads": recipe.costs.threads or torch.get_num_threads(),
            **engine,
        },
    )


def device_name() -> str:
    """The accelerator, or the CPU as Linux names it."""
    if torch.accelerator.current_accelerator(check_available=True) is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class CostMeter:
    """Measures subblocks in a base model of random weights, which is made once."""

    def __init__(self, teacher: Decoder, recipe: Recipe, device: torch.device) -> None:
        self._teacher, self._recipe, self._device = teacher, recipe, device
        self._base: Any = None

    def compute(self, block: Block) -> Result:
        """By workload: `base` (the base model's times) and `difference` (for one subblock of this kind)."""
        model = self._model()
        part, base = part_of(block), base_layer(self._teacher)
        own = base.attention if part == "attention" else base.ffn
        settings = self._recipe.costs
        before = [Module.of(layer, part) for layer in model.model.layers]
        after = before if block == own else [self._random(block, index) for index in range(len(before))]

        def timed(modules: Sequence[Module], workload: Workload) -> Times:
            for layer, module in zip(model.model.layers, modules, strict=True):
                module.into(layer)
            return measure_once(model, workload)

        facts: dict[str, Any] = {}
        try:
            with threads(settings.threads):
                for workload in settings.workloads:
                    measures = [partial(timed, before, workload), partial(timed, after, workload)]
                    with_own, with_other = by_turns(measures, settings.repeats)
                    differences = [one - other for one, other in zip(with_other, with_own, strict=True)]
                    facts[workload.name] = {
                        "base": asdict(median(with_own)),
                        "difference": asdict(median(differences).scaled(1 / len(before))),
                    }
        finally:
            for layer, module in zip(model.model.layers, before, strict=True):
                module.into(layer)
        return {}, facts

    def _model(self) -> Any:
        if self._base is None:
            base = base_layer(self._teacher)
            decoder = replace(self._teacher, layers=(base,) * len(self._teacher.layers))
            weights = {name: noise(spec.shape) for name, spec in decoder.tensors().items()}
            self._base = build(decoder, weights, dtype=torch.float32)
            self._base.to(self._device)
        return self._base

    def _random(self, block: Block, layer: int) -> Module:
        module = make(self._teacher, block)
        if isinstance(block, FFN) and block.kind == "moe":  # in the way that computes only what a token takes
            norm = fill(Module("ffn", module.norm, nn.Identity()), {_NORM: noise((self._teacher.hidden_size,))}).norm
            return Module("ffn", norm, served_body(self._teacher, block)).moved(self._device)
        fill(module, {name: noise(shape) for name, shape in shapes(self._teacher, block).items()})
        if isinstance(block, Attention) and block.kind == "grouped":
            module.body.layer_idx = layer  # type: ignore[assignment]  # its place in the cache
        return module.moved(self._device)


def noise(shape: tuple[int, ...]) -> torch.Tensor:
    """Weights to measure with, the same for the same shape."""
    # Zeros or the same number everywhere could be multiplied faster than what a model has.
    generator = torch.Generator().manual_seed(sum(shape))
    return 0.02 * torch.randn(shape, generator=generator)


def read_table(teacher: Decoder, found: Sequence[tuple[Block, dict[str, Any]]]) -> CostTable:
    """The table out of the facts of all cost jobs."""
    base = base_layer(teacher)
    blocks = {
        (part_of(block), name_of(block)): {
            name: Times(**told["difference"]) for name, told in facts.items() if name != "infeasible"
        }
        for block, facts in found
        if "infeasible" not in facts
    }
    nothing = Times(prefill_s=0.0, decode_s=0.0)
    own = [(block, facts) for block, facts in found if block in (base.attention, base.ffn)]
    names = list(own[0][1])
    times = {name: median([Times(**facts[name]["base"]) for _, facts in own]) for name in names}
    for block, _ in own:
        blocks[part_of(block), name_of(block)] = dict.fromkeys(names, nothing)
    return CostTable(base=base, base_times=times, blocks=blocks)


def active_parameters(teacher: Decoder, block: Block) -> int:
    """Those that a token takes: all but those of the experts that it does not."""
    return parameters(teacher, block) - idle_parameters(block, teacher.hidden_size)


def kind_parameters(teacher: Decoder, attention: Attention, kind: str) -> int:
    """What a layer of a child of this kind has beside its subblocks: zeros that the layout of experts insists on."""
    return bias_parameters(teacher, attention) if kind else 0


def weight_bytes(teacher: Decoder, block: Block, bits: int) -> float:
    """Stored. bits: of a number that is not rounded."""
    rounding = rounding_in(block)
    return sum(stored_bytes(shape, name, rounding, bits) for name, shape in shapes(teacher, block).items())


def cache_bytes(teacher: Decoder, block: Block, workload: Workload, bits: int) -> float:
    """Of keys and values at the end of the workload."""
    if not isinstance(block, Attention) or block.kind != "grouped":
        return 0.0
    tokens = workload.batch * (workload.prompt + workload.new)
    return 2 * block.kv_heads * teacher.head_dim * tokens * bits / 8
