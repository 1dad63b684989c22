# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model directory as it is read: checked whole before anything is made of it.

Only safetensors files are read, their headers by the rules of the format (8 bytes of length, JSON, data), each length
held against the file's own. Needs neither torch nor transformers until a weight is asked for.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architecture import Decoder
from .configs import read_config
from .errors import ModelDamageError, ModelDirectoryError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEADER_LIMIT = 100_000_000  # as in the safetensors library
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What goes along as it is, where it is there
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    dtype: str
    """As safetensors names it: F32, BF16, …"""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class ModelDirectory:
    """A directory that has been checked: every weight that its decoder needs is there, whole, with its shape."""

    path: Path
    decoder: Decoder
    tensors: dict[str, Stored]
    notes: tuple[str, ...]
    """What was found and put right on the way, as a sentence each."""

    @property
    def companions(self) -> tuple[Path, ...]:
        """Tokenizer, chat template and generation settings."""
        return tuple(self.path / name for name in COMPANIONS if (self.path / name).is_file())

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({stored.file for stored in self.tensors.values()}))

    def weights(self, names: list[str]) -> Iterator[tuple[str, "torch.Tensor"]]:
        """The tensors of these names one after the other, so that one at a time is in memory."""
        from safetensors import safe_open

        for file in self.files:
            wanted = [name for name in names if self.tensors[name].file == file]
            if not wanted:
                continue
            with safe_open(file, framework="pt") as opened:
                for name in wanted:
                    yield name, opened.get_tensor(name)

    def check_numbers(self) -> None:
        """Read every weight once.

        Raises:
            ModelDamageError: naming the tensors that hold NaN or infinity, or whose tied copy differs.
        """
        import torch

        bad = [name for name, tensor in self.weights(list(self.decoder.tensors())) if not torch.isfinite(tensor).all()]
        if bad:
            more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
            raise ModelDamageError(
                f"{self.path}: NaN or infinity in {', '.join(bad[:4])}{more}. No engine computes anything with these; "
                "export an earlier checkpoint of this training"
            )

    def fingerprint(self) -> str:
        """SHA-256 over configuration, weights and companions: what the export was made from."""
        digest = hashlib.sha256()
        for file in (self.path / "config.json", *self.files, *self.companions):
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()


def read_decoder(path: Path) -> Decoder:
    """What `path/config.json` describes, without a look at the weights.

    Raises:
        ModelDirectoryError: if there is no directory with a readable config.json.
        UnknownArchitectureError: if it describes something outside the table.
    """
    if not path.exists():
        raise ModelDirectoryError(f"{path} is not there")
    if not path.is_dir():
        raise ModelDirectoryError(
            f"{path} is a file; give the directory with its config.json, as save_pretrained writes it"
        )
    config = path / "config.json"
    if not config.is_file():
        raise ModelDirectoryError(f"{path} is not a model directory: it has no config.json{_nearby(path)}")
    return read_config(read_json(config))


def open_directory(path: Path, *, tokenizer: bool = True) -> ModelDirectory:
    """Check `path` whole and return it; no weight is read (see `check_numbers`).

    tokenizer: refuse a directory without one.

    Raises:
        ModelDirectoryError: not a model directory, pickled weights, no tokenizer.
        ModelDamageError: a shard is missing, cut short or malformed; weights are missing, too many, or misshapen.
        UnknownArchitectureError: see `read_decoder`.
    """
    decoder = read_decoder(path)
    tensors: dict[str, Stored] = {}
    for file in _weight_files(path):
        for name, stored in read_header(file).items():
            if name in tensors:
                raise ModelDamageError(f"{name} is in {tensors[name].file.name} and in {file.name}; which one is it?")
            tensors[name] = stored
    notes = _check(path, decoder, tensors)
    if tokenizer:
        require_tokenizer(path)
    return ModelDirectory(path=path, decoder=decoder, tensors=tensors, notes=notes)


