# SPDX-License-Identifier: Apache-2.0
"""How many bits each expert's weights get: the least harm within so many bytes (EdgeMoE 2308.14352, section 3.2).

EdgeMoE lowers the bits of one expert after the other, least sensitive first, until a tolerance is spent. With what each
expert loses at each width known and taken to add up, that is a knapsack with several choices an item, and the search's
own solver proves the best of them. Harm is the mean square of what rounding changes in a layer's output, weighted as
the router weights it, by the mean square of that output: an expert that is rarely taken may lose more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...export.engines import ENGINES, Engine
from ..solver import Problem, Row, Solution, solve
from .errors import CapacityError, PlanError

WIDTHS = (2, 3, 4, 8)
"""Bits that are tried, beside those of the source."""
GROUP = 32
"""Weights of a row that share a scale of 16 bits."""
Granularity = Literal["expert", "layer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BitPlan:
    """Bits of each expert."""

    bits: np.ndarray
    """(layers, experts) int64; the source's own number where nothing is rounded."""
    harm: float
    """The sum over experts, as it was measured one by one."""
    baseline: np.ndarray
    """Bits that fill the same bytes without looking at harm: one width for all, and the next one for as many of the
    first experts, layer by layer, as there is room for. (layers, experts)."""
    baseline_harm: float
    mean_bits: float
    """Scales included."""
    proven: bool
    """No plan within the bytes harms less, if harms add up."""


def bytes_of(bits: int, parameters: float, source_bits: int) -> float:
    """Of one expert: packed weights and their scales; as it is in the source if nothing is rounded."""
    return parameters * bits / 8 + (parameters / GROUP * 2 if bits < source_bits else 0.0)


def require_bits(mean_bits: float, widths: Sequence[int], parameters: float) -> None:
    """Before the work.

    Raises:
        CapacityError: if even the narrowest width takes more.
    """
    least = 8 * bytes_of(widths[0], parameters, widths[-1]) / parameters
    if least > mean_bits:
        raise CapacityError(
            f"{mean_bits:g} bits a weight are fewer than the narrowest width takes with its scales "
            f"({least:g}): ask for more with --bits"
        )


def plan_bits(
    harm: np.ndarray,
    widths: Sequence[int],
    *,
    parameters: float,
    mean_bits: float,
    granularity: Granularity = "expert",
    seconds: float = 60.0,
) -> BitPlan:
    """harm: (layers, experts, widths), widths ascending, the last being the source's. mean_bits: at most, with scales.

    Raises:
        CapacityError: if even the narrowest width takes more.
        PlanError: if the widths or harms cannot be.
    """
    if list(widths) != sorted(set(widths)) or harm.shape[2] != len(widths) or not np.isfinite(harm).all():
        raise PlanError("bits need ascending widths, and a finite harm for each expert and width")
    layers, experts, _ = harm.shape
    sizes = np.array([bytes_of(width, parameters, widths[-1]) for width in widths])
    require_bits(mean_bits, widths, parameters)
    limit = mean_bits / 8 * parameters * layers * experts
    items = harm.reshape(-1, len(widths)) if granularity == "expert" else harm.sum(1)
    each = 1 if granularity == "expert" else experts
    problem = Problem(
        scores=tuple(items),
        rows=(Row(name="bytes", costs=(each * sizes,) * len(items), limit=limit),),
    )
    found = solve(problem, seconds=seconds)
    if not isinstance(found, Solution):
        raise PlanError(f"no bits could be chosen within {seconds:g} s ({found}); ask for another number with --bits")
    choice = np.repeat(np.array(found.choice), each).reshape(layers, experts)
    plain = np.repeat(_filled(each * sizes, len(items), limit), each).reshape(layers, experts)
    return BitPlan(
        bits=np.array(widths)[choice],
        harm=_harm_of(harm, choice),
        baseline=np.array(widths)[plain],
        baseline_harm=_harm_of(harm, plain),
        mean_bits=float(8 * sizes[choice].mean() / parameters),
        proven=found.proven,
    )


def _harm_of(harm: np.ndarray, choice: np.ndarray) -> float:
    return float(np.take_along_axis(harm, choice[:, :, None], axis=2).sum())


def _filled(sizes: np.ndarray, items: int, limit: float) -> np.ndarray:
    """The widest width that all items can have, and for the first of them the next wider one: (items,) places."""
    narrow = max(place for place in range(len(sizes)) if sizes[place] * items <= limit)
    found = np.full(items, narrow)
    if narrow + 1 < len(sizes):
        found[: int((limit - sizes[narrow] * items) / (sizes[narrow + 1] - sizes[narrow]))] = narrow + 1
    return found


def servable(bits: np.ndarray) -> dict[str, str]:
    """For each engine a sentence: how it serves experts of these bits, or why it does not."""
    return {name: _no_experts(engine) or _served(name, engine.layout, bits) for name, engine in ENGINES.items()}


def _no_experts(engine: Engine) -> str:
    """Why an engine serves no mixture at all; empty if it serves one."""
    rules = [engine.rules[feature] for feature in ("mixtral", "qwen2_moe", "qwen3_moe")]
    return f"no: {rules[0].why}" if all(rule.support == "no" for rule in rules) else ""


_FUSED: Mapping[str, str] = {
    "transformers": "it holds a layer's experts as one parameter",
    "vllm": "its fused kernel takes one scheme for all experts of a layer",
    "llama.cpp": "a layer's experts are one tensor of one type in GGUF",
    "sglang": "its fused kernel takes one scheme for all experts of a layer",
    "tensorrt-llm": "its fused kernel takes one scheme for all experts of a layer",
    "openvino": "its exporter writes a layer's experts as one operation, of one type",
}
_GGUF = {8: "q8_0", 4: "q4_k"}


def _served(name: str, layout: str, bits: np.ndarray) -> str:
    widths = sorted(set(bits.ravel().tolist()))
    if (bits != bits[:, :1]).any():
        return f"no: experts of one layer differ, and {_FUSED[name]}"
    if len(widths) > 1:
        return "no: layers differ, and refound export writes one format for a whole model"
    if layout == "gguf" and widths[0] in _GGUF:
        return f"yes, in llama.cpp's own rounding: refound export --to {name} --quantize {_GGUF[widths[0]]}"
    if widths[0] >= 16:
        return f"yes, nothing is rounded: refound export --to {name}"
    return f"no: refound export writes no experts of {widths[0]} bits for it"


def told_of(plan: BitPlan, source_bits: int) -> dict[str, Any]:
    """What its file says, but for what was measured."""
    return {
        "plan": {
            "bits": plan.bits.tolist(),
            "mean_bits": plan.mean_bits,
            "group": GROUP,
            "source_bits": source_bits,
        },
        "proven": plan.proven,
        "served": servable(plan.bits),
        "baseline": plan.baseline.tolist(),
        "predicted": {"without": plan.baseline_harm, "with": plan.harm},
    }
