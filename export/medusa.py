# SPDX-License-Identifier: Apache-2.0
"""Medusa heads (Cai et al. 2024, arXiv:2401.10774) in the two layouts that servers read: FasterDecoding's and vLLM's.

A head is a few residual blocks, x + SiLU(W x + b), and an output matrix; head h guesses the token h + 2 places on. The
model that they belong to is not in the directory: vLLM is told both, TGI reads its name from the configuration.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .atomic import fresh_directory
from .directory import read_decoder, read_header
from .errors import ExportUsageError, ModelDamageError, ModelDirectoryError

if TYPE_CHECKING:
    import torch

MedusaLayout = Literal["fasterdecoding", "vllm"]
FASTER_FILE, VLLM_FILE = "medusa_lm_head.safetensors", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class MedusaHead:
    """One head."""

    weights: tuple["torch.Tensor", ...]
    """(hidden, hidden) of each residual block."""
    biases: tuple["torch.Tensor", ...]
    """(hidden,) of each, or none at all."""
    output: "torch.Tensor | None"
    """(vocabulary, hidden). None: all heads use the model's own output matrix."""


@dataclass(frozen=True, kw_only=True)
class MedusaHeads:
    """All heads of a model."""

    heads: tuple[MedusaHead, ...]
    shared_output: "torch.Tensor | None" = None
    """(vocabulary, hidden): the model's own output matrix, if the heads use that."""

    @property
    def output(self) -> "torch.Tensor":
        found = self.heads[0].output if self.shared_output is None else self.shared_output
        assert found is not None
        return found

    def to(self, dtype: "torch.dtype") -> "MedusaHeads":
        """The same heads in another type."""

        def cast(tensor: "torch.Tensor | None") -> "torch.Tensor | None":
            return None if tensor is None else tensor.to(dtype)

        heads = tuple(
            MedusaHead(
                weights=tuple(weight.to(dtype) for weight in head.weights),
                biases=tuple(bias.to(dtype) for bias in head.biases),
                output=cast(head.output),
            )
            for head in self.heads
        )
        return MedusaHeads(heads=heads, shared_output=cast(self.shared_output))

    def check(self, vocab_size: int, hidden_size: int) -> None:
        """Raise ExportUsageError if a shape is not what a model of these sizes needs, or heads differ in kind."""
        problems = [] if self.heads else ["there is no head"]
        layers = len(self.heads[0].weights) if self.heads else 0
        for number, head in enumerate(self.heads):
            if len(head.weights) != layers or len(head.biases) not in (0, layers):
                problems.append(f"head {number} has {len(head.weights)} blocks and {len(head.biases)} biases")
            problems += [
                f"head {number}: a block is {list(found.shape)} where [{hidden_size}, {hidden_size}] belongs"
                for found in head.weights
                if tuple(found.shape) != (hidden_size, hidden_size)
            ]
            problems += [f"head {number}: a bias is {list(b.shape)}" for b in head.biases if len(b) != hidden_size]
            output = self.shared_output if head.output is None else head.output
            if output is None or tuple(output.shape) != (vocab_size, hidden_size):
                shape = None if output is None else list(output.shape)
                problems.append(f"head {number}: its output is {shape} where [{vocab_size}, {hidden_size}] belongs")
        problems += [f"{name} holds NaN or infinity" for name, tensor in _vllm(self).items() if not _finite(tensor)]
        if problems:
            raise ExportUsageError("these Medusa heads cannot be written: " + "; ".join(problems[:6]))


