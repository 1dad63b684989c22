# SPDX-License-Identifier: Apache-2.0
"""Which family with experts can hold a carved model, and by what its weights must be multiplied there.

With h = silu(W_g x) ⊙ W_u x a dense FFN is Σ_i W_d[:, i] h_i, so any partition of its channels into experts sums up to
it if every expert counts once. Routers count otherwise, and the down projections make up for that:

- weights of the top k that sum to 1 (Mixtral; Qwen-MoE with norm_topk_prob): equal gates give 1/k each, so down · k;
- weights out of a softmax over all E (Qwen2-MoE as llama.cpp reads it, whatever norm_topk_prob says): 1/E, so down · E;
- a shared expert behind a sigmoid (Qwen2-MoE): a gate of almost zeros gives 1/2, so its down · 2.

Upcycled, equal copies stand in a token's top k together, and their weights must sum to the same whatever the gates say:
only weights that sum to 1 do that. Multiplying by a power of two is exact in every type of numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...export.architecture import FFN, Decoder
from ...export.configs import uniform_obstacles
from ...export.families import FAMILIES, Moe
from . import qk_norm
from .config import Shape
from .errors import CarveUsageError, LayoutError

OWN = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""What a dense family becomes where nothing speaks against it."""
_NO_SHARED = 32
"""Width of a shared expert of zeros, where the layout insists on one: a block of every quantization of GGUF."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A carved model in its family's words."""

    decoder: Decoder
    shape: Shape
    normalized: bool
    """The weights of a token's top k sum to 1."""
    widened: bool = False
    """Heads are twice as wide as the dense model's, so that norms of queries and keys do nothing; see `qk_norm`."""

    @property
    def moe(self) -> Moe:
        found = self.decoder.blocks.moe
        assert found is not None
        return found

    @property
    def scale(self) -> float:
        """Of the experts' down projections."""
        shape = self.shape
        if shape.copies > 1:
            return float(shape.experts // shape.copies)
        return float(shape.top_k if self.normalized else shape.experts)

    @property
    def shared_scale(self) -> float:
        """Of the shared expert's down projection."""
        return 2.0

    @property
    def sparse(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return self.decoder.moe_layers


def lay_out(source: Decoder, shape: Shape, family: str = "", dense_layers: Sequence[int] = ()) -> Layout:
    """The layout of `source` carved to `shape`.

    family: of the result; empty: the one of the source's kind that can hold it.

    Raises:
        CarveUsageError: if there is no such family or layer.
        LayoutError: with a sentence for each thing that the family has no words for.
    """
    known = [name for name, row in FAMILIES.items() if row.moe]
    if family and family not in known:
        raise CarveUsageError(f"there is no layout {family!r} with experts; there are {', '.join(known)}")
    if wrong := [index for index in dense_layers if not 0 <= index < len(source.layers)]:
        raise CarveUsageError(f"there is no layer {wrong[0]} to stay dense: there are {len(source.layers)}, from 0")
    if source.blocks.moe is not None or source.family not in OWN:
        raise LayoutError(f"this is {source.family}, which has experts already; a dense model is wanted")
    if len(set(dense_layers)) == len(source.layers):
        raise CarveUsageError("no layer is left to get experts: all are to stay dense")
    family = family or _default(source, shape, dense_layers)
    row = FAMILIES[family]
    normalized = not (row.moe and row.moe.shared) or shape.copies > 1
    shared = (shape.shared or _NO_SHARED) if row.moe and row.moe.shared else shape.shared
    ffn = FFN(
        kind="moe",
        width=shape.expert_width,
        experts=shape.experts,
        top_k=shape.top_k,
        normalized=normalized,
        shared_width=shared,
    )
    decoder = replace(
        source,
        family=family,
        qkv_bias={"always": True, "never": False}.get(row.qkv_bias, source.qkv_bias),
        layers=tuple(
            layer if index in dense_layers else replace(layer, ffn=ffn) for index, layer in enumerate(source.layers)
        ),
    )
    widened = row.qk_norm and not source.blocks.qk_norm
    if widened:
        decoder = replace(decoder, head_dim=2 * source.head_dim, qkv_bias=True, output_bias=True)
    if problems := list(_problems(source, decoder, shape, widened=widened)):
        raise LayoutError(f"{family} cannot hold this:\n  " + "\n  ".join(problems[:6]))
    return Layout(decoder=decoder, shape=shape, normalized=normalized, widened=widened)


def _default(source: Decoder, shape: Shape, dense_layers: Sequence[int]) -> str:
    own = OWN[source.family]
    moe = FAMILIES[own].moe
    if (
        source.family == "llama"
        and moe
        and ((shape.shared and not moe.shared) or (dense_layers and not moe.mixes_dense))
    ):
        return "qwen2_moe"
    return own


def _problems(source: Decoder, new: Decoder, shape: Shape, *, widened: bool) -> Iterator[str]:
    family, moe = new.blocks, new.blocks.moe
    assert moe is not None
    if differ := uniform_obstacles(source):
        index, told = differ[0]
        yield f"layer {index} of the model is not like the others ({told}); experts exist for uniform models only"
    if source.blocks.qk_norm and not family.qk_norm:
        yield f"in {source.family} queries and keys pass a norm, and in it they do not"
    if widened and (told := qk_norm.problem(source)):
        yield told
    if shape.shared and not moe.shared:
        yield f"it has no shared expert for {shape.shared} shared channels: say --layout qwen2_moe, or --shared 0"
    if source.ffn_bias:
        yield "the FFN has biases, which experts have not"
    if source.qkv_bias and family.qkv_bias == "never":
        yield "queries, keys and values have biases, which it has not"
    if source.output_bias and family.output_bias == "never":
        yield "the attention's output has a bias, which it has not"
    if not differ:
        yield from (f"layer {index}: {told}" for index, told in uniform_obstacles(new))
