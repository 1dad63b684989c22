# SPDX-License-Identifier: Apache-2.0
"""The search space: what each layer of a child may be, bounded by the recipe and by what the engines serve.

The engine table of `export` decides: a layer that one of the recipe's engines refuses, or that no configuration has
words for, is left out with the reason. What an engine takes only as weights of zeros stays in, since it computes the
same; the zeros are not counted in its costs. What it takes only with layers made alike, or only by
a plugin, is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..export.architecture import FFN, Attention, Decoder, Layer
from ..export.configs import read_config
from ..export.engines import ENGINES, find_engines
from ..export.errors import ExportUsageError
from ..export.fit import check_fit
from ..export.forms import configuration
from .errors import RecipeError
from .expert_shapes import expert_name
from .experts import expert_ffns, in_layout, kinds_of
from .formats import SOURCE, Block, Kind, format_of, rounded, served, source_of
from .recipe import Space


def name_of(block: Block) -> str:
    """`kv2`, `w768`, `4of16x96`, `linear` or `none`; `w768-int4` if its weights are stored so."""
    if (stored := format_of(block)) != SOURCE:
        return f"{name_of(source_of(block))}-{stored}"
    if block.kind in ("linear", "none"):
        return block.kind
    if isinstance(block, FFN) and block.kind == "moe":
        return expert_name(block)
    return f"kv{block.kv_heads}" if isinstance(block, Attention) else f"w{block.width}"


@dataclass(frozen=True, kw_only=True)
class LayerSpace:
    """The choices of one layer. The first of each kind is the teacher's own."""

    attention: tuple[Attention, ...]
    ffn: tuple[FFN, ...]
    pairs: tuple[tuple[int, int], ...]
    """Those that may stand together, as indices; the teacher's (0, 0) comes first."""
    kinds: tuple[str, ...] = ()
    """Of each pair the kind of child that it is for, see `experts`; all layers of a child are of one. Empty: there is
    one kind. The teacher's own pair is there once for each kind that has dense layers."""

    def layer(self, pair: tuple[int, int]) -> Layer:
        return Layer(attention=self.attention[pair[0]], ffn=self.ffn[pair[1]])


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    layers: tuple[LayerSpace, ...]
    excluded: tuple[str, ...]
    """What the engines do not take, a sentence each."""

    def child(self, teacher: Decoder, choice: tuple[tuple[int, int], ...]) -> Decoder:
        layers = tuple(space.layer(pair) for space, pair in zip(self.layers, choice, strict=True))
        return in_layout(replace(teacher, layers=layers))


def make_space(teacher: Decoder, recipe: Space) -> SearchSpace:
    """All layers' choices.

    Raises:
        RecipeError: for unknown engines, KV heads that do not divide the teacher's, or a teacher that an engine does
            not take at all.
        ExportError: see `formats.served`.
    """
    try:
        engines = find_engines(",".join(recipe.engines))
    except ExportUsageError as error:
        raise RecipeError(f"space.engines: {error}") from error
    known: dict[tuple[Layer, str], LayerSpace] = {}
    excluded: dict[str, None] = {}
    formats, refused = served(recipe.formats, engines)
    layers = []
    for index, layer in enumerate(teacher.layers):
        where = "first" if index == 0 else "last" if index == len(teacher.layers) - 1 else "middle"
        if (layer, where) not in known:
            found = _layer_space(teacher, index, recipe, engines, excluded)
            known[layer, where] = _in_formats(teacher, found, formats, excluded)
        layers.append(known[layer, where])
    if recipe.ffn_experts:
        kinds, told = kinds_of(teacher, expert_ffns(teacher, recipe.ffn_experts), engines)
        excluded |= dict.fromkeys(told)
        layers = [_with_experts(layer, kinds) for layer in layers]
    return SearchSpace(layers=tuple(layers), excluded=(*excluded, *refused))


def _layer_space(
    teacher: Decoder, index: int, recipe: Space, engines: tuple[str, ...], excluded: dict[str, None]
) -> LayerSpace:
    layer = teacher.layers[index]
    attention = tuple(dict.fromkeys(_attentions(teacher, layer.attention, recipe)))
    ffn = tuple(dict.fromkeys(_ffns(layer.ffn, recipe)))
    pairs = []
    for one in range(len(attention)):
        for other in range(len(ffn)):
            changed = Layer(attention=attention[one], ffn=ffn[other])
            reasons = _refusals(teacher, index, changed, engines)
            if not reasons:
                pairs.append((one, other))
            elif (one, other) == (0, 0):
                raise RecipeError(f"the teacher itself cannot be served as a child would be: {'; '.join(reasons)}")
            if 0 in (one, other):  # by itself, beside the teacher's own
                excluded |= dict.fromkeys(reasons)
    used_attention = sorted({one for one, _ in pairs})
    used_ffn = sorted({other for _, other in pairs})
    return LayerSpace(
        attention=tuple(attention[one] for one in used_attention),
        ffn=tuple(ffn[other] for other in used_ffn),
        pairs=tuple((used_attention.index(one), used_ffn.index(other)) for one, other in pairs),
    )


