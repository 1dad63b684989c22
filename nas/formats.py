# SPDX-License-Identifier: Apache-2.0
"""Formats of weights as variants: subblocks whose matrices are stored in 8 or 4 bits.

A rounded subblock is an attention or an FFN like any other, and its `rounding` says how its matrices are stored. It is
made of the variant that the library holds (or of the teacher's own), by the packer that `export` writes with, and no
training follows. The group of numbers that share a scale is the largest that divides all rows of this subblock, so it
does not depend on what is chosen elsewhere. Norms, embedding and output stay as they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

from ..export.architecture import FFN, Attention, Decoder, Layer
from ..export.compressed import BITS, Rounding, is_rounded, require_library, rounding_of
from ..export.engines import ENGINES

if TYPE_CHECKING:
    import torch

METHOD = 1
"""Raised when the same weights come out rounded to other numbers than before."""
SOURCE = "source"
FORMATS = (SOURCE, *BITS)


@dataclass(frozen=True, kw_only=True)
class RoundedAttention(Attention):
    rounding: Rounding

    def __str__(self) -> str:
        return f"{super().__str__()} in {format_of(self)}"


@dataclass(frozen=True, kw_only=True)
class RoundedFFN(FFN):
    rounding: Rounding

    def __str__(self) -> str:
        return f"{super().__str__()} in {format_of(self)}"


Block = Attention | FFN
Kind = TypeVar("Kind", Attention, FFN)


def rounding_in(block: Block) -> Rounding | None:
    """None: its weights are stored as the teacher's are."""
    return block.rounding if isinstance(block, RoundedAttention | RoundedFFN) else None


def format_of(block: Block) -> str:
    """One of `FORMATS`."""
    rounding = rounding_in(block)
    return SOURCE if rounding is None else next(name for name, bits in BITS.items() if bits == rounding.bits)


def source_of(block: Block) -> Block:
    """The subblock that this one is rounded from; itself, if it is not."""
    if isinstance(block, RoundedAttention):
        return Attention(**{field.name: getattr(block, field.name) for field in fields(Attention)})
    if isinstance(block, RoundedFFN):
        return FFN(**{field.name: getattr(block, field.name) for field in fields(FFN)})
    return block


def source_decoder(decoder: Decoder) -> Decoder:
    """The same shapes, and nothing said of formats: what `export` knows."""
    layers = [replace(la, attention=source_of(la.attention), ffn=source_of(la.ffn)) for la in decoder.layers]
    return replace(decoder, layers=tuple(layers))


def rounded(teacher: Decoder, block: Kind, name: str) -> Kind | str:
    """The subblock in the format `name`, or why it cannot be, as a sentence."""
    if block.kind == "none":
        return f"{block} has no weights to store in {name}"
    layer = Layer(attention=Attention(kind="none"), ffn=FFN(kind="none"))
    layer = replace(layer, attention=block) if isinstance(block, Attention) else replace(layer, ffn=block)
    found = rounding_of(replace(teacher, layers=(layer,)), name)
    if isinstance(found, str):
        return f"{block}: {found}"
    if isinstance(block, Attention):
        return RoundedAttention(**block.__dict__, rounding=found)
    return RoundedFFN(**block.__dict__, rounding=found)


def served(formats: tuple[str, ...], engines: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Of the formats beside `source`: those that every engine serves in some subblocks, and why not the others.

    Raises:
        ExportError: the package compressed-tensors is missing, and one of them needs it.
    """
    wanted = tuple(name for name in formats if name != SOURCE)
    kept, reasons = list[str](), list[str]()
    for name in wanted:
        problems = [problem for engine in engines for problem in _refusals(name, engine)]
        reasons += problems
        kept += [] if problems else [name]
    if kept:
        require_library()
    return tuple(kept), reasons


def _refusals(name: str, engine: str) -> Iterator[str]:
    known = ENGINES[engine]
    rule = known.extras["mixed weights"]
    if rule.support != "yes":
        yield f"{known.title}: weights in {name} are not for {known.title}: {rule.why}"
    elif name not in known.weights:
        yield f"{known.title}: weights in {name} are not written for it"


def roundings_of(decoder: Decoder) -> dict[str, Rounding]:
    """How each matrix of a child is stored, by its name in the model; what is not in here is not rounded."""
    found: dict[str, Rounding] = {}
    for index, layer in enumerate(decoder.layers):
        for block, inner in ((layer.attention, "self_attn"), (layer.ffn, "mlp")):
            if rounding := rounding_in(block):
                prefix = f"model.layers.{index}.{inner}."
                specs = decoder.tensors()
                names = [name for name in specs if name.startswith(prefix) and is_rounded(name, specs[name].shape)]
                found |= dict.fromkeys(names, rounding)
    return found


def as_served(weights: "Mapping[str, torch.Tensor]", rounding: Rounding) -> "dict[str, torch.Tensor]":
    """The weights of one subblock as an engine reads them back, by their names within a layer, in float32.

    Raises:
        ExportError: the package compressed-tensors is missing.
    """
    return {
        name: rounding.as_read(name, weight) if _is_matrix(name, tuple(weight.shape)) else weight.float()
        for name, weight in weights.items()
    }


def stored_bytes(shape: tuple[int, ...], name: str, rounding: Rounding | None, bits: int) -> float:
    """Of a weight by its name within a layer. bits: of a number that is not rounded."""
    size = 1
    for length in shape:
        size *= length
    return rounding.bytes_of(size) if rounding and _is_matrix(name, shape) else size * bits / 8


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return is_rounded(f"model.layers.0.{name}", shape)
