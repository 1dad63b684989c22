# SPDX-License-Identifier: Apache-2.0
"""Does a decoder fit an engine: which layer does not, why, what is exactly the same, and what is nearest."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import per_layer
from .alike import alike
from .architecture import FFN, Attention, Decoder, Layer
from .configs import NEMOTRON_STEP, uniform_obstacles
from .engines import ENGINES, Engine
from .forms import Form, forms_of

_ZERO_WIDTH = 32
"""Of an FFN of zeros: a block of every quantization of GGUF."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that an engine cannot take as it is."""

    engine: str
    layer: int | None
    """None: the model as a whole."""
    problem: str
    exact: Layer | None = None
    """A layer that computes the same and that the engine takes; it is written instead."""
    nearest: Layer | None = None
    """Where none is exact: the closest that the engine takes. It computes something else, so it is only named."""
    alike: bool = False
    """`exact` makes all layers as large as the largest, so nothing is gained by their being different."""
    plugin: bool = False
    """The layer stays as it is; code that goes along teaches the engine to compute it."""

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer}: "
        if self.plugin:
            return f"{where}{self.problem}; a plugin for the engine goes along, to be installed with pip"
        if self.exact:
            return f"{where}{self.problem}; written as {self.exact}, which computes the same"
        nearest = f"; the nearest that it takes: {self.nearest}" if self.nearest else ""
        return f"{where}{self.problem}{nearest}"


def check_fit(decoder: Decoder, name: str, form: Form | None = None) -> list[Finding]:
    """What the engine cannot take as it is. Empty: all of it fits.

    form: that it is written in. None: the one that suits the engine best, see `form_for`.
    """
    engine = ENGINES[name]
    form = form or form_for(decoder, name)
    findings = list(_families(decoder, name, engine, form))
    if any(finding.alike for finding in findings):
        same = alike(decoder)
        assert same is not None
        return findings + [finding for finding in check_fit(same, name) if finding.exact is None]
    uneven = form != "uniform" and bool(uniform_obstacles(decoder))
    for index, layer in enumerate(decoder.layers):
        for feature in features(decoder, index, uneven=uneven):
            rule = engine.rule(feature, form or "uniform")
            if rule.support == "yes":
                continue
            problem = f"{layer} is not for {engine.title}: {rule.why}"
            exact = _exact(decoder, layer, feature, form) if rule.support == "zero" else None
            plugin = rule.support == "plugin"
            nearest = None if exact or plugin else _nearest(decoder, layer, feature)
            exact = layer if plugin else exact
            found = Finding(engine=name, layer=index, problem=problem, exact=exact, nearest=nearest, plugin=plugin)
            findings.append(found)
    return findings


def form_for(decoder: Decoder, name: str) -> Form | None:
    """The form that the engine is given: the first that fits, or else the first it knows. None: it knows none."""
    known: list[Form] = [form for form in forms_of(decoder) if form in ENGINES[name].forms]
    for form in known:
        if all(finding.exact for finding in check_fit(decoder, name, form)):
            return form
    return known[0] if known else None


def final_form(decoder: Decoder, engines: tuple[str, ...]) -> Form:
    """The form that a decoder is written in once it is adapted to these engines."""
    forms = forms_of(decoder)
    for form in forms:
        if not _changes(decoder, engines, form):
            return form
    return forms[0]


def _changes(decoder: Decoder, engines: tuple[str, ...], form: Form) -> bool:
    return any(not finding.plugin for name in engines for finding in check_fit(decoder, name, form))


def needs_plugin(decoder: Decoder, engine: str, form: Form) -> bool:
    """Whether the engine computes some layer only with code that goes along."""
    return any(finding.plugin for finding in check_fit(decoder, engine, form))


def adapt(decoder: Decoder, engines: tuple[str, ...], form: Form | None = None) -> Decoder:
    """The decoder that is written for these engines together: the same function, with zeros where one needs them.

    Raises nothing: what does not fit at all is in `check_fit`.
    """
    layers = list(decoder.layers)
    for name in engines:
        # again and again, since one step (zeros for an FFN) may make another needed (a multiple of 256)
        while exact := _replacements(replace(decoder, layers=tuple(layers)), name, form):
            for index, layer in exact.items():
                layers[index] = layer
    return replace(decoder, layers=tuple(layers))


def _replacements(decoder: Decoder, name: str, form: Form | None) -> dict[int, Layer]:
    found = check_fit(decoder, name, form if form in forms_of(decoder) else None)
    return {
        finding.layer: finding.exact
        for finding in found
        if finding.exact and not finding.plugin and finding.layer is not None
    }


