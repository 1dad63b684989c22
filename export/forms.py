# SPDX-License-Identifier: Apache-2.0
"""The forms that a decoder's configuration can take, and what goes along with each.

`uniform`: the family's own configuration, for layers that are alike. `nemotron-nas`: Llama blocks that differ, read by
several engines as they are, and as `deci` in GGUF. `per_layer_config`: blocks of other families that differ.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from . import per_layer
from .architecture import Decoder
from .configs import NEMOTRON, uniform_obstacles, write_config, write_nemotron, write_per_layer
from .directory import read_json

Form = Literal["uniform", "nemotron-nas", "per_layer_config"]

REMOTE_FILES: dict[Form, tuple[str, ...]] = {
    "uniform": (),
    "nemotron-nas": ("configuration_decilm.py", "modeling_decilm.py"),
    "per_layer_config": ("configuration_per_layer.py", "modeling_per_layer.py"),
}
"""The modelling code that transformers needs for it, and is asked to trust."""
_REMOTE = Path(__file__).parent / "remote"
OWN_FILES = tuple(_REMOTE / name for names in REMOTE_FILES.values() for name in names)
"""All of them, as they are in refound."""
_WRITERS = {"uniform": write_config, "nemotron-nas": write_nemotron, "per_layer_config": write_per_layer}


def forms_of(decoder: Decoder) -> tuple[Form, ...]:
    """The forms that have words for this decoder, most common first. Empty: none has."""
    forms: list[Form] = []
    if not uniform_obstacles(decoder):
        forms.append("uniform")
    windows = any(layer.attention.window for layer in decoder.layers)
    experts = any(layer.ffn.kind == "moe" for layer in decoder.layers)
    if decoder.family == "llama" and not windows and not experts and not decoder.output_bias:
        forms.append("nemotron-nas")
    if not per_layer.obstacles(decoder):
        forms.append("per_layer_config")
    return tuple(forms)


def configuration(decoder: Decoder, form: Form | None = None) -> dict[str, Any]:
    """The `config.json`; in the first of its forms if none is named.

    Raises:
        ValueError: if that form has no words for the decoder.
    """
    return _WRITERS[form or next(iter(forms_of(decoder)), "uniform")](decoder)


def copy_remote(directory: Path, form: Form = "nemotron-nas") -> None:
    """The modelling files of a form, beside its `config.json`."""
    for name in REMOTE_FILES[form]:
        shutil.copyfile(_REMOTE / name, directory / name)


def needs_code(raw: Mapping[str, Any]) -> bool:
    """Whether transformers can load what this `config.json` describes only with modelling code beside it."""
    ours = {NEMOTRON, per_layer.PER_LAYER} & set(raw.get("architectures") or [])
    return bool(ours) or raw.get("model_type") in ("nemotron-nas", per_layer.MODEL_TYPE) or "per_layer_config" in raw


def directory_needs_code(path: Path) -> bool:
    """The same of a directory. Raises ModelDamageError if its configuration cannot be read."""
    return path.is_dir() and needs_code(read_json(path / "config.json"))
