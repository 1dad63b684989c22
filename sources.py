# SPDX-License-Identifier: Apache-2.0
"""What `refound export` is pointed at: a model directory, or the weights of a training wherever they lie.

A training's weights may be in a refound checkpoint, in the memory of a live job, or in a checkpoint of DCP (which is
what FSDP2 trainings save) or DeepSpeed. They become a model directory beside the export, which goes when it is done.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters.saved import base_named, becomes_model, check_tuned, is_rounded, served_model
from .ckpt.client import sockets_of
from .ckpt.errors import ConfigError
from .ckpt.source import open_source
from .ckpt.tree import Json
from .ckpt.whole import Whole, is_module
from .export.adapter import Adapter, base_of, is_adapter, merged, read_adapter
from .export.atomic import require_space
from .export.directory import open_directory
from .export.errors import ExportUsageError, ModelDamageError, ModelDirectoryError
from .export.trained import Trained, match_names, planned_directory, require_like, write_directory

if TYPE_CHECKING:
    import torch

    from .ckpt.shard import Slot
    from .export.directory import ModelDirectory


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model directory, and what it was made of."""

    model: Path
    told: str
    """Empty: it is the user's own."""


def is_training(source: str) -> bool:
    """Whether `source` is something else than a model directory: a checkpoint, an adapter, or the name of a job."""
    from .export.dcp_checkpoint import is_dcp
    from .export.zero_checkpoint import find_zero

    path = Path(source)
    if not path.exists():
        return "/" not in source and bool(sockets_of(source))
    if is_adapter(path) or becomes_model(path):
        return True
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return False
    return path.is_dir() and (is_dcp(path) or find_zero(path) is not None or _has_snapshots(path))


def default_out(source: str) -> Path:
    """Where an export goes: beside what it is made of."""
    path = Path(source).absolute()
    return path.with_name(f"{path.name}-export")


def configuration_of(source: str, like: Path | None) -> Path:
    """The directory whose config.json describes what `source` is."""
    if not is_training(source):
        return Path(source)
    path = Path(source)
    if like is None and becomes_model(path):
        return base_named(path)
    if like is None and is_adapter(path) and (named := base_of(path)).is_dir():
        return named
    return require_like(like, path if path.exists() else source)


@contextmanager
def model_directory(source: str, like: Path | None, out: Path) -> Iterator[Found]:
    """The directory that is exported; that of a training is made beside `out` and removed afterwards.

    like: the model that the training began with, for configuration and tokenizer; needed if none lies with it.

    Raises:
        ExportError: see `export.trained`, and `require_space`.
        ConfigError, DamageError: from a refound checkpoint or a job; ConfigError if `source` is nothing at all.
    """
    if not is_training(source):
        yield Found(model=Path(source), told="")
        return
    like = configuration_of(source, like)
    with ExitStack() as stack:
        if becomes_model(Path(source)):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)))
            model, told = stack.enter_context(served_model(Path(source), like, folder))
            yield Found(model=model, told=told)
            return
        trained = stack.enter_context(open_trained(source, like))
        needed_bytes = sum(stored.bytes for stored in planned_directory(trained, like).tensors.values())
        require_space(out.parent, needed_bytes)
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)))
        write_directory(trained, like, folder)
        yield Found(model=folder, told=trained.told)


def beside_base(source: str, like: Path | None, *, merge: bool) -> "tuple[Adapter, ModelDirectory] | None":
    """The adapter at `source` with its base, if it is to stay one; None for anything else, and if it is merged.

    Raises:
        ExportUsageError: `merge` is asked for and `source` is no adapter.
        ExportError: see `export.adapter.read_adapter`.
    """
    if becomes_model(Path(source)):
        return None
    if not is_adapter(Path(source)):
        if merge:
            raise ExportUsageError(f"--merge is for adapters, and {source} is none: it has no adapter_config.json")
        return None
    if merge:
        return None
    check_tuned(Path(source))
    named = configuration_of(source, like)
    if is_rounded(named):
        raise ExportUsageError(
            f"the base {named} has rounded weights, so there is nothing to prove the adapter against. Engines that "
            f"load this base take it as it is: vllm serve {named} --enable-lora --lora-modules name={source}; or put "
            f"it into these weights: refound adapter merge {source} --into {named} --out DIR"
        )
    base = open_directory(named, tokenizer=False)
    return read_adapter(Path(source), base), base


@contextmanager
def planned(source: str, like: Path | None) -> "Iterator[ModelDirectory | None]":
    """What `model_directory` would make, without writing it. None: `source` is a model directory.

    Raises:
        As `model_directory`.
    """
    if not is_training(source):
        yield None
        return
    like = configuration_of(source, like)
    if becomes_model(Path(source)):
        with tempfile.TemporaryDirectory() as folder, served_model(Path(source), like, Path(folder)) as (model, _):
            yield open_directory(model, tokenizer=False)
        return
    with open_trained(source, like) as trained:
        yield planned_directory(trained, like)


