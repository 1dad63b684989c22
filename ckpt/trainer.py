# SPDX-License-Identifier: Apache-2.0
"""A callback that protects what Hugging Face's `Trainer` trains; the script needs nothing else.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[refound.TrainerCallback()])
    trainer.train()

Restored are model, optimizer, scheduler, every random generator, the position in the data and the Trainer's own
progress (logs, best metric, the counters of callbacks such as early stopping). A step's snapshot begins when the next
one begins, so after the evaluation, log and save that belong to it. Not promised: a batch that was in flight is
collated anew, so a collator that draws random numbers draws others for that one batch; and of several calls of train()
in one process only the first is protected.

`Trainer` reads its position before it calls any callback, so this wraps `Trainer._run_epoch` (transformers 5), once,
for trainers that have this callback; it refuses a version without that method.
"""

import functools
import sys
from importlib.metadata import version
from typing import Any

# By the modules that define them: to type-check what `import transformers` offers takes minutes.
from transformers.trainer import Trainer
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.trainer_callback import TrainerCallback as Callback

from .collect import random_state, set_random_state
from .errors import ConfigError
from .protection import Protection, protect

_RESTORED = "(restored by refound)"
"""Stands for a checkpoint directory, which does not exist, where `Trainer` wants one to skip batches."""
_PROGRESS = (
    *("epoch", "global_step", "num_input_tokens_seen", "total_flos", "log_history"),
    *("best_metric", "best_global_step", "best_model_checkpoint"),
)


class TrainerCallback(Callback):
    """Give one to `Trainer(callbacks=[…])`. `every` and `save_frozen` are those of `protect`."""

    def __init__(self, *, every: int | str = 1, save_frozen: bool = True) -> None:
        """Raises ConfigError if this version of transformers cannot be resumed."""
        _install()
        self._every, self._save_frozen = every, save_frozen
        self._job: Protection | None = None
        self._over = False
        self._random: dict[str, Any] | None = None

    # --- called by the wrapped Trainer._run_epoch ----------------------------------------------------------------

    def enter_epoch(self, trainer: Any, facts: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments to run this epoch with; None if all of it has been trained before the restart."""
        if self._over:
            return facts
        if self._job is None:
            self._protect(trainer, facts["model"])
        assert self._job is not None
        if self._job.restored is None:
            return facts
        whole, within = divmod(self._job.restored.step, facts["num_update_steps_per_epoch"])
        if facts["epoch"] < whole or trainer.state.global_step >= trainer.state.max_steps:
            return None
        if facts["epoch"] > whole:
            return facts
        batches = 0 if trainer.args.ignore_data_skip else within * trainer.args.gradient_accumulation_steps
        position = {"epochs_trained": whole, "steps_trained_in_current_epoch": batches}
        return facts | position | {"resume_from_checkpoint": _RESTORED if batches else None}

    def _protect(self, trainer: Any, model: Any) -> None:
        objects = {"optimizer": trainer.optimizer, "scheduler": trainer.lr_scheduler, "trainer": _Progress(trainer)}
        objects = {name: value for name, value in objects.items() if value is not None}
        self._job = protect(every=self._every, save_frozen=self._save_frozen, model=model, **objects)
        if self._job.restored is not None:
            self._random = random_state()  # samplers draw from it before the first step
        else:
            self._job.step = trainer.state.global_step  # from a checkpoint that the script resumes from, perhaps

    # --- called by Trainer ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size starts training anew in the same process, which cannot be protected"
            )
        if self._over and state.is_local_process_zero:
            words = "refound: train() is called again in this process; only the first is protected"
            print(words, file=sys.stderr, flush=True)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        self._end_steps(state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._job is not None:
            self._end_steps(state)
            self._job.close(done=False)  # most scripts save the model after train()
            self._job, self._over = None, True

    def _end_steps(self, state: TrainerState) -> None:
        while self._job is not None and self._job.step < state.global_step:
            self._job.end_step()


class _Progress:
    """How far a `Trainer` has got, besides what it trains."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def _callbacks(self) -> dict[str, Any]:
        found = self._trainer.callback_handler.callbacks
        return {type(callback).__name__: callback for callback in found if isinstance(callback, ExportableState)}

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "state": {name: getattr(trainer.state, name) for name in _PROGRESS if hasattr(trainer.state, name)},
            "loss": [trainer._tr_loss, trainer._total_loss_scalar, trainer._globalstep_last_logged],
            "flos": float(trainer.current_flos),
            "callbacks": {name: callback.state()["attributes"] for name, callback in self._callbacks().items()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        trainer = self._trainer
        for name, value in saved["state"].items():
            setattr(trainer.state, name, value)
        loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = saved["loss"]
        trainer._tr_loss, trainer.current_flos = loss.to(trainer.args.device), saved["flos"]
        for name, callback in self._callbacks().items():
            for key, value in saved["callbacks"].get(name, {}).items():
                setattr(callback, key, value)


def _install() -> None:
    """Wrap `Trainer._run_epoch` once."""
    original = getattr(Trainer, "_run_epoch", None)
    if original is None:
        raise ConfigError(
            f"transformers {version('transformers')} has no Trainer._run_epoch, which TrainerCallback needs to go on "
            "within an epoch: use transformers 5 (tested with 5.24), or refound.protect() in a loop of your own"
        )
    if hasattr(original, "_refound"):
        return

    @functools.wraps(original)
    def run_epoch(self: Any, **facts: Any) -> Any:
        callback = next((c for c in self.callback_handler.callbacks if isinstance(c, TrainerCallback)), None)
        entered = callback.enter_epoch(self, facts) if callback else facts
        return None if entered is None else original(self, **entered)

    run_epoch._refound = True  # type: ignore[attr-defined]
    trainer_class: Any = Trainer
    trainer_class._run_epoch = run_epoch