def _families(decoder: Decoder, name: str, engine: Engine, form: Form | None) -> Iterator[Finding]:
    if form is None:
        yield from _unlike(decoder, name, engine)
    if decoder.blocks.moe is None and decoder.family not in engine.families:
        known = ", ".join(engine.families)
        problem = f"{engine.title} is not known to take {decoder.family}; known are {known}"
        yield Finding(engine=name, layer=None, problem=problem)
    if decoder.rope["rope_type"] not in engine.ropes:
        why = "is not written into GGUF here" if engine.layout == "gguf" else "is not known to come out right there"
        problem = f"rope_type {decoder.rope['rope_type']!r} {why}; known are {', '.join(engine.ropes)}"
        yield Finding(engine=name, layer=None, problem=problem)
    even = decoder.heads * decoder.head_dim == decoder.hidden_size
    if engine.layout == "gguf" and decoder.blocks.gguf_head_dim == "even" and not even:
        problem = f"{decoder.heads} heads of {decoder.head_dim} are not the hidden size {decoder.hidden_size}"
        yield Finding(engine=name, layer=None, problem=f"{problem}, and it does not load {decoder.family} so")
    if engine.layout == "gguf" and (decoder.ffn_bias or decoder.output_bias):
        yield Finding(
            engine=name, layer=None, problem="biases of FFN and attention output are not written into GGUF here"
        )


def _unlike(decoder: Decoder, name: str, engine: Engine) -> Iterator[Finding]:
    """Layers that differ, for an engine that knows no form of that; the exact equivalent is alike, if there is one."""
    told = dict(uniform_obstacles(decoder))
    same = alike(decoder)
    why = f"{engine.title} takes {decoder.family} blocks only where all layers are alike"
    if same is None:
        reasons = {} if forms_of(decoder) else dict(per_layer.obstacles(decoder))
        for index, problem in told.items():
            yield Finding(engine=name, layer=index, problem=f"{problem}, and {reasons.get(index, why)}")
        return
    for index, (layer, changed) in enumerate(zip(decoder.layers, same.layers, strict=True)):
        if layer != changed:
            problem = f"{told.get(index, str(layer))}, and {why}"
            yield Finding(engine=name, layer=index, problem=problem, exact=changed, alike=True)


def features(decoder: Decoder, index: int, *, uneven: bool) -> Iterator[str]:
    """Names in `FEATURES` that this layer makes use of, most telling first."""
    layer = decoder.layers[index]
    attention, ffn = layer.attention, layer.ffn
    if attention.kind == "none":
        last = ", last" if index == len(decoder.layers) - 1 else ""
        yield "no attention, first" if index == 0 else f"neither{last}" if ffn.kind == "none" else "no attention"
    if ffn.kind == "none" and attention.kind != "none":
        yield "no ffn"
    if attention.kind == "linear":
        yield "linear attention"
    if ffn.kind == "linear":
        yield "linear ffn"
    if attention.window and attention.window < decoder.max_positions:
        alike = all(other.attention.window == attention.window for other in decoder.layers)
        yield "window" if alike else "window, some layers"
    if decoder.blocks.qk_norm and attention.kind == "grouped" and (decoder.qkv_bias or decoder.output_bias):
        yield "biases beside norms"
    if ffn.kind == "moe":
        yield decoder.family
        choice = ffn.top_k < ffn.experts  # over all of them the weights sum to 1 anyway
        if decoder.family == "qwen2_moe" and ffn.normalized and choice:
            yield "qwen2_moe normalized"
        if decoder.family == "qwen3_moe" and not ffn.normalized and choice:
            yield "qwen3_moe unnormalized"
    elif decoder.blocks.moe and ffn.kind == "dense":
        yield "dense among experts"
    if not uneven:
        return
    if attention.kind == "grouped" and attention.kv_heads != _usual(decoder).kv_heads:
        yield "kv heads a layer"
    if ffn.kind == "dense":
        yield "ffn width a layer"
        if ffn.width % NEMOTRON_STEP:
            yield "any ffn width"


def _usual(decoder: Decoder) -> Attention:
    return next((layer.attention for layer in decoder.layers if layer.attention.kind == "grouped"), Attention())


def _exact(decoder: Decoder, layer: Layer, feature: str, form: Form | None) -> Layer:
    """The same function, in a form that more engines take."""
    if feature == "no attention, first" or (form == "per_layer_config" and layer.attention.kind == "none"):
        return replace(layer, attention=Attention(kv_heads=_usual(decoder).kv_heads or 1, zero=True))
    if feature in ("no ffn", "neither, last"):
        return replace(layer, ffn=FFN(width=_ZERO_WIDTH, zero=True))
    wide = -(-layer.ffn.width // NEMOTRON_STEP) * NEMOTRON_STEP
    stored = 0 if layer.ffn.zero else layer.ffn.stored_width or layer.ffn.width
    return replace(layer, ffn=replace(layer.ffn, width=wide, stored_width=stored))


def _nearest(decoder: Decoder, layer: Layer, feature: str) -> Layer | None:
    attention, ffn = layer.attention, layer.ffn
    widths = [other.ffn.width for other in decoder.layers if other.ffn.kind == "dense"]
    usual = _usual(decoder)
    changes = {
        "kv heads a layer": replace(layer, attention=replace(attention, kv_heads=usual.kv_heads)),
        "linear attention": replace(layer, attention=Attention(kv_heads=usual.kv_heads or 1)),
        "linear ffn": replace(layer, ffn=FFN(width=min(widths, default=NEMOTRON_STEP))),
        "window": replace(layer, attention=replace(attention, window=None)),
        "window, some layers": replace(layer, attention=replace(attention, window=None)),
        "qwen2_moe normalized": replace(layer, ffn=replace(ffn, normalized=False)),
        "qwen3_moe unnormalized": replace(layer, ffn=replace(ffn, normalized=True)),
    }
    return changes.get(feature)
