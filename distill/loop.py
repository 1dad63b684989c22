# SPDX-License-Identifier: Apache-2.0
"""Global distillation: the whole child against the whole teacher, over text that comes exactly once.

Runs alone (`refound distill …`) or on several ranks under torchrun, each with its share of every batch, and with whole
models or its part of them: see `parallel`. Killed, it goes on where it was: see `resume`. The result is a model
directory beside the child's.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..ckpt.position import Position
from ..export.atomic import require_absent
from ..export.directory import ModelDirectory
from .chunked import HeadLoss, head_loss
from .config import DistillConfig, digest
from .errors import DistillUsageError, DivergedError, TextError
from .logit_store import LogitStore, stored_kl
from .losses import cosine_distance, find_divergence
from .models import load, open_blocks, positions_of, states_of
from .parallel import Parallel, Replicated, find_parallel
from .quality import Quality, measure
from .ranks import is_first, on_every_rank
from .resume import guard, state_folder
from .save import RECORD, save_model
from .texts import open_tokenizer, pack

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What a distillation did."""

    steps: int
    tokens: int
    before: Quality
    after: Quality
    curve: tuple[tuple[int, Quality], ...]
    """(tokens trained on, quality on held-out text), in order, of this process's life."""

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "curve": [{"tokens": tokens, **quality.to_json()} for tokens, quality in self.curve],
        }

    @staticmethod
    def of_json(told: dict[str, Any]) -> "Distilled":
        curve = tuple((one["tokens"], _quality(one)) for one in told["curve"])
        return Distilled(
            steps=told["steps"],
            tokens=told["tokens"],
            before=_quality(told["before"]),
            after=_quality(told["after"]),
            curve=curve,
        )

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.tokens:,} tokens\nbefore: {self.before}\nafter:  {self.after}"


def _quality(told: dict[str, Any]) -> Quality:
    return Quality(**{key: value for key, value in told.items() if key != "tokens"})


def run_distillation(config: DistillConfig, progress: Progress) -> Distilled | None:
    """`distill` on all ranks of this process's torchrun; None on ranks other than the first."""
    return on_every_rank(lambda told: distill(config, told), progress)


def distill(config: DistillConfig, progress: Progress, *, alone: bool = False) -> Distilled:
    """Distil `config.child` and write the result to `config.out`; what is there already of the same run is returned.

    alone: on this process only, with its state on disk, whatever torchrun says.

    Raises:
        ExportError, DistillError: for a model, a text or a state that cannot be used; DivergedError if the loss is no
            number: the last good state is kept.
    """
    child, teacher = open_blocks(config.child), open_blocks(config.teacher)
    _check_alike(child, teacher)
    training = config.training
    steps = training.tokens // (training.length * training.batch)
    tokenizer = open_tokenizer(config.teacher)
    eos = eos_of(teacher)
    lengths = {"tokenizer": tokenizer, "eos": eos, "length": training.length}
    windows = torch.from_numpy(pack(config.sources, "train", count=max(steps, 1) * training.batch, **lengths))
    held_out = torch.from_numpy(pack(config.sources, "test", count=config.held_out, **lengths))
    stored = config.stored if config.logits is not None else 0
    told = [digest(config.training), config.sources, config.seed, stored, child.fingerprint(), teacher.fingerprint()]
    run = digest(told if config.parallel == "ddp" else [*told, config.parallel])
    if (done := _finished(config, run)) is not None:
        progress(f"{config.out} is the result of this very run already")
        return done
    require_absent(config.out, overwrite=config.overwrite)
    parallel = Replicated() if alone else find_parallel(config.parallel)
    store = None
    if config.logits is not None:
        store = LogitStore(config.logits, teacher=teacher.fingerprint(), windows=windows, k=config.stored)
        if is_first() and not store.full:
            store.fill(load(teacher), progress)
        if dist.is_initialized():
            dist.barrier()
    model, learner = parallel.load(teacher, trained=False), parallel.load(child, trained=True)
    loop = Loop(config, learner, model, windows, held_out, run, store, alone=alone, parallel=parallel)
    outcome = loop.run(steps, progress)
    stored = next(iter(child.tensors.values())).dtype
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
    weights = parallel.gather(loop.child, child.decoder.tensors(), dtype)
    if is_first():
        record = {
            "source": {"path": str(child.path.absolute()), "sha256": child.fingerprint()},
            "teacher": {"path": str(teacher.path.absolute()), "sha256": teacher.fingerprint()},
            "distilled": {"run": run, **outcome.to_json()},
        }
        save_model(config.out, child.decoder, weights, companions_of=child, record=record, overwrite=config.overwrite)
    if dist.is_initialized():
        dist.barrier()  # what a rank has not written yet may still be lost, and is restored
    loop.close()
    return outcome


def _finished(config: DistillConfig, run: str) -> Distilled | None:
    try:
        record = json.loads((config.out / RECORD).read_text())["distilled"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Distilled.of_json(record) if record.get("run") == run else None


def eos_of(source: ModelDirectory) -> int:
    """The token that ends a document.

    Raises:
        TextError: if the configuration names none.
    """
    eos = source.decoder.tokens.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int):
        raise TextError(f"{source.path}/config.json names no eos_token_id, which documents are joined by")
    return eos


