# SPDX-License-Identifier: Apache-2.0
"""Write one part of an export into an empty directory: weights, configuration, tokenizer, modelling code."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architecture import TensorSpec
from .compressed import BITS, is_rounded
from .convert import CONVERTED, convert
from .directory import INDEX, ModelDirectory
from .errors import EngineFitError
from .forms import configuration, copy_remote
from .gguf_file import write_gguf
from .plan import Part, source_type
from .plugin import write_plugin
from .quantizer import EngineQuantizer

if TYPE_CHECKING:
    import torch

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", **dict.fromkeys(BITS, "bfloat16")}


def write_part(part: Part, source: ModelDirectory, directory: Path, progress: Callable[[str], None]) -> None:
    """Write the files of `part` into `directory`. Weights are read, filled and written one at a time or one shard.

    Raises:
        EngineFitError: if a weight that the part's layout has no place for is not zeros.
    """
    if part.layout == "gguf":
        read = _Reader(source, part)
        progress(f"writing {part.shards[0][0]}")
        tokenizer = source.path if any(file.name.startswith("tokenizer") for file in source.companions) else None
        with EngineQuantizer() if part.weights.endswith("_k") else contextlib.nullcontext() as quantize:
            file = directory / part.shards[0][0]
            write_gguf(file, part.decoder, read, weights=part.weights, tokenizer=tokenizer, quantize=quantize)
        return
    if part.layout in CONVERTED:
        # as the exporter of the engine reads it, in place of which comes what it makes of it
        between = directory / ".huggingface"
        between.mkdir()
        write_huggingface(part, source, between, progress)
        progress(f"converting it with {part.engines[0]}'s own exporter")
        convert(part.layout, [(between, directory)])
        shutil.rmtree(between)
        return
    write_huggingface(part, source, directory, progress)


def write_huggingface(part: Part, source: ModelDirectory, directory: Path, progress: Callable[[str], None]) -> None:
    """What transformers loads; an engine's own exporter begins with the same."""
    _write_shards(part, _Reader(source, part), directory, progress)
    (directory / "config.json").write_text(json.dumps(config_of(part, source), indent=2) + "\n")
    for file in source.companions:
        shutil.copyfile(file, directory / file.name)
    copy_remote(directory, part.form)
    if part.plugin:
        write_plugin(directory)


def config_of(part: Part, source: ModelDirectory) -> dict[str, Any]:
    """The `config.json` of a Hugging Face part."""
    kept = _NAMES[source_type(source)]
    decoder = replace(part.decoder, dtype=_TYPES.get(part.weights, kept))
    config = configuration(decoder, part.form)
    return config | ({"quantization_config": part.rounding.config()} if part.rounding else {})


class _Reader:
    """Gives each tensor of the decoder that is written: read, padded with zeros, or made."""

    def __init__(self, source: ModelDirectory, part: Part) -> None:
        self.source, self.specs, moved = source, part.decoder.tensors(), part.relayout
        self.sources = moved.sources if moved else {}
        if moved:
            self.specs = moved.specs(self.specs)
            for name, tensor in source.weights(list(moved.left_out)):
                if tensor.any():
                    raise EngineFitError(f"{name} is not zeros, and {part.decoder.family} has no place for it")

    def __call__(self, name: str) -> "torch.Tensor":
        import torch

        spec: TensorSpec = self.specs[name]
        if spec.fill != "source":
            made = torch.zeros if spec.fill == "zeros" else torch.ones
            return made(spec.shape, dtype=getattr(torch, _NAMES[source_type(self.source)]))
        ((_, found),) = self.source.weights([self.sources.get(name, name)])
        if not spec.stored:
            return found
        if spec.repeated:
            blocks = found.unflatten(0, (-1, spec.repeated))
            return blocks.repeat_interleave(spec.shape[0] // found.shape[0], dim=0).flatten(0, 1)
        padded = torch.zeros(spec.shape, dtype=found.dtype)
        padded[tuple(slice(0, size) for size in found.shape)] = found
        return padded


def _write_shards(part: Part, read: _Reader, directory: Path, progress: Callable[[str], None]) -> None:
    import torch
    from safetensors.torch import save_file

    cast = getattr(torch, _TYPES[part.weights]) if part.weights in _TYPES else None
    weight_map, total = {}, 0
    for number, (file, names) in enumerate(part.shards, start=1):
        progress(f"writing {file} ({number} of {len(part.shards)})")
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            found = read(name)
            if part.rounding and is_rounded(name, tuple(found.shape)):
                tensors |= part.rounding.pack(name, found)
            else:
                tensors[name] = found.to(cast) if cast else found
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(part.shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
