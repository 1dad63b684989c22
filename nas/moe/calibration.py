# SPDX-License-Identifier: Apache-2.0
"""The dense model on the calibration text: what goes into every FFN, and gradients where a split needs them.

Jobs of `nas.jobs`: a chunk of windows each, named by what decides it, done once. Any dense family that transformers
knows is heard; it is asked through hooks on the norm before the FFN, which all families call alike.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from ...distill.loop import eos_of
from ...distill.models import load
from ...distill.texts import Part, open_tokenizer, pack
from ...export.directory import ModelDirectory
from ..jobs import Job, Result, Store
from ..teacher import text_digest
from .config import CarveConfig
from .errors import MoeError
from .evidence import LayerEvidence
from .splits import Needs

_CHUNK_WINDOWS = 8


class Windows(Protocol):
    """What is asked for, by any of the configurations here."""

    @property
    def sources(self) -> tuple[str, ...]: ...

    @property
    def length(self) -> int: ...


def windows_of(source: ModelDirectory, config: Windows, part: Part, count: int) -> torch.Tensor:
    """`count` windows, by turns of the sources: (count, length) int64.

    Raises:
        TextError: if a source has too little text, saying how much there is.
    """
    tokenizer = open_tokenizer(source.path)
    packed = pack(config.sources, part, tokenizer=tokenizer, eos=eos_of(source), count=count, length=config.length)
    if packed.size and packed.max() >= source.decoder.vocab_size:
        raise MoeError(f"{source.path}: its tokenizer knows more tokens than its vocabulary has")
    return torch.from_numpy(packed)


def load_any(source: ModelDirectory) -> Any:
    """The model in float32, in evaluation mode: Llama's blocks as `distill` has them, others as transformers has."""
    if source.decoder.family == "llama":
        return load(source)
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def listening(model: Any) -> Iterator[list[torch.Tensor]]:
    """While the block runs, a list of what goes into the FFN of each layer, in the order of the layers."""
    heard: list[torch.Tensor] = []
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: heard.append(output))
        for layer in model.model.layers
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Calibration:
    """A dense model and the windows that it is heard on."""

    source: ModelDirectory
    config: CarveConfig
    fingerprint: str
    store: Store

    @cached_property
    def model(self) -> Any:
        return load_any(self.source)

    @cached_property
    def windows(self) -> torch.Tensor:
        """As many of each source."""
        sources = len(self.config.sources)
        return windows_of(
            self.source, self.config, "train", self.config.tokens // self.config.length // sources * sources
        )

    @cached_property
    def text(self) -> str:
        return text_digest(self.windows)

    def jobs(self, needs: Needs) -> list[Job]:
        """Empty if nothing is needed."""
        kinds = {"nothing": (), "activations": ("ffn-inputs",), "gradients": ("ffn-inputs", "ffn-gradients")}[needs]
        return [
            Job(kind=kind, key={"model": self.fingerprint, "text": text_digest(chunk), "chunk": index})
            for kind in kinds
            for index, chunk in enumerate(self.windows.split(_CHUNK_WINDOWS))
        ]

    def compute(self, job: Job) -> Result:
        """Raises MoeError if the model computes NaN or infinity."""
        ids = self.windows.split(_CHUNK_WINDOWS)[job.key["chunk"]]
        return (self._gradients(ids) if job.kind == "ffn-gradients" else self._inputs(ids)), {}

    def _inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad(), listening(self.model) as heard:
            self.model.model(input_ids=ids, use_cache=False)
        for index, state in enumerate(heard):
            if not torch.isfinite(state).all():
                raise MoeError(
                    f"the model computes NaN or infinity before the FFN of layer {index} on ordinary text: nothing can "
                    "be learned from it. Look at its configuration (rope, norm_eps) and at its weights"
                )
        return {f"layer.{index:03d}": state.bfloat16() for index, state in enumerate(heard)}

    def _gradients(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Σ |h · ∂L/∂h| of the channels over the tokens of each window, L the loss of the next token."""
        found = []
        for window in ids.split(1):
            seen: list[torch.Tensor] = []

            def keep(module: Any, args: tuple[torch.Tensor], seen: list[torch.Tensor] = seen) -> tuple[torch.Tensor]:
                seen.append(args[0].requires_grad_() if not args[0].requires_grad else args[0])
                return (seen[-1],)

            hooks = [layer.mlp.down_proj.register_forward_pre_hook(keep) for layer in self.model.model.layers]
            try:
                loss = self.model(input_ids=window, labels=window, use_cache=False).loss
                gradients = torch.autograd.grad(loss, seen)
            finally:
                for hook in hooks:
                    hook.remove()
            pairs = zip(seen, gradients, strict=True)
            found.append(torch.stack([(h.detach() * g).abs().sum((0, 1)) for h, g in pairs]))
        both = torch.stack(found, 1)
        return {f"layer.{index:03d}": one.contiguous() for index, one in enumerate(both)}

    def evidence(self, layer: int, needs: Needs) -> LayerEvidence:
        """Of one layer, from what `jobs(needs)` left in the store."""
        inputs = torch.cat(self._read(layer, "ffn-inputs")).float()
        gradients = torch.cat(self._read(layer, "ffn-gradients")) if needs == "gradients" else None
        prefix = f"model.layers.{layer}.mlp."
        names = [f"{prefix}{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
        weights = {name: tensor.float() for name, tensor in self.source.weights(names)}
        windows, length = inputs.shape[:2]
        domain = torch.arange(windows) % len(self.config.sources)
        return LayerEvidence(
            inputs=inputs.flatten(0, 1),
            gate=weights[names[0]],
            up=weights[names[1]],
            down=weights[names[2]],
            domain=domain.repeat_interleave(length),
            windows=windows,
            gradients=gradients,
        )

    def _read(self, layer: int, kind: str) -> list[torch.Tensor]:
        from safetensors import safe_open

        parts = []
        for job in self.jobs("gradients" if kind == "ffn-gradients" else "activations"):
            if job.kind == kind:
                with safe_open(self.store.path(job), framework="pt") as file:
                    parts.append(file.get_tensor(f"layer.{layer:03d}"))
        return parts