def _check_alike(child: ModelDirectory, teacher: ModelDirectory) -> None:
    one, other = child.decoder, teacher.decoder
    differ = [
        f"{name} {getattr(one, name)} and {getattr(other, name)}"
        for name in ("vocab_size", "hidden_size")
        if getattr(one, name) != getattr(other, name)
    ]
    if len(one.layers) != len(other.layers):
        differ.append(f"{len(one.layers)} and {len(other.layers)} layers")
    if differ:
        raise DistillUsageError(f"{child.path} is no child of {teacher.path}: {', '.join(differ)}")


class Loop:
    """The steps of one distillation. What of the child has gradients is trained.

    child, teacher: as `parallel` has loaded them. parallel: whole on each rank, if not given.
    auxiliary: a loss of the pass just made, added to the others; None: there is none.
    """

    def __init__(
        self,
        config: DistillConfig,
        child: Any,
        teacher: Any,
        windows: torch.Tensor,
        held_out: torch.Tensor,
        run: str,
        store: LogitStore | None,
        *,
        alone: bool,
        auxiliary: Callable[[], torch.Tensor] | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self._store, self._auxiliary, self._parallel = store, auxiliary, parallel or Replicated()
        self.child, self.teacher = child, teacher
        self._trained = [parameter for parameter in child.parameters() if parameter.requires_grad]
        self._config, self._training = config, config.training
        self._windows, self._held_out = windows, held_out
        self._positions = positions_of(teacher, config.training.length)
        training = self._training
        self._head = HeadLoss(
            kl=training.kl,
            lm=training.lm,
            kind=find_divergence(training.divergence),
            beta=training.beta,
            temperature=training.temperature,
        )
        self.before = self._measure()
        self._optimizer = torch.optim.AdamW(self._trained, lr=training.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._data = Position(len(windows), batch=training.batch, seed=config.seed)
        model, optimizer = self._parallel.begin(self.child, self._optimizer)
        self._guard = guard(
            state_folder(config.out),
            run=run,
            every=training.save_every,
            model=model,
            optimizer=optimizer,
            data=self._data,
            alone=alone,
            cut=self._parallel.cut,
        )

    def close(self) -> None:
        """The result is written, and nothing is left to be restored."""
        self._guard.close()

    def run(self, steps: int, progress: Progress) -> Distilled:
        training, curve = self._training, [(0, self.before)]
        tokens_a_step = training.length * training.batch
        seen = self._guard.step * tokens_a_step // training.quality_every
        if self._guard.step:
            progress(f"going on from step {self._guard.step} of {steps}")
        while self._guard.step < steps:
            for numbers in self._data.follow(self._data.batches):
                loss = self._step(numbers, steps)
                self._guard.end_step()
                done = self._guard.step
                progress(f"step {done} of {steps}: loss {loss:.4f}")
                looks = done * tokens_a_step // training.quality_every
                if looks > seen or done == steps:
                    seen = looks
                    curve.append((done * tokens_a_step, self._measure()))
                    progress(f"after {done * tokens_a_step:,} tokens: {curve[-1][1]}")
                if done >= steps:
                    break
        after = curve[-1][1] if len(curve) > 1 else self._measure()
        return Distilled(steps=steps, tokens=steps * tokens_a_step, before=self.before, after=after, curve=tuple(curve))

    def _measure(self) -> Quality:
        found = measure(self.child, self.teacher, self._held_out)
        self._parallel.settle(self.child)
        return found

    def _step(self, numbers: list[int], steps: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._training, self._guard.step, steps)
        loss = self._parallel.loss(lambda: self._any_loss(numbers))
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss.item()} at step {self._guard.step + 1}; the state before it is kept. Lower lr "
                f"(it is {self._training.lr})"
            )
        self._parallel.step(loss * self._data.weight, self._optimizer, self._trained)
        return loss.item()

    def _any_loss(self, numbers: list[int]) -> torch.Tensor:
        return self._loss(self._windows[numbers]) if self._store is None else self._stored_loss(numbers, self._store)

    def _stored_loss(self, numbers: list[int], store: LogitStore) -> torch.Tensor:
        states = states_of(self.child, self._windows[numbers], self._positions)
        return self._training.kl * stored_kl(
            self.child.model.norm(states[-1]), self.child.lm_head.weight, store.rows(numbers)
        )

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            targets = states_of(self.teacher, ids, self._positions)
            final = self.teacher.model.norm(targets[-1])
        states = states_of(self.child, ids, self._positions)
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        loss, _, _ = head_loss(
            self.child.model.norm(states[-1]).flatten(0, 1),
            self.child.lm_head.weight,
            final.flatten(0, 1),
            self.teacher.lm_head.weight,
            labels.flatten(),
            self._head,
        )
        if self._training.cosine:
            pairs = zip(states[1:], targets[1:], strict=True)
            distances = torch.stack([cosine_distance(one, other).mean() for one, other in pairs])
            loss = loss + self._training.cosine * distances.mean()
        return loss if self._auxiliary is None else loss + self._auxiliary()


class Schedule(Protocol):
    """How a learning rate rises and falls."""

    @property
    def lr(self) -> float: ...

    @property
    def warmup(self) -> float: ...


def learning_rate(training: Schedule, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth, or with `schedule` "linear" a line to zero; `step` is from 0."""
    rising = max(round(training.warmup * steps), 1)
    if step < rising:
        return training.lr * (step + 1) / rising
    share = (step - rising) / max(steps - rising, 1)
    if getattr(training, "schedule", "cosine") == "linear":
        return training.lr * (1 - share)
    return training.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