def _in_formats(teacher: Decoder, space: LayerSpace, formats: tuple[str, ...], excluded: dict[str, None]) -> LayerSpace:
    """The same choices in all formats, those in the source's first: nothing that was there changes its place."""
    if not formats:
        return space
    attention, attention_ways = _stored(teacher, space.attention, formats, excluded)
    ffn, ffn_ways = _stored(teacher, space.ffn, formats, excluded)
    every = [(way, other) for one, two in space.pairs for way in attention_ways[one] for other in ffn_ways[two]]
    pairs = dict.fromkeys([*space.pairs, *every])
    return LayerSpace(attention=attention, ffn=ffn, pairs=tuple(pairs))


def _stored(
    teacher: Decoder, blocks: tuple[Kind, ...], formats: tuple[str, ...], excluded: dict[str, None]
) -> tuple[tuple[Kind, ...], list[list[int]]]:
    """(the blocks and then their rounded forms, for each of `blocks` the places of all its forms)."""
    found, ways = list(blocks), [[index] for index in range(len(blocks))]
    for index, block in enumerate(blocks):
        for name in formats if block.kind != "none" else ():
            made = rounded(teacher, block, name)
            if isinstance(made, str):
                excluded[made] = None
            else:
                ways[index].append(len(found))
                found.append(made)
    return tuple(found), ways


def _with_experts(space: LayerSpace, kinds: list[tuple[FFN, bool]]) -> LayerSpace:
    """The same choices, and for each mixture of `kinds` its own kind of child, with the teacher's own or without."""
    ffn, pairs, names = list(space.ffn), list(space.pairs), [""] * len(space.pairs)
    for mixture, mixes in kinds:
        ffn.append(mixture)
        new = [(0, len(ffn) - 1), (0, 0)] if mixes else [(0, len(ffn) - 1)]
        pairs += new
        names += [name_of(mixture)] * len(new)
    return replace(space, ffn=tuple(ffn), pairs=tuple(pairs), kinds=tuple(names))


def _attentions(teacher: Decoder, own: Attention, recipe: Space) -> Iterator[Attention]:
    yield own
    if own.kind == "grouped":
        divisors = [heads for heads in range(own.kv_heads, 0, -1) if own.kv_heads % heads == 0]
        wanted = divisors if recipe.kv_heads is None else recipe.kv_heads
        if odd := [heads for heads in wanted if heads not in divisors]:
            raise RecipeError(
                f"space.kv_heads: {odd} do not divide the teacher's {own.kv_heads} (its divisors: {divisors})"
            )
        yield from (replace(own, kv_heads=heads) for heads in sorted(wanted, reverse=True))
        if recipe.attention_linear:
            yield Attention(kind="linear")
    if recipe.attention_none:
        yield Attention(kind="none")


def _ffns(own: FFN, recipe: Space) -> Iterator[FFN]:
    yield own
    if own.kind == "dense":
        for percent in sorted(recipe.ffn_percent, reverse=True):
            width = max(round(own.width * percent / 100 / recipe.multiple), 1) * recipe.multiple
            if width < own.width:
                yield FFN(width=width)
        if recipe.ffn_linear:
            yield FFN(kind="linear")
    if recipe.ffn_none:
        yield FFN(kind="none")


def _refusals(teacher: Decoder, index: int, layer: Layer, engines: tuple[str, ...]) -> list[str]:
    layers = list(teacher.layers)
    layers[index] = layer
    child = replace(teacher, layers=tuple(layers))
    reasons = [
        f"{ENGINES[name].title}: {finding.problem}"
        for name in engines
        for finding in check_fit(child, name)
        if finding.exact is None or finding.alike or finding.plugin
    ]
    if not reasons and read_config(configuration(child)).layers != child.layers:
        reasons.append(f"{layer}: config.json has no words for it")
    return reasons


def count_pairs(space: SearchSpace) -> int:
    return sum(len(layer.pairs) for layer in space.layers)
