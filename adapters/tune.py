# SPDX-License-Identifier: Apache-2.0
"""`refound tune`: a method, trained on a base over data, into a directory of its own.

The state of a run holds what is trained and nothing of the base; killed, the same command goes on from the last state
and ends with the bits of an undisturbed run.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distill.config import digest
from ..distill.exclusive import only_one
from ..distill.follow import Course, Follower, TrainedPart
from ..distill.loop import eos_of
from ..distill.resume import state_folder
from ..distill.texts import open_tokenizer, pack
from ..export.atomic import require_absent
from .base import Base, load_model, open_base
from .data import Sample, batches, collate, read_records, split, window_sample
from .errors import AdapterError, DataError, NotServableError
from .losses import Hook, fait_hook, static_weights, token_loss
from .method import Attached
from .peft_methods import set_dropout
from .recipe import TuneRecipe
from .transforms import Maker
from .write import Tuned, finished, write_tuned

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TunePlan:
    """What a recipe will do."""

    base: str
    kind: str
    trained: int
    """Parameters."""
    share: float
    """Of the base's."""
    samples: int
    held_out: int
    truncated: int
    """Of both, those whose end is cut off."""
    steps: int
    tokens: int
    """Of one epoch, filling left out."""
    state_bytes: int
    """Of a snapshot: parameters and the two moments of Adam."""
    served: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        cut = f"\n{self.truncated} of them are longer than data.length, and cut" if self.truncated else ""
        return (
            f"{self.kind} on {self.base}: {self.trained:,} parameters trained, {self.share:.2%} of the base's\n"
            f"{self.samples} samples ({self.tokens:,} tokens), {self.held_out} held out, {self.steps} steps{cut}\n"
            f"{self.state_bytes:,} bytes in a snapshot\nserved: {self.served}"
        )


SERVED = {
    "lora": "beside the base, as a PEFT directory and a GGUF adapter",
    "rslora": "beside the base, as a PEFT directory and a GGUF adapter",
    "dora": "merged into the base; nearest beside it: the LoRA in lora/",
    "pruned-lora": "a smaller base in base/ and a LoRA for it in lora/; merged and sliced as a model",
    "vera": "merged into the base; beside it exactly as the LoRA in lora/",
}


