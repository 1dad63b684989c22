# SPDX-License-Identifier: Apache-2.0
"""How a training loop goes on after it was killed, with and without torchrun.

Under torchrun with refound's backend it is `protect`: snapshots in memory. Without, `DiskGuard` does the same with a
file: the whole state every few steps, renamed into place, and back from it bit for bit.
"""

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

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
    optimizer: torch.optim.Optimizer,
    data: Any,
    alone: bool = False,
) -> Guard:
    """Protect model, optimizer and position in the data, and bring back what a killed run had reached.

    run: says which run it is, for `DiskGuard`; a state of another one is refused.
    every: steps between two states on disk.
    alone: on disk, though torchrun may be there.
    """
    if Place.from_environment() is not None and not alone:
        from ..ckpt.protection import protect

        return protect(model=model, optimizer=optimizer, data=data)
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
        self._file, self._run, self._every = folder / STATE, run, every
        self._model, self._optimizer, self._data = model, optimizer, data
        self.step = 0
        if self._file.is_file():
            self._load()

    def end_step(self) -> None:
        self.step += 1
        if self.step % self._every == 0:
            self.save()

    def close(self) -> None:
        """The result is written: the state goes."""
        shutil.rmtree(self._file.parent, ignore_errors=True)

    def save(self) -> None:
        """Raises CacheWriteError if the disk is full or cannot be written; the state before stays."""
        tensors = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        tied = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        tensors = {name: tensor for name, tensor in tensors.items() if tied[tensor.data_ptr()] == name}
        for index, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        facts = {"run": self._run, "step": self.step, "data": self._data.state_dict()}
        try:
            write_proven(self._file, tensors, facts)
        except OSError as error:
            raise CacheWriteError(
                f"cannot write {self._file}: {error.strerror}. The state of an earlier step is kept; make room and "
                "run the same command again to go on from it"
            ) from error

    def _load(self) -> None:
        try:
            tensors, facts = read_proven(self._file)
        except (DamagedFileError, OSError) as error:
            raise StateMismatchError(f"{error}. Delete {self._file} to start this run anew") from error
        if facts["run"] != self._run:
            raise StateMismatchError(
                f"{self._file} is of a run with other settings or models. Choose another place for the result, or "
                "delete that file to start anew"
            )
        names = {name: name.removeprefix("model.") for name in tensors if name.startswith("model.")}
        with torch.no_grad():
            own = self._model.state_dict()
            for stored, name in names.items():
                own[name].copy_(tensors[stored])
        states: dict[int, dict[str, torch.Tensor]] = {}
        for stored in (name for name in tensors if name.startswith("optimizer.")):
            _, index, name = stored.split(".", 2)
            states.setdefault(int(index), {})[name] = tensors[stored]
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})
        self._data.load_state_dict(facts["data"])
        self.step = facts["step"]
