# SPDX-License-Identifier: Apache-2.0
"""Weight-only INT8 and INT4 as compressed-tensors: rounded to the nearest, packed by that library.

Symmetric: q = round(w / s), where s is twice the largest |w| of a group of the row by 2^bits - 1. Only matrices of
attention and FFN are rounded; embedding, output, norms and routers stay as they are, in bfloat16. Or only some of the
matrices, each in a way of its own: see `mixed_config`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .architecture import Decoder
from .errors import ExportError

if TYPE_CHECKING:
    import torch

BITS = {"int8": 8, "int4": 4}
"""Formats of weights, and their bits."""
PACKED = ("weight_packed", "weight_scale", "weight_shape")
"""What takes the place of a `weight`."""
_GROUPS = (128, 64, 32)
"""Numbers of a row that share a scale: the largest of these that divides all rows."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How the matrices of one model are rounded."""

    bits: int
    group: int

    def config(self) -> dict[str, Any]:
        """`quantization_config` of a config.json."""
        return _config([self.scheme(["Linear"])], ["lm_head"])

    def scheme(self, targets: list[str]) -> dict[str, Any]:
        """A group of `config_groups`. targets: classes, or names of modules."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": self.group,
            "dynamic": False,
            "actorder": None,
        }
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}

    def bytes_of(self, size: int) -> int:
        """Of a matrix of `size` numbers: packed, and its scales in two bytes each."""
        return size * self.bits // 8 + 2 * (size // self.group) + 16

    def pack(self, name: str, weight: "torch.Tensor", scale: "torch.Tensor | None" = None) -> "dict[str, torch.Tensor]":
        """The tensors that take the place of `name`, which ends with `.weight`.

        scale: (rows, groups) of bfloat16 numbers, instead of those that follow from the largest of each group.

        Raises:
            ExportError: if the library is missing.
        """
        import torch

        compressor, scheme = self._library()
        wide = weight.float()
        scale = self.scales(wide) if scale is None else scale.float()
        zero = torch.zeros_like(scale, dtype=torch.int8)
        packed = compressor.compress({"weight": wide, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        base = name.removesuffix(".weight")
        found = {f"{base}.{key}": tensor for key, tensor in packed.items() if key != "weight_zero_point"}
        found[f"{base}.weight_scale"] = scale.to(torch.bfloat16)
        return found

    def scales(self, weight: "torch.Tensor") -> "torch.Tensor":
        """(rows, groups): what follows from the largest number of each group, as it will be read."""
        import torch
        from compressed_tensors.quantization.utils import calculate_qparams

        groups = weight.float().unflatten(-1, (-1, self.group))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), self._library()[1].weights)
        return torch.where(scale == 0, 1.0, scale.float()).to(torch.bfloat16).float()

    def unpack(self, parts: "dict[str, torch.Tensor]") -> "torch.Tensor":
        """The weight that `weight_packed`, `weight_scale` and `weight_shape` are, in float32."""
        compressor, scheme = self._library()
        wide = {**parts, "weight_scale": parts["weight_scale"].float()}
        return compressor.decompress(wide, scheme)["weight"].float()

    def as_read(self, name: str, weight: "torch.Tensor") -> "torch.Tensor":
        """What `name` is after it was packed and is unpacked again, in float32."""
        base = name.removesuffix("weight")
        return self.unpack({key.removeprefix(base): tensor for key, tensor in self.pack(name, weight).items()})

    def _library(self) -> Any:
        """Its packer, and this rounding as it calls it. Raises ExportError if it is missing."""
        try:
            from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
            from compressed_tensors.quantization import QuantizationScheme
        except ModuleNotFoundError as error:
            raise ExportError(_MISSING) from error
        return PackedQuantizationCompressor, QuantizationScheme(**self.config()["config_groups"]["group_0"])


def _config(schemes: list[dict[str, Any]], ignore: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def mixed_config(roundings: Mapping[str, Rounding], matrices: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` where some matrices are rounded, or all of them in several ways.

    Modules are named one by one, those that stay as they are in `ignore`: vLLM raises on one that is in neither list,
    and wants the parts of what it fuses (queries, keys and values; gate and up) rounded alike (read in its source,
    `compressed_tensors/utils.py`).

    roundings: by the name of the weight. matrices: names of all that could be rounded, see `is_rounded`.
    """
    names = list(matrices)
    ways = list(dict.fromkeys(roundings[name] for name in names if name in roundings))
    schemes = [way.scheme([_module(name) for name in names if roundings.get(name) == way]) for way in ways]
    return _config(schemes, [*(_module(name) for name in names if name not in roundings), "lm_head"])


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


_MISSING = (
    "INT8 and INT4 are packed by the package compressed-tensors, which is not installed here: "
    "pip install 'refound[compressed]'"
)


def require_library() -> None:
    """Raise ExportError if compressed-tensors is not installed."""
    import importlib.util

    if importlib.util.find_spec("compressed_tensors") is None:
        raise ExportError(_MISSING)


def rounding_of(decoder: Decoder, weights: str) -> Rounding | str:
    """How a model is rounded to `weights` (a key of `BITS`), or why it cannot be, as a sentence."""
    if any(layer.ffn.kind == "moe" for layer in decoder.layers):
        return f"experts are not rounded to {weights}: servers read fused experts in layouts of their own"
    widths = {spec.shape[-1] for name, spec in decoder.tensors().items() if is_rounded(name, spec.shape)}
    for group in _GROUPS:
        if all(width % group == 0 for width in widths):
            return Rounding(bits=BITS[weights], group=group)
    odd = ", ".join(str(width) for width in sorted(widths) if width % _GROUPS[-1])
    return f"rows of {odd} numbers are no multiple of {_GROUPS[-1]}, the smallest group of {weights}"


def is_rounded(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight of a decoder is one of the matrices that are rounded."""
    return name.startswith("model.layers.") and name.endswith(".weight") and len(shape) == 2