@contextmanager
def open_trained(source: str, like: Path) -> Iterator[Trained]:
    """The weights of a training, to be read while the block runs.

    Raises:
        ModelDirectoryError, ModelDamageError: it holds no model of that kind, or cannot be read.
        ConfigError, DamageError: from a refound checkpoint or a job.
    """
    from .export.dcp_checkpoint import is_dcp, read_dcp
    from .export.zero_checkpoint import find_zero, read_zero

    path = Path(source)
    if is_adapter(path):
        check_tuned(path)
        base = open_directory(like, tokenizer=False)
        adapter = read_adapter(path, base)
        adapter.check_numbers()
        yield merged(adapter, base)
    elif path.is_dir() and is_dcp(path):
        yield read_dcp(path)
    elif path.is_dir() and (zero := find_zero(path)):
        yield read_zero(zero)
    else:
        with open_source(source) as opened:
            whole = Whole(opened.shard, opened.facts["world_size"])
            where = f"checkpoint {path}" if path.exists() else f"memory of job {source}"
            yield _of_snapshot(whole, f"{where}, step {opened.facts['step']}", like)


def _has_snapshots(path: Path) -> bool:
    from .ckpt.examine import find_checkpoints

    try:
        return bool(find_checkpoints(path))
    except ConfigError:
        return False


# --- refound's own ---------------------------------------------------------------------------------------------


def _of_snapshot(whole: Whole, told: str, like: Path) -> Trained:
    """The protected object that is the model; the one called `model` if several could be."""
    from .export.directory import read_decoder

    found: dict[str, Trained] = {}
    for name, data in whole.objects().items():
        if is_module(data):
            found[name] = _of_module(whole, name, f"{told}, {name!r}")
        elif isinstance(data, dict) and {"masters", "layout", "rest"} <= data.keys():
            found[name] = _of_zero(whole, data, f"{told}, {name!r}")
    if not found:
        raise ModelDirectoryError(f"{told} holds no model: protected are {', '.join(whole.objects())}")
    fits, reasons = {}, []
    for name, trained in found.items():
        try:
            match_names(trained, read_decoder(like))
        except ValueError as error:
            reasons.append(error)
        else:
            fits[name] = trained
    if not fits:
        raise reasons[0]
    if len(fits) > 1 and "model" not in fits:
        raise ModelDirectoryError(
            f"{told} holds several models of this kind: {', '.join(fits)}. Write one out: refound convert … --to "
            "safetensors, with the configuration beside it"
        )
    return fits["model"] if "model" in fits else next(iter(fits.values()))


def _of_module(whole: Whole, name: str, told: str) -> Trained:
    slots, _ = whole.module(name)
    return Trained(
        told=told,
        shapes={key: whole.shape(slot) for key, (_, slot) in slots.items()},
        dtypes={key: slot.dtype for key, (_, slot) in slots.items()},
        read=lambda key: _tensor(whole, *slots[key]),
    )


def _of_zero(whole: Whole, data: dict[str, Json], told: str) -> Trained:
    """Of a DeepSpeed engine: parameters lie in flat masters as `layout` says; what no optimizer owns is beside."""
    ends: dict[str, int] = {}
    places: dict[str, tuple[str, int, tuple[int, ...]]] = {}
    for piece, name, shape in data["layout"]:
        places[name] = (piece, ends.get(piece, 0), tuple(shape))
        ends[piece] = ends.get(piece, 0) + math.prod(shape)
    masters = {name: whole.slot(0, item["$tensor"]) for name, item in data["masters"].items()}
    for piece, end in ends.items():
        held = math.prod(whole.shape(masters[piece]))
        slack = 2 * len(whole.shards)  # DeepSpeed rounds up to a multiple of twice the ranks
        if not end <= held <= end + slack:
            raise ModelDamageError(f"{told}: {piece} has {held} elements and its parameters are {end}")
    rest = {name: whole.slot(0, item["$tensor"]) for name, item in data["rest"].items() if "$tensor" in item}
    if data["stage"] == 3:
        rest = {}  # frozen parameters are cut without a description of how

    def read(name: str) -> "torch.Tensor":
        if name not in places:
            return _tensor(whole, 0, rest[name])
        piece, at, shape = places[name]
        return _tensor(whole, 0, masters[piece])[at : at + math.prod(shape)].reshape(shape)

    return Trained(
        told=told,
        shapes={name: shape for name, (_, _, shape) in places.items()} | {n: whole.shape(s) for n, s in rest.items()},
        dtypes={name: masters[piece].dtype for name, (piece, _, _) in places.items()}
        | {name: slot.dtype for name, slot in rest.items()},
        read=read,
    )


def _tensor(whole: Whole, rank: int, slot: "Slot") -> "torch.Tensor":
    import torch

    data: Any = torch.from_numpy(whole.tensor(rank, slot).copy())
    return data.view(getattr(torch, slot.dtype)).reshape(whole.shape(slot))
