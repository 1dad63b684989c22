# SPDX-License-Identifier: Apache-2.0
"""Lives of a `Trainer` for incarnations.py: accumulation, evaluation, early stopping, epochs; cut short and resumed.

Four updates make an epoch of sixteen samples. A snapshot is taken every `every` updates; the first life ends in the
middle of an update, the second goes on to the end. All it logs and ends with must be that of an undisturbed one.
"""

import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import refound
import torch
import transformers
from torch.utils.data import TensorDataset

CUT, UPDATES = 7, 10
"""The update in which the first life ends, and how many there are."""


class Model(torch.nn.Module):
    """A layer with dropout, so that the losses depend on the random generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.nn.functional.dropout(self.layer(x), 0.3)  # also in evaluation, which so draws from it
        return {"loss": (found - labels).pow(2).mean(), "logits": found}


class Cut(transformers.TrainerCallback):
    """Ends the process like a kill, in the middle of an update, when the last snapshot is safe."""

    def __init__(self, protecting: refound.TrainerCallback) -> None:
        self._protecting = protecting

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == CUT - 1:
            job = self._protecting._job
            assert job is not None and job._link is not None
            job._wait()
            assert job._link.wait_committed(job._last_snapshot, 30_000)
            os._exit(0)


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    x = torch.stack([row[0] for row in rows])
    return {"x": x, "labels": x.flip(1)}


def train(out: Path, callbacks: list[Any], *, again: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 4))
    settings = transformers.TrainingArguments(
        str(out),
        max_steps=UPDATES,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-2,
    )
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=20)
    trainer = transformers.Trainer(
        Model(),
        settings,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collate,
        callbacks=[*callbacks, stopping],
    )
    trainer.train()
    if again:
        trainer.args.max_steps += 1
        trainer.train()
    timings = ("runtime", "per_second")
    logged = trainer.state.log_history
    return {
        "history": [{k: v for k, v in entry.items() if not k.endswith(timings)} for entry in logged],
        "weights": [p.tolist() for p in trainer.model.parameters()],
        "patience": stopping.early_stopping_patience_counter,
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
        "random": torch.rand(1).item(),
    }


Life = Callable[[Path], None]


def undisturbed(folder: Path) -> None:
    (folder / "expected.json").write_text(json.dumps(train(folder / "whole", [])))


def lives(every: int) -> list[Life]:
    """Cut short and going on, with a snapshot every so many updates."""
    out = f"every{every}"

    def cut_short(folder: Path) -> None:
        callback = refound.TrainerCallback(every=every)
        train(folder / out, [Cut(callback), callback])
        raise AssertionError("it was not cut short")

    def goes_on(folder: Path) -> None:
        callback = refound.TrainerCallback(every=every)
        found = train(folder / out, [Began(every), callback])
        assert json.loads(json.dumps(found)) == json.loads((folder / "expected.json").read_text()), found

    return [cut_short, goes_on]


def jobs() -> list[list[Life]]:
    """One goes on from the middle of an epoch, another from its end."""
    return [[undisturbed], lives(3), [*lives(4), again]]


def again(folder: Path) -> None:
    """The job is over: its state comes back, nothing is trained, and another train() is left alone, and said to be."""
    callback = refound.TrainerCallback(every=4)
    with redirect_stderr(StringIO()) as said:
        found = train(folder / "every4", [callback], again=True)
    assert "train() is called again in this process; only the first is protected" in said.getvalue()
    assert found["history"][-1]["step"] == UPDATES + 1, found["history"]


class Began(transformers.TrainerCallback):
    """Asserts that the first update of this life is the one after the last snapshot."""

    def __init__(self, every: int) -> None:
        self._expected: int | None = (CUT - 1) // every * every

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._expected in (None, state.global_step), (self._expected, state.global_step)
        self._expected = None