def write_medusa(
    heads: MedusaHeads, base: Path, out: Path, layout: MedusaLayout, *, base_name: str = "", overwrite: bool = False
) -> Path:
    """The heads as a directory of their own, whole or not there at all.

    base: the model directory that they were trained on; base_name: what servers know it by, its path if empty.

    Raises:
        ExportUsageError: shapes are not those of `base`, or numbers are not finite.
        OutputExistsError, OutputSpaceError: see `atomic.fresh_directory`.
    """
    from safetensors.torch import save_file

    decoder = read_decoder(base)
    heads.check(decoder.vocab_size, decoder.hidden_size)
    faster = layout == "fasterdecoding"
    layers, biased = len(heads.heads[0].weights), bool(heads.heads[0].biases)
    config: dict[str, Any] = {
        "medusa_num_heads": len(heads.heads),
        "medusa_num_layers": layers,
        "base_model_name_or_path": base_name or str(base.absolute()),
        "version": "2",
    }
    if not faster:
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": decoder.hidden_size,
            "vocab_size": decoder.vocab_size,
            "truncated_vocab_size": decoder.vocab_size,
            "num_heads": len(heads.heads),
            "num_hidden_layers": layers,
            "medusa_fc_bias": biased,
            "original_lm_head": heads.shared_output is not None,
            "dtype": str(heads.output.dtype).removeprefix("torch."),
        }
    tensors = _faster(heads) if faster else _vllm(heads)
    with fresh_directory(out, overwrite=overwrite) as folder:
        whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / (FASTER_FILE if faster else VLLM_FILE), metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def _vllm(heads: MedusaHeads) -> dict[str, "torch.Tensor"]:
    tensors = {}
    for number, head in enumerate(heads.heads):
        for layer, weight in enumerate(head.weights):
            tensors[f"blocks.{number}.layers.{layer}.weight"] = weight
        for layer, bias in enumerate(head.biases):
            tensors[f"blocks.{number}.layers.{layer}.bias"] = bias
        if head.output is not None:
            tensors[f"lm_heads.{number}.weight"] = head.output
    if heads.shared_output is not None:
        tensors["lm_heads.0.weight"] = heads.shared_output
    return tensors


def _faster(heads: MedusaHeads) -> dict[str, "torch.Tensor"]:
    """Its blocks always have a bias, and each head an output of its own."""
    import torch

    tensors = {}
    for number, head in enumerate(heads.heads):
        for layer, weight in enumerate(head.weights):
            bias = head.biases[layer] if head.biases else torch.zeros_like(weight[0])
            tensors[f"{number}.{layer}.linear.weight"] = weight
            tensors[f"{number}.{layer}.linear.bias"] = bias
        output = heads.output if head.output is None else head.output
        tensors[f"{number}.{len(head.weights)}.weight"] = output
    return tensors


def _finite(tensor: "torch.Tensor") -> bool:
    return bool(tensor.isfinite().all())


def read_medusa(path: Path) -> MedusaHeads:
    """Heads in either layout.

    Raises:
        ModelDirectoryError: there are none.
        ModelDamageError: the file is cut short, or lacks weights that the configuration speaks of.
    """
    from safetensors.torch import load_file

    file = next((path / name for name in (FASTER_FILE, VLLM_FILE) if (path / name).is_file()), None)
    if file is None or not (path / "config.json").is_file():
        raise ModelDirectoryError(f"{path} holds no Medusa heads: config.json with {FASTER_FILE} or {VLLM_FILE}")
    read_header(file)
    tensors = load_file(file)
    config = json.loads((path / "config.json").read_text())
    faster = file.name == FASTER_FILE
    try:
        count, layers = (
            (config["medusa_num_heads"], config["medusa_num_layers"])
            if faster
            else (config["num_heads"], config["num_hidden_layers"])
        )
        shared = not faster and bool(config.get("original_lm_head"))
        heads = tuple(_head(tensors, number, layers, faster=faster, shared=shared) for number in range(count))
        return MedusaHeads(heads=heads, shared_output=tensors["lm_heads.0.weight"] if shared else None)
    except KeyError as error:
        raise ModelDamageError(f"{path} lacks {error} of the heads that its config.json speaks of") from error


def _head(tensors: "dict[str, torch.Tensor]", number: int, layers: int, *, faster: bool, shared: bool) -> MedusaHead:
    def names(kind: str) -> Iterator[str]:
        for layer in range(layers):
            yield f"{number}.{layer}.linear.{kind}" if faster else f"blocks.{number}.layers.{layer}.{kind}"

    output = f"{number}.{layers}.weight" if faster else f"lm_heads.{number}.weight"
    return MedusaHead(
        weights=tuple(tensors[name] for name in names("weight")),
        biases=tuple(tensors[name] for name in names("bias") if name in tensors),
        output=None if shared else tensors[output],
    )
