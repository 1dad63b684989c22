# SPDX-License-Identifier: Apache-2.0
"""`refound tune`: a method, trained on a base over data, into a directory of its own.

The state of a run holds what is trained and nothing of the base; killed, the same command goes on from the last state
and ends with the bits of an undisturbed run.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from ..export.atomic import fresh_directory, require_absent
from .base import Base, load_model, open_base, write_recast
from .data import Sample, batches, collate, read_records, split, window_sample
from .errors import AdapterError, DataError, NotServableError
from .losses import Hook, fait_hook, static_weights, token_loss
from .method import Attached, record_of
from .peft_methods import PeftAttached, write_lora
from .prune import PrunedAttached
from .ranks import nearest_lora, vera_as_lora
from .recipe import TuneRecipe
from .saved import RECORD, write_record
from .transforms import Maker

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
    steps: int
    tokens: int
    """Of one epoch, filling left out."""
    state_bytes: int
    """Of a snapshot: parameters and the two moments of Adam."""
    served: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        return (
            f"{self.kind} on {self.base}: {self.trained:,} parameters trained, {self.share:.2%} of the base's\n"
            f"{self.samples} samples ({self.tokens:,} tokens), {self.held_out} held out, {self.steps} steps\n"
            f"{self.state_bytes:,} bytes in a snapshot\nserved: {self.served}"
        )


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a run did. Losses are means over the learned tokens of held-out samples, without weights."""

    out: str
    kind: str
    steps: int
    trained: int
    before: float
    after: float
    served: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes)}

    def to_text(self) -> str:
        lines = [
            f"{self.kind}: {self.trained:,} parameters, {self.steps} steps",
            f"held-out loss {self.before:.4f} before, {self.after:.4f} after",
            f"served: {self.served}",
        ]
        return "\n".join([*lines, *self.notes, self.out])


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
    if (done := _finished(out, run.digest)) is not None:
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
        samples = make_samples(recipe, self._base, self._eos)
        learned, held_out = split(len(samples), recipe.data.held_out)
        if not learned or not held_out:
            raise DataError(f"{len(samples)} samples are too few: at least one to train on and one held out")
        self._samples, self._held_out = [samples[n] for n in learned], [samples[n] for n in held_out]
        told = {key: value for key, value in recipe.to_json().items() if key not in ("out", "engines")}
        self.digest = digest([told, self._base.fingerprint(), [one.ids for one in samples]])
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
        follower = Follower(part, self._loss, course, samples=len(self._samples), out=out, run=self.digest)
        if follower.step:
            progress(f"going on from step {follower.step} of {course.steps}")
        self._set_dropout(True)
        for step, loss in follower.run():
            self._attached.after_step(step, course.steps)
            progress(f"step {step} of {course.steps}: loss {loss:.4f}")
        self._set_dropout(False)
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
            tuned = self._write(out, tuned, overwrite=overwrite)
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
        return token_loss(self._attached.model, batch, self._hooks(), normalize=self._recipe.loss.fait.normalize)

    def _measure(self) -> float:
        """The mean loss of a learned token of the held-out samples."""
        total = count = 0.0
        with torch.no_grad():
            for batch in batches(self._held_out, 8, fill=self._eos):
                tokens = int(batch.learn[:, 1:].sum())
                total += token_loss(self._attached.model, batch).item() * tokens
                count += tokens
        return total / count

    def _set_dropout(self, on: bool) -> None:
        """The base's own dropout stays off: it is not what is trained."""
        for name, module in self._attached.model.named_modules():
            if isinstance(module, torch.nn.Dropout) and ("lora_dropout" in name or "vera_dropout" in name):
                module.train(on)

    def _write_nearest(self, folder: Path, base: dict[str, str]) -> tuple[str, ...]:
        """The LoRA that servers take beside the base, where this method is none."""
        attached, kind = self._attached, self._recipe.kind
        if isinstance(attached, PrunedAttached):
            return self._write_sliced(folder, attached)
        if not isinstance(attached, PeftAttached) or kind not in ("dora", "vera"):
            return ()
        if kind == "vera":
            pairs, told = vera_as_lora(attached), "exactly this VeRA"
        else:
            state = dict(attached.model.get_base_model().named_parameters())
            before = {name: state[name.replace(".weight", ".base_layer.weight")] for name in attached.recast().weights}
            nearest = nearest_lora(attached.recast(), before, self._recipe.method.rank)  # type: ignore[attr-defined]
            pairs, told = nearest.pairs, str(nearest)
        (folder / "lora").mkdir()
        write_lora(folder / "lora", pairs, base=base["path"])
        write_record(folder / "lora", {"base": base, "nearest": told})
        return (f"lora/: {told}",)

    def _write_sliced(self, folder: Path, attached: PrunedAttached) -> tuple[str, ...]:
        """The smaller base and its LoRA; the base alone computes nothing that was trained."""
        out = Path(self._recipe.out).absolute()
        of = {"path": str(self._base.path), "sha256": self._base.fingerprint()}
        write_recast(self._base, attached.sliced_base(), folder / "base", record={"sliced": of})
        base = {"path": str(out / "base"), "sha256": open_base(folder / "base").fingerprint()}
        (folder / "lora").mkdir()
        write_lora(folder / "lora", attached.sliced_pairs(), base=base["path"])
        write_record(folder / "lora", {"base": base})
        return (f"serve {out / 'lora'} on {out / 'base'}, or export this directory as one model",)

    def _write(self, out: Path, tuned: Tuned, *, overwrite: bool) -> Tuned:
        recipe, base = self._recipe, {"path": str(self._base.path), "sha256": self._base.fingerprint()}
        with fresh_directory(out, overwrite=overwrite) as folder:
            self._attached.save(folder)
            notes = self._write_nearest(folder, base)
            tuned = replace(tuned, notes=notes)
            (folder / "recipe.json").write_text(json.dumps(recipe.to_json(), indent=2) + "\n")
            write_record(
                folder,
                {
                    "base": base,
                    "method": record_of(recipe.method, recipe.kind),
                    "seed": recipe.seed,
                    "tuned": {"run": self.digest, **tuned.to_json()},
                },
            )
        return tuned


def make_samples(recipe: TuneRecipe, base: Base, eos: int) -> list[Sample]:
    """The recipe's data in the base's tokens, in the order of its files.

    Raises:
        DataError, TextError: see `data` and `distill.texts`.
    """
    data, tokenizer = recipe.data, open_tokenizer(base.path)
    if not data.paired:
        windows = pack(data.sources, "train", tokenizer=tokenizer, eos=eos, count=data.windows, length=data.length)
        return [window_sample(window.tolist()) for window in windows]
    fait = recipe.loss.fait.enabled
    needs = (*recipe.transform.needs, *(["wrong"] if fait else []))
    maker = Maker(tokenizer, recipe.transform, eos=eos, length=data.length, template=data.template, pairs=fait)
    found: list[Sample] = []
    for source in data.sources:
        found += maker.samples(read_records(Path(source), needs=needs))
    return found


def _eos(base: Base) -> int:
    if base.source is not None:
        return eos_of(base.source)
    eos = json.loads((base.path / "config.json").read_text()).get("eos_token_id")
    if not isinstance(eos, int):
        raise DataError(f"{base.path}/config.json names no eos_token_id, which samples end with")
    return eos


def _finished(out: Path, run: str) -> Tuned | None:
    try:
        told = json.loads((out / RECORD).read_text())["tuned"]
        if told.pop("run") != run:
            return None
        return Tuned(**told | {"notes": tuple(told["notes"]), "out": str(out)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
