# SPDX-License-Identifier: Apache-2.0
"""The methods of PEFT: LoRA, rsLoRA, DoRA, VeRA and prefix tuning, saved as PEFT directories.

LoRA W + (alpha / r) B A (arXiv:2106.09685), rsLoRA with alpha / sqrt(r) (2312.03732), DoRA with a trained magnitude of
each row (2402.09353), VeRA with two trained vectors around frozen random matrices (2310.11454), prefix tuning with
trained keys and values before the first token (2101.00190).
"""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from .errors import AdapterDamageError, NotServableError
from .method import WEIGHTS, Attached, Recast, Steady
from .sites import find_targets

_PREFIX = "base_model.model."


class PeftAttached(Steady):
    """A PEFT model with one adapter; see `method.Attached`."""

    def __init__(self, model: torch.nn.Module, config: Any, seed: int) -> None:
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's own
            torch.manual_seed(seed)
            self.model: Any = get_peft_model(model, config)  # type: ignore[arg-type]
        self.model.eval()

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a form to be filled in

    def load(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        tensors = load_file(folder / WEIGHTS)
        own = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        check_tensors(folder, tensors, own)
        set_peft_model_state_dict(self.model, tensors)

    def layers(self) -> Iterator[tuple[str, Any]]:
        """(the base's name of the module, PEFT's layer around it)"""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield name.removeprefix(_PREFIX), module

    def recast(self) -> Recast:
        weights: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, layer in self.layers():
                weight = layer.get_base_layer().weight
                before = weight.detach().clone()
                layer.merge(safe_merge=True)
                weights[f"{name}.weight"] = weight.detach().clone()
                weight.copy_(before)  # `unmerge` would leave its rounding
                layer.merged_adapters.clear()
        return Recast(how="merged", weights=weights)


class PrefixAttached(PeftAttached):
    def __init__(self, model: torch.nn.Module, config: Any, seed: int) -> None:
        super().__init__(model, config, seed)
        forward = self.model.forward

        def quiet(*args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # PEFT's own
                return forward(*args, **kwargs)

        self.model.forward = quiet

    def recast(self) -> Recast:
        raise NotServableError(
            "a trained prefix is keys and values in the cache, which are no function of any weight, so it can be "
            'neither merged nor folded, and no engine here loads it. Nearest that is served: kind = "lora" on '
            'targets = ["attention"]'
        )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank changes of linear modules. The defaults are LLM-Adapters' for LLaMA (arXiv:2304.01933)."""

    identity: ClassVar[str] = ""

    rank: int = 32
    alpha: float = 64
    targets: tuple[str, ...] = ("attention", "mlp")
    """"attention", "mlp", or ends of the names of linear modules."""
    dropout: float = 0.05

    def problems(self) -> list[str]:
        return _rank_problems(self.rank, self.dropout) + ([] if self.alpha > 0 else ["method.alpha must be positive"])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def attach(self, model: torch.nn.Module, *, seed: int) -> Attached:
        return self.lora_on(model, seed)

    def lora_on(self, model: torch.nn.Module, seed: int) -> PeftAttached:
        from peft import LoraConfig

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=short_names(model, find_targets(model, self.targets)),
            task_type="CAUSAL_LM",
            **self._more(),
        )
        return PeftAttached(model, config, seed)

    def _more(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class RsLora(Lora):
    """LoRA whose scale is alpha / sqrt(rank), which stays stable for large ranks."""

    alpha: float = 16

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)

    def _more(self) -> dict[str, Any]:
        return {"use_rslora": True}


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """LoRA on the direction of each row, and its length trained beside it."""

    def _more(self) -> dict[str, Any]:
        return {"use_dora": True}


@dataclass(frozen=True, kw_only=True)
class Vera:
    """Two trained vectors a module, around random matrices that all modules share. It is a LoRA of this rank."""

    identity: ClassVar[str] = ""

    rank: int = 256
    targets: tuple[str, ...] = ("attention", "mlp")
    dropout: float = 0.0

    def problems(self) -> list[str]:
        return _rank_problems(self.rank, self.dropout)

    def attach(self, model: torch.nn.Module, *, seed: int) -> PeftAttached:
        from peft import VeraConfig

        config = VeraConfig(
            r=self.rank,
            vera_dropout=self.dropout,
            target_modules=short_names(model, find_targets(model, self.targets)),
            projection_prng_key=seed,
            task_type="CAUSAL_LM",
        )
        return PeftAttached(model, config, seed)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Trained keys and values before the first token. The default is LLM-Adapters'."""

    identity: ClassVar[str] = (
        "attention spreads over the trained keys from the first step on, and a softmax gives none of them weight zero"
    )

    tokens: int = 10

    def problems(self) -> list[str]:
        return [] if self.tokens >= 1 else [f"method.tokens is {self.tokens}; it must be at least 1"]

    def attach(self, model: torch.nn.Module, *, seed: int) -> PeftAttached:
        from peft import PrefixTuningConfig

        return PrefixAttached(model, PrefixTuningConfig(num_virtual_tokens=self.tokens, task_type="CAUSAL_LM"), seed)


def set_dropout(model: torch.nn.Module, on: bool) -> None:
    """That of PEFT's layers. The base's own stays off: it is not what is trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.training = on  # what DoRA asks; its submodules are not told, so the base layer stays as it is
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and ("lora_dropout" in name or "vera_dropout" in name):
            module.train(on)


def check_tensors(folder: Path, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raises AdapterDamageError naming what is missing, unknown or has another shape."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name].shape)} and not {list(wanted[name].shape)}"
        for name in found
        if name in wanted and found[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise AdapterDamageError(f"{folder} does not hold what its settings say: {'; '.join(problems[:4])}{more}")


def short_names(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """The last parts of the names, where they mean these modules and no others, as PEFT and servers like them."""
    ends = {name.rsplit(".", 1)[-1] for name in targets}
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    meant = [name for name in linears if name.rsplit(".", 1)[-1] in ends]
    return sorted(ends) if meant == list(targets) else list(targets)


def write_lora(
    folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], *, base: str, targets: Sequence[str] = ()
) -> None:
    """A PEFT directory in `folder` of the changes B A, by the base's names of the modules.

    pairs: A (rank, columns) and B (rows, rank) of each; ranks may differ.
    """
    from safetensors.torch import save_file

    rank = max(a.shape[0] for a, _ in pairs.values())
    uneven = {name: a.shape[0] for name, (a, _) in pairs.items() if a.shape[0] != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets or pairs),
        "rank_pattern": uneven,
        "alpha_pattern": uneven,
        "inference_mode": True,
    }
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().float().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().float().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _rank_problems(rank: int, dropout: float) -> list[str]:
    found = [] if rank >= 1 else [f"method.rank is {rank}; it must be at least 1"]
    return found + ([] if 0 <= dropout < 1 else [f"method.dropout is {dropout}; it must lie between 0 and 1"])
