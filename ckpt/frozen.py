# SPDX-License-Identifier: Apache-2.0
"""Parameters that do not train, left out of the snapshots and proven at every restore: for adapters on a large base.

With `protect(…, save_frozen=False)` a parameter is *frozen* if it did not require gradients when `protect` was called
and has not changed since. The script makes it anew in every start, as it must before it calls `protect`; a snapshot
holds only its checksum.

Promised: a restore has the very same frozen bits as the snapshot's job, or is refused before anything is changed. What
changes although it requires no gradients (the moving average of a teacher) is noticed, by its bytes, in the first
snapshot after the change, and saved from that one on. Not promised: a job whose script cannot make its base again;
leave save_frozen as it is for that one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..erasure import checksum
from .copier import flat_bytes
from .zero import ZeroState


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """One frozen parameter of this rank."""

    parameter: torch.Tensor
    checksum: int
    """CRC32C of its bytes, as snapshots hold it."""
    mark: int
    """What is cheap to compute where it lies."""

    @property
    def tensor(self) -> torch.Tensor:
        """This rank's part, where it is now."""
        return local(self.parameter)


class FrozenSet:
    """The frozen parameters by path, as the script made them."""

    def __init__(self, objects: dict[str, Any]) -> None:
        self._frozen: dict[str, Frozen] = {}
        for path, parameter in candidates(objects):
            tensor = local(parameter)
            self._frozen[path] = Frozen(parameter=parameter, checksum=crc(tensor), mark=mark(tensor))

    def __len__(self) -> int:
        return len(self._frozen)

    def get(self, path: str) -> Frozen | None:
        return self._frozen.get(path)

    def changed(self) -> list[str]:
        """Those whose bytes are no longer what they were. Reads all of them."""
        return [path for path, frozen in self._frozen.items() if mark(frozen.tensor) != frozen.mark]

    def thaw(self, paths: Iterable[str]) -> None:
        """These are saved from now on."""
        for path in paths:
            self._frozen.pop(path, None)


def parameters(objects: dict[str, Any]) -> Iterator[tuple[str, torch.nn.Parameter | torch.Tensor]]:
    """Every parameter of every module under all its paths; of a DeepSpeed engine, those that no optimizer owns."""
    for name, value in objects.items():
        if isinstance(value, ZeroState):
            yield from ((f"{name}/rest/{key}", tensor) for key, tensor in value.frozen().items())
        elif isinstance(value, torch.nn.Module):
            yield from ((f"{name}/{key}", p) for key, p in value.named_parameters(remove_duplicate=False))


def candidates(objects: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Every parameter without gradients, by its path."""
    return [(path, parameter) for path, parameter in parameters(objects) if not parameter.requires_grad]


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter."""
    with torch.no_grad():
        return parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()  # type: ignore[attr-defined]


def crc(tensor: torch.Tensor) -> int:
    """CRC32C of a tensor's bytes."""
    return checksum(flat_bytes(tensor).cpu().numpy())


def mark(tensor: torch.Tensor) -> int:
    """A number that changes with a tensor's bytes, without moving them off their device."""
    return crc(tensor) if tensor.device.type == "cpu" else word_sum(tensor)


def word_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bytes, taken as 32-bit words as far as they go."""
    data = flat_bytes(tensor)
    whole = len(data) // 4 * 4
    words = data[:whole].view(torch.int32).sum(dtype=torch.int64)
    return int(words + data[whole:].sum(dtype=torch.int64))


def size_hint(objects: dict[str, Any]) -> str:
    """What to say to a user whose model is mostly frozen and saved all the same, or nothing."""
    frozen = sum(local(p).numel() * p.element_size() for _, p in candidates(objects))
    total = sum(local(p).numel() * p.element_size() for _, p in parameters(objects))
    if frozen < 1 << 28 or 2 * frozen < total:
        return ""
    return (
        f"{frozen / 2**20:.0f} of the model's {total / 2**20:.0f} MB do not train and are in every snapshot. If this "
        "script makes them the same in every start, protect(…, save_frozen=False) leaves them out and proves them"
    )
