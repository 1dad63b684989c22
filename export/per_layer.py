# SPDX-License-Identifier: Apache-2.0
"""Layers that differ, as the `per_layer_config` of transformers 5 says it: one value for all, and what is otherwise.

transformers keeps such a configuration, sizes its caches by it and hides values that vary, but none of its own classes
of the families here builds layers from it (read in 5.24, `integrations/heterogeneity`): Llama's raises on KV heads that
vary, and passes over `skip` without a word. So the model class goes along (`remote/modeling_per_layer.py`). vLLM runs
that class in its Transformers backend.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .architecture import FFN, Attention, Decoder, Layer
from .errors import ModelDirectoryError, UnknownArchitectureError

PER_LAYER = "PerLayerForCausalLM"
MODEL_TYPE = "per-layer-decoder"
BLOCKS = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose blocks the class can be built of."""
_ATTENTION, _FFN = "self_attn", "mlp"
"""In `skip`: what a layer is without, by its module's name."""


def obstacles(decoder: Decoder) -> list[tuple[int, str]]:
    """What a `per_layer_config` has no words for: (layer, sentence) each."""
    windows = {layer.attention.window for layer in decoder.layers if layer.attention.window}
    found = []
    for index, layer in enumerate(decoder.layers):
        if layer.attention.kind == "linear" or layer.ffn.kind == "linear":
            found.append((index, "per_layer_config has no linear subblocks"))
        if layer.ffn.kind == "moe" or decoder.family not in BLOCKS:
            found.append((index, "layers with experts that differ are not written"))
        if layer.attention.window and (decoder.family == "llama" or len(windows) > 1):
            told = "llama has no attention windows" if decoder.family == "llama" else "windows of several sizes"
            found.append((index, told))
    if not any(layer.attention.kind == "grouped" for layer in decoder.layers):
        found.append((0, "no layer has attention, so there is no cache to count positions by"))
    return found


def write(decoder: Decoder, common: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json`, beside the settings that all layouts have in `common`.

    Raises:
        ValueError: see `obstacles`.
    """
    if bad := obstacles(decoder):
        raise ValueError("; ".join(f"layer {index}: {told}" for index, told in bad))
    heads = _most(layer.attention.kv_heads for layer in decoder.layers if layer.attention.kind == "grouped")
    width = _most(layer.ffn.width for layer in decoder.layers if layer.ffn.kind == "dense")
    window = next((layer.attention.window for layer in decoder.layers if layer.attention.window), None)
    differing = {str(i): _override(layer, heads, width) for i, layer in enumerate(decoder.layers)}
    return {
        **common,
        "architectures": [PER_LAYER],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_per_layer.PerLayerConfig",
            "AutoModel": "modeling_per_layer.PerLayerModel",
            "AutoModelForCausalLM": f"modeling_per_layer.{PER_LAYER}",
        },
        "blocks": decoder.family,
        "num_key_value_heads": heads,
        "intermediate_size": width,
        "attention_bias": decoder.qkv_bias and decoder.family != "qwen2",
        "mlp_bias": decoder.ffn_bias,
        "sliding_window": window,
        "layer_types": _types(decoder),
        "per_layer_config": {index: told for index, told in differing.items() if told},
    }


def _most(values: Any) -> int:
    found = Counter(values).most_common(1)
    return found[0][0] if found else 1


def _override(layer: Layer, heads: int, width: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if layer.attention.kind == "none":
        told["skip"] = [_ATTENTION]
    elif layer.attention.kv_heads != heads:
        told["num_key_value_heads"] = layer.attention.kv_heads
    if layer.ffn.kind == "none":
        told["skip"] = [*told.get("skip", []), _FFN]
    elif layer.ffn.width != width:
        told["intermediate_size"] = layer.ffn.width
    return told


def _types(decoder: Decoder) -> list[str]:
    """A layer without attention has the type of the first with: that one keeps its cache in the first entry."""
    first = next(layer.attention for layer in decoder.layers if layer.attention.kind == "grouped")
    seen = [layer.attention if layer.attention.kind == "grouped" else first for layer in decoder.layers]
    return ["sliding_attention" if attention.window else "full_attention" for attention in seen]


def read_layers(raw: Mapping[str, Any], usual: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers of a configuration with `per_layer_config`: `usual`, changed where it says so.

    Raises:
        UnknownArchitectureError: if something varies that is not in the table.
        ModelDirectoryError: if it is malformed.
    """
    told = raw.get("per_layer_config") or {}
    if told and any(layer.ffn.kind == "moe" for layer in usual):
        raise UnknownArchitectureError("per_layer_config of a model with experts is not in the table")
    layers = list(usual)
    try:
        overrides = {int(key): dict(changes) for key, changes in told.items()}
        skipped = {index: set(changes.pop("skip", [])) for index, changes in overrides.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelDirectoryError(f"config.json: per_layer_config cannot be read: {error!r}") from error
    for index, changes in overrides.items():
        if not 0 <= index < len(layers):
            raise ModelDirectoryError(f"per_layer_config names layer {index} of {len(layers)}")
        layers[index] = _changed(layers[index], changes, skipped[index], f"per_layer_config[{index}]")
    return tuple(layers)


def _changed(layer: Layer, changes: dict[str, Any], skip: set[Any], where: str) -> Layer:
    heads = changes.pop("num_key_value_heads", layer.attention.kv_heads)
    width = changes.pop("intermediate_size", layer.ffn.width)
    if unknown := [*changes, *sorted(str(name) for name in skip - {_ATTENTION, _FFN})]:
        raise UnknownArchitectureError(f"{where} changes {', '.join(unknown)}, which is not in the table")
    if not (isinstance(heads, int) and isinstance(width, int) and heads > 0 and width > 0):
        raise ModelDirectoryError(f"{where} has no usable number of KV heads or width: {heads!r}, {width!r}")
    attention = Attention(kind="none") if _ATTENTION in skip else replace(layer.attention, kv_heads=heads)
    return Layer(attention=attention, ffn=FFN(kind="none") if _FFN in skip else replace(layer.ffn, width=width))
