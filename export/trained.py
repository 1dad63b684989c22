# SPDX-License-Identifier: Apache-2.0
"""Weights straight from training as a model directory: named tensors from any reader, beside a configuration.

A reader (`dcp_checkpoint`, `zero_checkpoint`, and outside this room refound's own snapshots) says which tensors there
are and reads one at a time. The configuration and the tokenizer come from the model that the training began with.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .architecture import Decoder
from .directory import INDEX, ModelDirectory, Stored, read_decoder
from .errors import ExportUsageError, ModelDamageError, ModelDirectoryError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 4_000_000_000
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ANCHOR = "model.norm.weight"
"""A weight that every decoder has and no optimizer keeps under a name that ends so."""
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The weights of a training, wherever they lie."""

    told: str
    """What it is and of which step, for the record: `DCP checkpoint …`."""
    shapes: Mapping[str, tuple[int, ...]]
    """By the names that the training gave them; may hold more than a model, such as optimizer state."""
    dtypes: Mapping[str, str]
    """As torch calls them, without `torch.`."""
    read: Callable[[str], "torch.Tensor"]
    """A whole tensor by its name."""


def find_configuration(source: Path) -> Path | None:
    """The directory with a config.json that belongs to a checkpoint: it, or one of the two above."""
    resolved = source.resolve()
    places = (resolved, *resolved.parents[:2])
    return next((place for place in places if (place / "config.json").is_file()), None)


def write_directory(trained: Trained, like: Path, to: Path) -> None:
    """A Hugging Face directory in the empty directory `to`, with configuration and tokenizer of `like`.

    Raises:
        ModelDirectoryError: `like` is no model directory.
        ExportUsageError: `like` is of another architecture than what was trained.
        ModelDamageError: a weight cannot be read.
    """
    from safetensors.torch import save_file

    planned = planned_directory(trained, like)
    sources = match_names(trained, planned.decoder)
    _check_tied(trained, planned.decoder, sources[_EMBEDDING])
    weight_map = {}
    groups = list(_groups(planned))
    for number, names in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: trained.read(sources[name]).contiguous() for name in names}
        save_file(tensors, to / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(stored.bytes for stored in planned.tensors.values())
        (to / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    dtype = trained.dtypes[sources[_EMBEDDING]]
    config = json.loads((like / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"dtype": dtype, "torch_dtype": dtype}))
    for file in planned.companions:
        shutil.copyfile(file, to / file.name)


def planned_directory(trained: Trained, like: Path) -> ModelDirectory:
    """What `write_directory` will write; its tensors are in no file yet.

    Raises:
        ModelDirectoryError, ExportUsageError: as there; ModelDirectoryError for weights that are no floats.
    """
    decoder = read_decoder(like)
    tensors = {}
    for name, source in match_names(trained, decoder).items():
        dtype = _DTYPES.get(trained.dtypes[source])
        if dtype is None:
            raise ModelDirectoryError(f"{trained.told}: {source} is {trained.dtypes[source]}, no kind of float")
        tensors[name] = Stored(file=like, dtype=dtype, shape=trained.shapes[source])
    return ModelDirectory(path=like, decoder=decoder, tensors=tensors, notes=())


def _check_tied(trained: Trained, decoder: Decoder, embedding: str) -> None:
    head = _HEAD.join(embedding.rsplit(_EMBEDDING, 1))
    if not decoder.tied or head not in trained.shapes:
        return
    if not (trained.read(head) == trained.read(embedding)).all():
        raise ExportUsageError(
            f"{trained.told} has an output matrix of its own, and the configuration ties it to the embedding: say "
            "tie_word_embeddings false in the config.json that --like names"
        )


def _groups(planned: ModelDirectory) -> Iterator[list[str]]:
    """The weights of each file."""
    group: list[str] = []
    size_bytes = 0
    for name, stored in planned.tensors.items():
        if group and size_bytes + stored.bytes > SHARD_BYTES:
            yield group
            group, size_bytes = [], 0
        group.append(name)
        size_bytes += stored.bytes
    yield group


def match_names(trained: Trained, decoder: Decoder) -> dict[str, str]:
    """The training's name of each weight of the decoder: with a prefix of its own, without what wrappers put in.

    Raises:
        ExportUsageError: if no prefix gives every weight with its shape; names what is missing or has another shape.
    """
    bare: dict[str, str] = {}
    for name in trained.shapes:
        bare.setdefault(_unwrapped(name), name)
    prefixes = sorted((name.removesuffix(_ANCHOR) for name in bare if f".{name}".endswith(f".{_ANCHOR}")), key=len)
    if not prefixes:
        raise ExportUsageError(
            f"{trained.told} holds {len(bare)} tensors ({', '.join(list(bare)[:3])}, …) and none that ends with "
            f"{_ANCHOR}, so it holds no decoder that is known here"
        )
    faults = {prefix: _faults(trained, decoder, prefix, bare) for prefix in prefixes}
    prefix = min(prefixes, key=lambda prefix: len(faults[prefix]))
    if not (found := faults[prefix]):
        return {name: bare[prefix + name] for name in decoder.tensors()}
    hint = ". Merge adapters before" if any("lora_" in name for name in bare) else ""
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    raise ExportUsageError(
        f"{trained.told} does not hold the model that --like describes: {'; '.join(found[:4])}{more}{hint}"
    )


def _faults(trained: Trained, decoder: Decoder, prefix: str, bare: Mapping[str, str]) -> list[str]:
    """What keeps the tensors below `prefix` from being the decoder's."""
    specs, faults = decoder.tensors(), []
    for name, spec in specs.items():
        source = bare.get(prefix + name)
        if source is None:
            faults.append(f"{name} is missing")
        elif trained.shapes[source] != spec.shape:
            faults.append(f"{name} is {list(trained.shapes[source])} where {list(spec.shape)} was expected")
    layers = f"{prefix}model.layers."
    names = [name.removeprefix(prefix) for name in bare if name.startswith(layers)]
    return faults + [f"{name} has no place" for name in names if name not in specs and "rotary" not in name]


def _unwrapped(name: str) -> str:
    """Without what FSDP, activation checkpointing and torch.compile put between the parts of a name."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def require_like(like: Path | None, source: Path | str) -> Path:
    """The directory whose configuration and tokenizer are taken.

    Raises:
        ExportUsageError: if none is named and none lies with the checkpoint.
        ModelDirectoryError: if it has no config.json.
    """
    found = like or (find_configuration(source) if isinstance(source, Path) else None)
    if found is None:
        raise ExportUsageError(
            f"{source} holds weights, and neither configuration nor tokenizer: say --like MODEL, the directory of the "
            "model that this training began with"
        )
    if not (found / "config.json").is_file():
        raise ModelDirectoryError(f"--like {found} has no config.json")
    return found


def damaged(path: Path, error: Exception) -> ModelDamageError:
    """What a reader raises for a file that cannot be read."""
    return ModelDamageError(f"{path} cannot be read: {error}")
