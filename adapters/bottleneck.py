# SPDX-License-Identifier: Apache-2.0
"""Series and parallel bottleneck adapters, which PEFT does not have.

    series:    h + s U act(D h)            h: what a subblock adds to the residual stream
    parallel:  f(x) + s U act(D x)         x: what the subblock reads
    gated:     f(x) + s U (act(G x) * D x)

Placements and width of LLM-Adapters (arXiv:2304.01933): series after the FFN, parallel beside it, 256. U starts at
zero, so that step 0 is the base (He et al. 2022, arXiv:2110.04366). No biases, so that FFNs without can take them up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from .errors import NotServableError
from .fold import Widening, can_fold, widen
from .method import WEIGHTS, Recast, Steady
from .peft_methods import check_tensors
from .sites import Site, blocks_of, sites

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "linear": lambda x: x,
}
_PLACEMENTS = {"mlp": ("mlp",), "attention": ("attention",), "both": ("attention", "mlp")}


class Bottleneck(torch.nn.Module):
    """(…, hidden) to (…, hidden), computed in float32."""

    def __init__(self, hidden: int, width: int, act: Callable[[torch.Tensor], torch.Tensor], gated: bool, scale: float):
        super().__init__()
        self.down = torch.nn.Linear(hidden, width, bias=False)
        self.gate = torch.nn.Linear(hidden, width, bias=False) if gated else None
        self.up = torch.nn.Linear(width, hidden, bias=False)
        torch.nn.init.zeros_(self.up.weight)
        self.act, self._scale = act, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        inner = self.act(self.down(wide)) if self.gate is None else self.act(self.gate(wide)) * self.down(wide)
        return (self._scale * self.up(inner)).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Series:
    """A bottleneck behind a subblock."""

    identity: ClassVar[str] = ""

    width: int = 256
    activation: str = "relu"
    placement: str = "mlp"
    scale: float = 1.0

    def problems(self) -> list[str]:
        return _problems(self.width, self.activation, self.placement, extra=())

    def attach(self, model: torch.nn.Module, *, seed: int) -> "BottleneckAttached":
        return BottleneckAttached(
            model, seed, self.width, self.activation, self.placement, self.scale, gated=False, parallel=False
        )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """A bottleneck beside a subblock. With the defaults it folds into a wider FFN wherever one can be had."""

    identity: ClassVar[str] = ""

    width: int = 256
    activation: str = "same"
    """"same": the FFN's own, and gated where that is; silu, relu, gelu or linear: without a gate."""
    placement: str = "mlp"
    scale: float = 1.0

    def problems(self) -> list[str]:
        found = _problems(self.width, self.activation, self.placement, extra=("same",))
        if self.activation == "same" and self.placement != "mlp":
            found.append('method.activation = "same" is the FFN\'s; beside attention name one')
        return found

    def attach(self, model: torch.nn.Module, *, seed: int) -> "BottleneckAttached":
        gated = self.activation == "same" and blocks_of(model).gated
        return BottleneckAttached(
            model, seed, self.width, self.activation, self.placement, self.scale, gated=gated, parallel=True
        )


class BottleneckAttached(Steady):
    """See `method.Attached`. The base's modules keep their names: adapters hang on hooks."""

    def __init__(
        self,
        model: torch.nn.Module,
        seed: int,
        width: int,
        activation: str,
        placement: str,
        scale: float,
        *,
        gated: bool,
        parallel: bool,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self._scale, self._activation, self._parallel = scale, activation, parallel
        self._adapters: dict[str, tuple[Site, Bottleneck]] = {}
        modules = dict(model.named_modules())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for site in sites(model, _PLACEMENTS[placement]):
                act: Any = site.activation if activation == "same" else ACTIVATIONS[activation]
                one = Bottleneck(site.hidden_size, width, act, gated, scale)
                one.to(next(modules[site.exit].parameters()).device)
                self._adapters[f"{site.prefix}{site.part}"] = (site, one)
                _hook(modules, site, one, parallel=parallel)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{name}.{part}": parameter
            for name, (_, one) in self._adapters.items()
            for part, parameter in one.named_parameters()
            if not part.startswith("act.")  # an activation with parameters is the base's
        }

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trained().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        tensors, own = load_file(folder / WEIGHTS), self.trained()
        check_tensors(folder, tensors, {name: parameter.detach() for name, parameter in own.items()})
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def recast(self) -> Recast:
        linear, blocks = self._activation == "linear", blocks_of(self.model)
        if any(site.part == "attention" for site, _ in self._adapters.values()) and (self._parallel or not linear):
            raise NotServableError(
                "an adapter at attention has a bottleneck of its own that no weight of attention can hold. Nearest "
                'that is served: the same with placement = "mlp", or kind = "lora" on targets = ["attention"]'
            )
        if not self._parallel:
            return self._merged_series(linear)
        site, one = next(iter(self._adapters.values()))
        assert site.activation is not None
        if problem := can_fold(blocks, self._activation, one.act, site.activation):
            raise NotServableError(problem)
        state = dict(self.model.named_parameters())
        wider: dict[str, torch.Tensor] = {}
        widths = {}
        for site, one in self._adapters.values():
            widening = Widening(
                first=(one.gate or one.down).weight.detach(),
                second=one.down.weight.detach() if one.gate is not None else None,
                out=self._scale * one.up.weight.detach(),
                both_signs=linear,
            )
            made = widen(state, site, widening)
            wider |= made
            widths[site.layer] = made[f"{site.exit}.weight"].shape[1]
        return Recast(how="folded", weights=wider, widths=widths)

    def _merged_series(self, linear: bool) -> Recast:
        if not linear:
            raise NotServableError(
                "a series adapter that is not linear is a layer of its own in the residual stream, and no engine has "
                'such a layer. Nearest that is served: kind = "parallel", which folds into the FFN, or kind = "lora"'
            )
        state, weights = dict(self.model.named_parameters()), {}
        for site, one in self._adapters.values():
            change = self._scale * (one.up.weight.detach() @ one.down.weight.detach())
            for name in (f"{site.exit}.weight", f"{site.exit}.bias"):
                if name in state:
                    before = state[name].detach().float()
                    weights[name] = (before + change @ before).to(state[name].dtype)
        return Recast(how="merged", weights=weights)


def _hook(modules: dict[str, torch.nn.Module], site: Site, one: Bottleneck, *, parallel: bool) -> None:
    if not parallel:
        modules[site.exit].register_forward_hook(lambda module, inputs, output: output + one(output))
        return
    read: list[torch.Tensor] = []

    def remember(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        read[:] = inputs[:1]

    modules[site.entries[0]].register_forward_pre_hook(remember)
    modules[site.exit].register_forward_hook(lambda module, inputs, output: output + one(read.pop()))


def _problems(width: int, activation: str, placement: str, extra: tuple[str, ...]) -> list[str]:
    found = [] if width >= 1 else [f"method.width is {width}; it must be at least 1"]
    if activation not in (*ACTIVATIONS, *extra):
        found.append(f"method.activation is {activation!r}, none of {', '.join((*extra, *ACTIVATIONS))}")
    if placement not in _PLACEMENTS:
        found.append(f"method.placement is {placement!r}, none of {', '.join(_PLACEMENTS)}")
    return found
