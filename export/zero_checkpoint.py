# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed checkpoints with ZeRO 1, 2 or 3: the float32 masters of all ranks put together, without DeepSpeed.

A file is read with torch's `weights_only`. The classes of DeepSpeed that it names are replaced by an empty one, so none
of its code is run and none is needed; any other class is refused. Layout: `zero_to_fp32.py` of deepspeed 0.19, where
stages 1 and 2 cut a group's parameters, laid end to end, into one range a rank, and stage 3 cuts each parameter.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import ModelDamageError, UnknownArchitectureError
from .trained import Trained, damaged

_OPTIMIZER, _MODEL = "*_optim_states.pt", "*_model_states.pt"
_FLAT_2, _FLAT_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"


class _Unused:
    """In the place of an object of DeepSpeed's, which nothing here asks anything of."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Where a parameter begins: in each rank's flat tensors, or in those of all ranks laid together."""

    group: int
    offset: int
    shape: tuple[int, ...]


def find_zero(path: Path) -> Path | None:
    """The directory with the optimizer files: `path`, or the one that its file `latest` names."""
    latest = path / "latest"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if latest.is_file() and (tag := latest.read_text().strip()) and Path(tag).name == tag:
            path = path / tag
    return path if path.is_dir() and any(path.glob(_OPTIMIZER)) else None


def read_zero(path: Path) -> Trained:
    """The weights of the checkpoint in `path` (see `find_zero`), as float32.

    Raises:
        ModelDamageError: a file is missing, cut short, or does not fit the others.
        UnknownArchitectureError: tensor- or pipeline-parallel, or a file names classes that are not DeepSpeed's.
    """
    models, optimizers = _sorted(path.glob(_MODEL)), _sorted(path.glob(_OPTIMIZER))
    if any(not re.search(r"mp_rank_00_", file.name) for file in optimizers):
        raise UnknownArchitectureError(f"{path} is of a tensor- or pipeline-parallel training, which is not read here")
    if not models:
        raise ModelDamageError(f"{path} has {len(optimizers)} files of optimizer states and no {_MODEL}: copy it again")
    first = _load(models[0])
    states = [_load(file)["optimizer_state_dict"] for file in optimizers]
    try:
        ranks = states[0]["partition_count"]
        ranks = max(ranks) if isinstance(ranks, list) else ranks
        if ranks != len(states):
            raise ModelDamageError(f"{path} has the optimizer states of {len(states)} ranks of {ranks}: copy it again")
        reader = _Stage3(states, first) if _FLAT_3 in states[0] else _Stage2(states, first)
        frozen = _frozen(first, models, cut=_FLAT_3 in states[0])
        shared = dict(first.get("shared_params") or {})
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged(path, error) from error
    shapes = reader.shapes | {name: tuple(tensor.shape) for name, tensor in frozen.items()}
    shared = {name: other for name, other in shared.items() if other in shapes}

    def read(name: str) -> torch.Tensor:
        name = shared.get(name, name)
        return frozen[name].float() if name in frozen else reader.read(name)

    shapes |= {name: shapes[other] for name, other in shared.items()}
    return Trained(
        told=f"DeepSpeed checkpoint {path}",
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, "float32"),
        read=read,
    )


def _sorted(files: Iterator[Path]) -> list[Path]:
    """By the rank in their names, as numbers."""
    return sorted(files, key=lambda file: [int(part) for part in re.findall(r"\d+", file.name)])


def _load(file: Path) -> dict[str, Any]:
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        others = [name for name in named if not name.startswith("deepspeed.")]
        if others:
            raise UnknownArchitectureError(
                f"{file} names {', '.join(sorted(others)[:3])}, which is none of DeepSpeed's; it is not read, since "
                "that would run it. Save the checkpoint without client state that is not plain data"
            )
        stand_ins: list[Any] = [(_Unused, name) for name in named]
        with torch.serialization.safe_globals(stand_ins):
            found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UnknownArchitectureError:
        raise
    except Exception as error:  # torch raises this and that for a file that is cut short
        raise damaged(file, error) from error
    if not isinstance(found, dict):
        raise ModelDamageError(f"{file} holds no states")
    return found


