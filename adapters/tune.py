# SPDX-License-Identifier: Apache-2.0
"""`refound tune`: a method, trained on a base over data, into a directory of its own.

The state of a run holds what is trained and nothing of the base; killed, the same command goes on from the last state
and ends with the bits of an undisturbed run.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distill.config import digest
from ..distill.errors import DamagedFileError
from ..distill.exclusive import only_one
from ..distill.follow import Course, Follower, TrainedPart
from ..distill.loop import eos_of
from ..distill.proven import read_proven
from ..distill.ranks import on_every_rank, world_size
from ..distill.resume import STATE, state_folder
from ..distill.texts import open_tokenizer, pack
from ..export.atomic import require_absent
from .base import Base, load_model, open_base
from .data import Sample, batches, collate, read_records, split, window_sample
from .errors import AdapterError, DataError, NotServableError
from .losses import Hook, fait_hook, static_weights, token_loss
from .method import Attached
from .peft_methods import set_dropout
from .places import keep_inputs
from .recipe import TuneRecipe
from .serving import check_length, how_served, refuse_base, refuse_engines
from .transforms import Maker
from .write import Tuned, finished, state_of, write_tuned

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


def run_tune(recipe: TuneRecipe, progress: Progress, *, overwrite: bool = False) -> Tuned | None:
    """`tune` on all ranks of this process's torchrun; None on ranks other than the first."""
    return on_every_rank(lambda told: tune(recipe, told, overwrite=overwrite), progress)


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
    with _held(out):
        if (done := finished(out, run.digest)) is not None:
            progress(f"{out} is the result of this very run already")
            return done
        require_absent(out, overwrite=overwrite)
        return run.train(out, progress, overwrite=overwrite)


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The first rank holds what the state lies in, and clears away what is left of a run whose result is there."""
    folder, together = state_folder(out), dist.is_initialized() and dist.get_world_size() > 1
    problem: AdapterError | None = None
    with ExitStack() as held:
        if first := not together or dist.get_rank() == 0:
            try:
                held.enter_context(only_one(folder, "tuning", "--set out=…", taken=_Taken, unwritable=_Unwritable))
                _clear_left(out, folder)
            except (_Taken, _Unwritable) as error:
                problem = error
        if together:
            failed = torch.tensor(int(problem is not None))
            dist.broadcast(failed, 0)
            if failed and problem is None:
                problem = _Taken(f"the first rank could not take {folder}")
        if problem is not None:
            raise problem
        yield
        if first and not (folder / STATE).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _clear_left(out: Path, folder: Path) -> None:
    """A run that was killed once it had written its result leaves a state that no other run could use."""
    if (state := state_of(out)) is None:
        return
    with suppress(DamagedFileError, OSError, KeyError):
        if read_proven(folder / STATE)[1]["run"] == state:
            (folder / STATE).unlink()


class _Taken(AdapterError):
    exit_code = 3


class _Unwritable(AdapterError, OSError):
    pass


class _Run:
    def __init__(self, recipe: TuneRecipe) -> None:
        self._recipe = recipe
        self._base = open_base(recipe.base)
        sources = {f"data.sources[{n}]": Path(one) for n, one in enumerate(recipe.data.sources) if Path(one).is_file()}
        keep_inputs(Path(recipe.out), {"the base": self._base.path, **sources})
        refuse_base(recipe.kind, self._base)
        check_length(recipe, self._base)
        self._eos = _eos(self._base)
        self._samples, self._held_out = make_samples(recipe, self._base, self._eos)
        told = {key: value for key, value in recipe.to_json().items() if key not in ("out", "engines")}
        del told["train"]["parallel"]  # which changes no bit of the result
        data = [[one.content() for one in part] for part in (self._samples, self._held_out)]
        self.digest = digest([told, self._base.fingerprint(), data])
        model = self._load()
        self._size = sum(parameter.numel() for parameter in model.parameters())
        self._attached: Attached = recipe.method.attach(model, seed=recipe.seed)
        refuse_engines(recipe, self._base, self._attached)

    def _load(self) -> torch.nn.Module:
        return load_model(self._base, dtype=getattr(torch, self._recipe.train.dtype))

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
        try:
            return how_served(self._recipe.kind, self._base, self._attached)
        except NotServableError as error:
            return f"not: {error}"

    @property
    def _course(self) -> Course:
        train = self._recipe.train
        return Course(
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
        course, served = self._course, self._served
        sharded = self._recipe.train.parallel == "fsdp2" and world_size() > 1
        if sharded:
            from .sharded_base import shard_base

            shard_base(self._attached)
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
            served=served,
        )
        if not dist.is_initialized() or dist.get_rank() == 0:
            state = digest([self.digest, course])  # as Follower calls it
            tuned = write_tuned(
                self._recipe,
                self._base,
                self._whole() if sharded else self._attached,
                tuned,
                run=self.digest,
                state=state,
                overwrite=overwrite,
            )
        if dist.is_initialized():
            dist.barrier()  # what a rank has not written yet may still be lost, and is restored
        follower.close()
        return tuned

    def _whole(self) -> Attached:
        """What was trained, on a base that is not in shards: to be written, and read for it."""
        from .sharded_base import copy_trained

        copy_trained(self._attached, fresh := self._recipe.method.attach(self._load(), seed=self._recipe.seed))
        return fresh

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
