# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in another family's layout, where that computes the same.

Mixtral, Qwen2-MoE and Qwen3-MoE differ in names and in four rules: whether the weights of the top k sum to 1, a shared
expert behind a sigmoid, biases of queries, keys and values, and norms of queries and keys. What one has and another
lacks is made of zeros where zeros change nothing, left out where it is zeros, and refused otherwise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from .architecture import FFN, Decoder, Layer, TensorSpec
from .configs import uniform_obstacles
from .errors import EngineFitError, ExportUsageError
from .families import FAMILIES, Moe

_SHARED_WIDTH = 32
"""Of a shared expert of zeros: a block of every quantization of GGUF."""
_SHARED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Relayout:
    """The decoder in its new layout, and where its weights come from."""

    decoder: Decoder
    sources: Mapping[str, str] = field(hash=False)
    """The source's name of a weight that is called otherwise."""
    zeros: frozenset[str]
    """Weights that the source has not."""
    left_out: tuple[str, ...]
    """Weights of the source that have no place and must be zeros."""

    def specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The specs of a decoder that was made from this one, told what is made of zeros."""
        return {name: replace(spec, fill="zeros") if name in self.zeros else spec for name, spec in specs.items()}


def relayout(decoder: Decoder, family: str) -> Relayout:
    """`decoder` as one of `family`, computing the same.

    Raises:
        ExportUsageError: if there is no such family, or it or the decoder has no experts.
        EngineFitError: with a sentence for each thing that `family` has no words for.
    """
    known = [name for name, row in FAMILIES.items() if row.moe]
    if family not in known or decoder.blocks.moe is None:
        raise ExportUsageError(
            f"--family is for layouts of experts ({', '.join(known)}); this is {decoder.family} to {family}"
        )
    new = replace(
        decoder,
        family=family,
        qkv_bias=_bias(FAMILIES[family].qkv_bias, decoder.qkv_bias),
        layers=tuple(replace(layer, ffn=_ffn(layer.ffn, family)) for layer in decoder.layers),
    )
    problems = list(_problems(decoder, new))
    if problems:
        raise EngineFitError(f"{decoder.family} has no equal in {family}:\n  " + "\n  ".join(problems[:6]))
    sources = dict(_renamed(decoder, new))
    before = decoder.tensors()
    zeros = frozenset(name for name in new.tensors() if sources.get(name, name) not in before)
    used = {sources.get(name, name) for name in new.tensors()}
    return Relayout(
        decoder=new, sources=sources, zeros=zeros, left_out=tuple(name for name in before if name not in used)
    )


def _bias(rule: str, now: bool) -> bool:
    return {"always": True, "never": False}.get(rule, now)


def _ffn(ffn: FFN, family: str) -> FFN:
    """What is the same function, told in the family's words."""
    moe = FAMILIES[family].moe
    if ffn.kind != "moe" or moe is None:
        return ffn
    # Over all experts a softmax sums to 1 by itself.
    normalized = ffn.normalized or (not moe.normalized_key and ffn.top_k == ffn.experts)
    shared = (ffn.shared_width or _SHARED_WIDTH) if moe.shared else 0
    return replace(ffn, normalized=normalized, shared_width=shared)


def _problems(old: Decoder, new: Decoder) -> Iterator[str]:
    family, moe = new.blocks, new.blocks.moe
    assert moe is not None
    if old.blocks.qk_norm != family.qk_norm:
        has, other = (old.family, new.family) if old.blocks.qk_norm else (new.family, old.family)
        yield f"in {has} queries and keys pass a norm, in {other} they do not, and no weights make a norm nothing"
    if old.output_bias and family.output_bias == "never":
        yield f"the attention's output has a bias, which {new.family} has not"
    for index, layer in enumerate(old.layers):
        if layer.ffn.kind != "moe":
            continue
        if not new.layers[index].ffn.normalized and not moe.normalized_key:
            yield (
                f"layer {index}: the weights of its top {layer.ffn.top_k} of {layer.ffn.experts} experts are not "
                f"made to sum to 1, and those of {new.family} always are"
            )
    known = set(uniform_obstacles(old))
    yield from (f"layer {index}: {told}" for index, told in uniform_obstacles(new) if (index, told) not in known)


def _renamed(old: Decoder, new: Decoder) -> Iterator[tuple[str, str]]:
    """(name in the new layout, name in the old) of what both have."""
    before, after = old.blocks.moe, new.blocks.moe
    assert before is not None and after is not None
    for index, layer in enumerate(old.layers):
        if layer.ffn.kind == "moe":
            prefix = f"model.layers.{index}."
            yield from ((prefix + new_name, prefix + name) for new_name, name in _pairs(before, after, layer))


def _pairs(before: Moe, after: Moe, layer: Layer) -> Iterator[tuple[str, str]]:
    yield after.router, before.router
    for expert in range(layer.ffn.experts):
        for old, new in zip(before.matrices, after.matrices, strict=True):
            yield (
                after.expert.replace("{expert}", str(expert)).format(new) + ".weight",
                before.expert.replace("{expert}", str(expert)).format(old) + ".weight",
            )
    if layer.ffn.shared_width and before.shared and after.shared:
        yield after.shared_gate, before.shared_gate
        yield from ((f"{after.shared.format(m)}.weight", f"{before.shared.format(m)}.weight") for m in _SHARED)