def _named_shapes(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int, str, tuple[int, ...]]]:
    """(group, number in it, name, shape)."""
    for group, shapes in enumerate(groups):
        for number, (name, shape) in enumerate(shapes.items()):
            yield group, number, name, tuple(shape)


def _frozen(first: dict[str, Any], models: list[Path], *, cut: bool) -> dict[str, torch.Tensor]:
    """Parameters that no optimizer owns."""
    fragments, shapes = first.get("frozen_param_fragments"), first.get("frozen_param_shapes")
    if not fragments or not shapes:
        return {}
    if not cut:
        return {name: fragments[name].reshape(tuple(shape)) for name, shape in shapes.items()}
    ranks = [_load(file)["frozen_param_fragments"] for file in models]
    found = {}
    for name, shape in shapes.items():
        whole = torch.cat([rank[name].reshape(-1) for rank in ranks])
        found[name] = whole[: math.prod(tuple(shape))].reshape(tuple(shape))
    return found


class _Stage2:
    """Stages 1 and 2: each group is one flat tensor, of which every rank has a range."""

    def __init__(self, states: list[dict[str, Any]], first: dict[str, Any]) -> None:
        self._parts: list[list[torch.Tensor]] = [
            list(group) for group in zip(*(s[_FLAT_2] for s in states), strict=True)
        ]
        paddings = states[0].get("param_alignment_paddings")
        self._pieces: dict[str, _Piece] = {}
        ends = [0] * len(self._parts)
        for group, number, name, shape in _named_shapes(first["param_shapes"]):
            self._pieces[name] = _Piece(group=group, offset=ends[group], shape=shape)
            ends[group] += math.prod(shape) + (paddings[group][number] if paddings else 0)
        for end, parts in zip(ends, self._parts, strict=True):
            held, slack = sum(part.numel() for part in parts), 2 * len(states)
            if -(-end // slack) != -(-held // slack):  # DeepSpeed rounds a group up to twice the ranks
                raise ModelDamageError(f"the ranks hold {held} elements of a group and its parameters are {end}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: piece.shape for name, piece in self._pieces.items()}

    def read(self, name: str) -> torch.Tensor:
        piece = self._pieces[name]
        low, high = piece.offset, piece.offset + math.prod(piece.shape)
        found, at = [], 0
        for part in self._parts[piece.group]:
            found.append(part[max(low - at, 0) : max(high - at, 0)])
            at += part.numel()
        return torch.cat(found).float().reshape(piece.shape)


class _Stage3:
    """Stage 3: every rank has a range of each parameter; those of a rank lie end to end in its flat tensors."""

    def __init__(self, states: list[dict[str, Any]], first: dict[str, Any]) -> None:
        self._flat = [torch.cat([part.reshape(-1) for part in state[_FLAT_3]]) for state in states]
        self._pieces: dict[str, _Piece] = {}
        end = 0
        for group, _, name, shape in _named_shapes(first["param_shapes"]):
            self._pieces[name] = _Piece(group=group, offset=end, shape=shape)
            end += self._share(shape)
        if any(flat.numel() != end for flat in self._flat):
            raise ModelDamageError(f"a rank holds {self._flat[0].numel()} elements and its parameters are {end}")

    def _share(self, shape: tuple[int, ...]) -> int:
        return -(-math.prod(shape) // len(self._flat))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: piece.shape for name, piece in self._pieces.items()}

    def read(self, name: str) -> torch.Tensor:
        piece = self._pieces[name]
        share = self._share(piece.shape)
        whole = torch.cat([flat[piece.offset : piece.offset + share] for flat in self._flat])
        return whole[: math.prod(piece.shape)].float().reshape(piece.shape)
