# SPDX-License-Identifier: Apache-2.0
"""The routing trace of a model on some text: transformers runs the model, and its gates are asked what they take.

Any family with experts in the table, carved or not: the model's own modules compute the states, and the choice is that
of the stored gates on what goes into each mixture, with the softmax and the top k that these layouts share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...distill.texts import Part
from ...export.atomic import require_absent
from ...export.directory import ModelDirectory, open_directory
from ...export.errors import OutputExistsError
from .calibration import listening, windows_of
from .carve import carved_source
from .errors import CarveUsageError, LayoutError, MoeError
from .gates import expert_weights
from .module import load_carved
from .trace import RoutingTrace, model_sha256, read_trace, write_trace

_BATCH = 4
"""Windows at a time."""


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """A model with experts, and the text that it is heard on."""

    model: Path
    out: Path
    sources: tuple[str, ...] = ("python-docs", "python-source")
    tokens: int = 16384
    length: int = 256
    """Tokens a sequence."""
    part: Part = "test"
    """Of the texts: `train` was seen by carving, `test` was not."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.length < 2 or self.tokens < self.length:
            raise CarveUsageError(
                f"{self.tokens} tokens are not one sequence of {self.length} (2 or more); say --tokens with more"
            )
        if not self.sources:
            raise CarveUsageError("name at least one text")


def run_trace(config: TraceConfig, progress: Callable[[str], None]) -> RoutingTrace:
    """Write the trace to `config.out`, and return it.

    Raises:
        ExportError, DistillError, SearchError: for a model or text that cannot be used, or a file that is not written.
    """
    require_place(config)
    source = carved_source(config.model)
    trace = trace_of(source, windows_to_trace(config, source), progress)
    write_trace(config.out, trace)
    return trace


def require_place(config: TraceConfig) -> None:
    """Before anything is computed: that the file may be written.

    Raises:
        OutputExistsError: if it is there and may not be replaced, or is to lie among the model's own files.
    """
    if config.out.resolve().parent == config.model.resolve():
        raise OutputExistsError(
            f"{config.out} would lie in {config.model}, where engines take every *.safetensors for weights; choose "
            "another place"
        )
    require_absent(config.out, overwrite=config.overwrite)


def check_ahead(config: TraceConfig, dense: Path) -> None:
    """Before `dense` is carved into `config.model`: that the trace can be made of it.

    Raises:
        OutputExistsError: see `require_place`. TextError: see `windows_to_trace`.
    """
    require_place(config)
    windows_to_trace(config, open_directory(dense, tokenizer=True))


def is_traced(config: TraceConfig) -> bool:
    """`config.out` is a trace of the model already."""
    try:
        read_trace(config.out, model=model_sha256(config.model))
    except MoeError:
        return False
    return True


def windows_to_trace(config: TraceConfig, source: ModelDirectory) -> torch.Tensor:
    """The text: (n, length) int64. `source` is the model, or the dense one that it is yet to be carved from.

    Raises:
        TextError: if there is too little text, saying how much there is.
    """
    return windows_of(source, config, config.part, config.tokens // config.length)


def trace_of(source: ModelDirectory, windows: torch.Tensor, progress: Callable[[str], None]) -> RoutingTrace:
    """The trace of `windows` (n, length), each a sequence."""
    model, gates, layers = runnable(source), gates_of(source), source.decoder.moe_layers
    ffn = source.decoder.layers[layers[0]].ffn
    parts = []
    for number, ids in enumerate(windows.split(_BATCH), start=1):
        with torch.no_grad(), listening(model) as heard:
            model.model(input_ids=ids, use_cache=False)
        chosen = [
            expert_weights(heard[layer] @ gate.T, ffn.top_k, normalized=ffn.normalized)[1].flatten(0, 1)
            for layer, gate in zip(layers, gates, strict=True)
        ]
        parts.append(torch.stack(chosen))
        progress(f"traced {min(number * _BATCH, len(windows))} of {len(windows)} sequences")
    count, length = windows.shape
    return RoutingTrace(
        model=model_sha256(source.path),
        experts=ffn.experts,
        choice=np.ascontiguousarray(torch.cat(parts, 1).numpy().astype(np.int16)),
        tokens=windows.flatten().numpy().astype(np.int32),
        starts=np.arange(count + 1, dtype=np.int64) * length,
    )


def runnable(source: ModelDirectory) -> Any:
    """The model in float32: as `module` has it where its blocks are Llama's, else as transformers has it."""
    try:
        return load_carved(source)
    except LayoutError:
        from transformers.models.auto.modeling_auto import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, local_files_only=True)
        return model.eval().requires_grad_(False)


def gates_of(source: ModelDirectory) -> list[torch.Tensor]:
    """(E, hidden) float32 of each layer with experts."""
    moe = source.decoder.blocks.moe
    assert moe is not None
    names = [f"model.layers.{layer}.{moe.router}" for layer in source.decoder.moe_layers]
    found = dict(source.weights(names))
    return [found[name].float() for name in names]