def require_tokenizer(path: Path) -> None:
    """Raise ModelDirectoryError if the directory has no tokenizer."""
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise ModelDirectoryError(
            f"{path} has no tokenizer ({', '.join(_TOKENIZERS)}), and engines do not serve without. Copy the files of "
            "the model that it was trained from, or say --no-tokenizer if prompts come as token ids"
        )


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, its header held against its size.

    Raises:
        ModelDamageError: if the file is cut short, or its header is not one.
    """
    size_bytes = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size_bytes < 8 or length > min(size_bytes - 8, _HEADER_LIMIT):
            raise ModelDamageError(f"{file} is cut short within its header ({size_bytes} bytes): copy it again")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: Stored(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]))
                for name, entry in header.items()
            }
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            spans = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
            wrong = [name for name, stored in tensors.items() if stored.bytes != spans[name]]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelDamageError(f"{file} has no safetensors header: {error}") from error
    if 8 + length + end > size_bytes:
        raise ModelDamageError(
            f"{file} is cut short: {size_bytes:,} bytes of {8 + length + end:,}. Copy it again, or save the model again"
        )
    if wrong:
        raise ModelDamageError(f"{file}: {wrong[0]} has another length than its shape")
    return tensors


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ModelDamageError(f"{index} has no weight_map")
        files = [path / name for name in sorted(set(listed.values()))]
        outside = [file for file in files if file.parent != path]
        if outside:
            raise ModelDamageError(f"{index} points out of its directory: {outside[0]}")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelDamageError(
                f"{path}: {len(missing)} of {len(files)} shards are missing: {', '.join(missing[:4])}. Copy them again"
            )
        return files
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise ModelDirectoryError(
            f"{path} holds pickled weights ({pickles[0]}), and unpickling runs whatever code is in them: they are "
            "not read. Convert them with torch's restricted reader, then run this again:\n"
            f'  python -c "import torch, safetensors.torch as s; w = torch.load({str(path / pickles[0])!r}, '
            "map_location='cpu', weights_only=True); s.save_file({k: v.clone().contiguous() for k, v in w.items()}, "
            f"{str(path / _SINGLE)!r}, metadata={{'format': 'pt'}})\""
        )
    raise ModelDirectoryError(f"{path} has no weights: neither {_SINGLE} nor {INDEX} is there{_nearby(path)}")


def _check(path: Path, decoder: Decoder, tensors: dict[str, Stored]) -> tuple[str, ...]:
    """Every weight there, none unknown, each with its shape. A tied copy and buffers are left out, and said so."""
    specs, notes = decoder.tensors(), []
    if any(name.endswith(".weight_packed") for name in tensors):
        raise ModelDirectoryError(
            f"{path} holds rounded weights (compressed-tensors), which engines load as they are; nothing else is made "
            "of them here. Give the model that they were rounded from"
        )
    problems = []
    if missing := [name for name in specs if name not in tensors]:
        problems.append(f"{len(missing)} weights are missing: {', '.join(missing[:4])}")
    if decoder.tied and "lm_head.weight" in tensors:
        if not _equal(tensors, "lm_head.weight", "model.embed_tokens.weight"):
            problems.append("config.json ties lm_head to the embedding, but both are stored and differ: one is stale")
        notes.append("lm_head.weight is stored beside the embedding it is tied to; it is written once")
        del tensors["lm_head.weight"]
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # a buffer that old versions saved; every engine computes it
    if unknown := [name for name in tensors if name not in specs]:
        problems.append(f"{len(unknown)} weights have no place in {decoder.family}: {', '.join(unknown[:4])}")
    for name, spec in specs.items():
        stored = tensors.get(name)
        if stored and stored.shape != spec.shape:
            problems.append(f"{name} has shape {list(stored.shape)} where config.json says {list(spec.shape)}")
        elif stored and stored.dtype not in _FLOATS:
            problems.append(f"{name} is {stored.dtype}, quantized by a method that is not read here")
    if problems:
        more = f"\n  and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ModelDamageError(
            f"{path} does not hold what its config.json says:\n  " + "\n  ".join(problems[:6]) + more
        )
    return tuple(notes)


def _equal(tensors: dict[str, Stored], one: str, other: str) -> bool:
    from safetensors import safe_open

    if one not in tensors or other not in tensors or tensors[one].shape != tensors[other].shape:
        return False
    found = []
    for name in (one, other):
        with safe_open(tensors[name].file, framework="pt") as opened:
            found.append(opened.get_tensor(name))
    return bool((found[0] == found[1]).all())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelDamageError if the file cannot be read, or holds something else."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ModelDamageError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelDamageError(f"{path} holds no JSON object")
    return found


def _nearby(path: Path) -> str:
    """A hint where a directory one step down looks like the one that was meant."""
    inside = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
    return f"; did you mean {path / inside[0]}?" if inside else ""
