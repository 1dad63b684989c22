# SPDX-License-Identifier: Apache-2.0
"""How a training loop goes on after it was killed, with and without torchrun.

Under torchrun with refound's backend it is `protect`: snapshots in memory. Without, `DiskGuard` does the same with a
file: the whole state every few steps, renamed into place, and back from it bit for bit.
"""

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from ..ckpt.frozen import local
from ..ckpt.link import Place
from .errors import CacheWriteError, DamagedFileError, StateMismatchError
from .proven import read_proven, write_proven

STATE = "state.safetensors"


def state_folder(out: Path) -> Path:
    """Where the state of a run that writes to `out` is, while it runs."""
    return out.absolute().with_name(f".{out.absolute().name}.state")


class Guard(Protocol):
    """What a training loop needs: the step it is at, a word at the end of each, and one when all is done."""

    step: int

    def end_step(self) -> None: ...

    def close(self) -> Any: ...


def guard(
    folder: Path,
    *,
    run: str,
    every: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    data: Any,
    alone: bool = False,
    cut: bool = False,
) -> Guard:
    """Protect model, optimizer and position in the data, and bring back what a killed run had reached.

    run: says which run it is, for `DiskGuard`; a state of another one is refused.
    every: steps between two states on disk.
    alone: on disk, though torchrun may be there.
    cut: each rank holds a part of the state.
    optimizer: None where the model brings it along, as a DeepSpeed engine does; then not on disk.
    """
    if Place.from_environment() is not None and not alone:
        from ..ckpt.protection import protect

        brings: dict[str, Any] = {} if optimizer is None else {"optimizer": optimizer}
        return protect(model=model, **brings, data=data)
    assert optimizer is not None
    if cut:
        from .shard_state import ShardedDiskGuard

        return ShardedDiskGuard(folder, run=run, every=every, model=model, optimizer=optimizer, data=data)
    return DiskGuard(folder, run=run, every=every, model=model, optimizer=optimizer, data=data)


class DiskGuard:
    """The state of a single process in `folder`/state.safetensors."""

    def __init__(
        self,
        folder: Path,
        *,
        run: str,
        every: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Any,
    ) -> None:
        """Raises StateMismatchError if the state there is of another run, or is damaged."""
        self._own, self._run, self._every = folder, run, every
        self._model, self._optimizer, self._data = model, optimizer, data
        self.step = 0
        if (file := self._newest()) is not None:
            self._load(file)

    def _place(self) -> Path:
        """Of the state that is written next."""
        return self._own / STATE

    def _newest(self) -> Path | None:
        """The state to go on from."""
        file = self._own / STATE
        return file if file.is_file() else None

    def end_step(self) -> None:
        self.step += 1
        if self.step % self._every == 0:
            self.save()

    def close(self) -> None:
        """The result is written: the state goes."""
        shutil.rmtree(self._own, ignore_errors=True)

    def save(self) -> None:
        """Raises CacheWriteError if the disk is full or cannot be written; the state before stays."""
        file = self._place()
        tensors = {f"model.{name}": local(tensor) for name, tensor in self._model.state_dict().items()}
        tied = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if tied[tensor.data_ptr()] == name}
        for index, state in self._optimizer.state_dict()["state"].items():
            known = {name: local(torch.as_tensor(value)) for name, value in state.items()}
            tensors |= {f"optimizer.{index}.{name}": value for name, value in known.items()}
        facts = {"run": self._run, "step": self.step, "data": self._data.state_dict()}
        try:
            write_proven(file, tensors, facts)
        except OSError as error:
            raise CacheWriteError(
                f"cannot write {file}: {error.strerror}. The state of an earlier step is kept; make room and "
                "run the same command again to go on from it"
            ) from error

    def _load(self, file: Path) -> None:
        try:
            tensors, facts = read_proven(file)
        except (DamagedFileError, OSError) as error:
            raise StateMismatchError(f"{error}. Delete {file} to start this run anew") from error
        if facts["run"] != self._run:
            raise StateMismatchError(
                f"{file} is of a run with other settings or models. Choose another place for the result, or "
                "delete that file to start anew"
            )
        names = {name: name.removeprefix("model.") for name in tensors if name.startswith("model.")}
        with torch.no_grad():
            own = self._model.state_dict()
            for stored, name in names.items():
                local(own[name]).copy_(tensors[stored])
        states: dict[int, dict[str, torch.Tensor]] = {}
        for stored in (name for name in tensors if name.startswith("optimizer.")):
            _, index, name = stored.split(".", 2)
            states.setdefault(int(index), {})[name] = self._whole(int(index), tensors[stored])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})
        self._data.load_state_dict(facts["data"])
        self.step = facts["step"]

    def _whole(self, number: int, value: torch.Tensor) -> torch.Tensor:
        """State of the optimizer's parameter of this number, as the optimizer has it."""
        return value