def run_tune(recipe: TuneRecipe, progress: Progress, *, overwrite: bool = False) -> Tuned | None:
    """`tune` on all ranks of this process's torchrun; None on ranks other than the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return tune(recipe, progress, overwrite=overwrite)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    try:
        found = tune(recipe, progress if first else lambda _: None, overwrite=overwrite)
        return found if first else None
    finally:
        dist.destroy_process_group()


def plan_tune(recipe: TuneRecipe) -> TunePlan:
    """Everything but the training: the base is loaded, the data is read, and what is wrong with either is told."""
    return _Run(recipe).plan()


def tune(recipe: TuneRecipe, progress: Progress, *, overwrite: bool = False) -> Tuned:
    """Train and write `recipe.out`; what is there already of the same run is returned.

    Raises:
        AdapterError, DistillError, ExportError: for a base, data or a state that cannot be used; DivergedError if the
            loss is no number, with the last good state kept.
    """
    out = Path(recipe.out)
    run = _Run(recipe)
    if (done := finished(out, run.digest)) is not None:
        progress(f"{out} is the result of this very run already")
        return done
    require_absent(out, overwrite=overwrite)
    if dist.is_initialized():
        return run.train(out, progress, overwrite=overwrite)
    with only_one(state_folder(out), "tuning", "--set out=…", taken=_Taken, unwritable=_Unwritable):
        return run.train(out, progress, overwrite=overwrite)


class _Taken(AdapterError):
    exit_code = 3


class _Unwritable(AdapterError, OSError):
    pass


class _Run:
    def __init__(self, recipe: TuneRecipe) -> None:
        self._recipe = recipe
        self._base = open_base(recipe.base)
        self._eos = _eos(self._base)
        self._samples, self._held_out = make_samples(recipe, self._base, self._eos)
        told = {key: value for key, value in recipe.to_json().items() if key not in ("out", "engines")}
        data = [[one.content() for one in part] for part in (self._samples, self._held_out)]
        self.digest = digest([told, self._base.fingerprint(), data])
        model = load_model(self._base, dtype=getattr(torch, recipe.train.dtype))
        self._size = sum(parameter.numel() for parameter in model.parameters())
        self._attached: Attached = recipe.method.attach(model, seed=recipe.seed)

    @property
    def _steps(self) -> int:
        train = self._recipe.train
        return train.steps or -(-len(self._samples) // train.batch) * train.epochs

    @property
    def _trained(self) -> int:
        return sum(parameter.numel() for parameter in self._attached.trained().values())

    @property
    def _served(self) -> str:
        """How; or why not, which nobody should learn after the training."""
        if told := SERVED.get(self._recipe.kind):
            return told
        try:
            return f"{self._attached.recast().how} into the base, as a model"
        except NotServableError as error:
            return f"not: {error}"

    def plan(self) -> TunePlan:
        return TunePlan(
            base=str(self._base.path),
            kind=self._recipe.kind,
            trained=self._trained,
            share=self._trained / self._size,
            samples=len(self._samples),
            held_out=len(self._held_out),
            truncated=sum(sample.truncated for sample in (*self._samples, *self._held_out)),
            steps=self._steps,
            tokens=sum(len(sample.ids) for sample in self._samples),
            state_bytes=12 * self._trained,
            served=self._served,
        )

    def train(self, out: Path, progress: Progress, *, overwrite: bool) -> Tuned:
        train = self._recipe.train
        course = Course(
            steps=self._steps,
            batch=train.batch,
            lr=train.lr,
            warmup=train.warmup,
            schedule="linear" if train.schedule == "linear" else "cosine",
            weight_decay=train.weight_decay,
            betas=(0.9, 0.999),
            save_every=train.save_every,
            seed=self._recipe.seed,
        )
        before = self._measure()
        part = TrainedPart(self._attached.trained(), self._attached.changing())
        samples = len(self._samples)
        follower = Follower(part, self._loss, course, samples=samples, out=out, run=self.digest, adds_up=True)
        if follower.step:
            progress(f"going on from step {follower.step} of {course.steps}")
        set_dropout(self._attached.model, True)
        for step, loss in follower.run():
            self._attached.after_step(step, course.steps)
            progress(f"step {step} of {course.steps}: loss {loss:.4f}")
        set_dropout(self._attached.model, False)
        after = self._measure()
        tuned = Tuned(
            out=str(out),
            kind=self._recipe.kind,
            steps=course.steps,
            trained=self._trained,
            before=before,
            after=after,
            served=self._served,
        )
        if not dist.is_initialized() or dist.get_rank() == 0:
            tuned = write_tuned(self._recipe, self._base, self._attached, tuned, run=self.digest, overwrite=overwrite)
        if dist.is_initialized():
            dist.barrier()  # what a rank has not written yet may still be lost, and is restored
        follower.close()
        return tuned

    def _hooks(self) -> list[Hook]:
        hooks: list[Hook] = []
        if self._recipe.transform.self_evaluation.enabled:
            hooks.append(static_weights)
        if self._recipe.loss.fait.enabled:
            hooks.append(fait_hook(self._recipe.loss.fait))
        return hooks

    def _loss(self, numbers: list[int]) -> torch.Tensor:
        batch = collate([self._samples[number] for number in numbers], fill=self._eos)
        normalize = self._recipe.loss.fait.normalize
        return token_loss(self._attached.model, batch, self._hooks(), normalize=normalize, together=True)

    def _measure(self) -> float:
        """The mean loss of a learned token of the held-out samples."""
        total = count = 0.0
        with torch.no_grad():
            for batch in batches(self._held_out, 8, fill=self._eos):
                tokens = int(batch.learn[:, 1:].sum())
                total += token_loss(self._attached.model, batch).item() * tokens
                count += tokens
        return total / count


def make_samples(recipe: TuneRecipe, base: Base, eos: int) -> tuple[list[Sample], list[Sample]]:
    """(trained on, held out): the recipe's data in the base's tokens, in the order of its files.

    Records are held out with all samples that are made of them: a transform of one that is learned tells its answer.

    Raises:
        DataError, TextError: see `data` and `distill.texts`.
    """
    data, tokenizer = recipe.data, open_tokenizer(base.path)
    if data.paired:
        fait = recipe.loss.fait.enabled
        needs = (*recipe.transform.needs, *(["wrong"] if fait else []))
        maker = Maker(tokenizer, recipe.transform, eos=eos, length=data.length, template=data.template, pairs=fait)
        made = maker.by_record([one for source in data.sources for one in read_records(Path(source), needs=needs)])
    else:
        windows = pack(data.sources, "train", tokenizer=tokenizer, eos=eos, count=data.windows, length=data.length)
        made = [[window_sample(window.tolist())] for window in windows]
    learned, held_out = split(len(made), data.held_out)
    if not learned or not held_out:
        raise DataError(f"{len(made)} samples are too few: at least one to train on and one held out")
    return [one for n in learned for one in made[n]], [one for n in held_out for one in made[n]]


def _eos(base: Base) -> int:
    if base.source is not None:
        return eos_of(base.source)
    eos = json.loads((base.path / "config.json").read_text()).get("eos_token_id")
    if not isinstance(eos, int):
        raise DataError(f"{base.path}/config.json names no eos_token_id, which samples end with")
    return eos
