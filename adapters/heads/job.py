# SPDX-License-Identifier: Apache-2.0
"""What every kind of training shares: the model, the text, the place of the state, and who writes the result."""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...distill.config import digest
from ...distill.errors import DamagedFileError
from ...distill.exclusive import only_one
from ...distill.loop import eos_of
from ...distill.models import DeciLMForCausalLM, load, open_blocks
from ...distill.proven import read_proven
from ...distill.resume import STATE, Guard, state_folder
from ...distill.texts import Part
from ...export.atomic import require_absent
from ...export.directory import ModelDirectory
from ...export.errors import OutputExistsError, OutputSpaceError
from .cached import CachedModel
from .decode import Drafter
from .measure import Speed, by_turns
from .own_text import Progress, read_text, windows_of
from .record import heads_record
from .settings import HeadsConfig
from .train import Loss, train


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is at `path` now."""

    path: Path
    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "path": str(self.path), **self.record["heads"]}

    def __str__(self) -> str:
        told = self.record["heads"]
        lines = [str(self.path), f"trained on {told['tokens']:,} tokens in {told['steps']} steps"]
        for head, shares in enumerate(told.get("accuracy", [])):
            lines.append(f"head {head}: right first {shares[0]:.1%}, within {len(shares)} guesses {sum(shares):.1%}")
        if told.get("nodes"):
            lines.append(f"tree of {told['nodes']} guesses")
        lines += [f"{name}: {value}" for name, value in told.get("told", {}).items()]
        for name, speed in told["measured"].items():
            expected = told["predicted"].get(name)
            guess = f" (predicted {expected['tokens_a_pass']:.2f} and {expected['speedup']:.2f} x)" if expected else ""
            same = "the tokens of plain decoding" if speed["equal"] else "OTHER TOKENS than plain decoding"
            lines.append(
                f"{name}: {speed['tokens_a_pass']:.2f} tokens a pass, {speed['tokens_a_second']:.1f} tokens/s, "
                f"{speed['speedup']:.2f} x{guess}; {same}"
            )
        return "\n".join(lines)


class Job:
    """A training of one kind, for one model."""

    def __init__(self, config: HeadsConfig, progress: Progress) -> None:
        """Raises OutputExistsError if there is something else at `config.out`, before anything is done; TextError if
        there is too little text."""
        self.config, self.progress = config, progress
        self.source: ModelDirectory = open_blocks(config.model)
        self.fingerprint = self.source.fingerprint()
        start = getattr(config.settings, "start", "")
        self.start = open_blocks(Path(start)) if start else None
        """A model that the draft begins as."""
        begun = self.start.fingerprint() if self.start else ""
        self.text: dict[Part, torch.Tensor] = {part: read_text(config, self.source, part) for part in ("train", "test")}
        """What is read, not where: a file that was edited makes it another run."""
        text = [windows.tolist() for windows in self.text.values()]
        self.run = digest([config.kind, digest(config.settings), text, config.seed, self.fingerprint, begun])
        self.folder = state_folder(config.out)
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        self.done = self._finished()
        if self.done is None:
            require_absent(config.out, overwrite=config.overwrite)

    def _finished(self) -> Outcome | None:
        found = heads_record(self.config.out)
        if found is None or found["heads"].get("run") != self.run:
            return None
        self.progress(f"{self.config.out} is the result of this very run already")
        return Outcome(path=self.config.out, record=found)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """On the first rank, the only process that trains what goes to this place.

        Raises:
            OutputExistsError: another one does.
            OutputSpaceError: nothing can be written there.
        """
        if not self.first:
            return contextlib.nullcontext()
        return only_one(self.folder, "training", "--out", taken=OutputExistsError, unwritable=OutputSpaceError)

    def clear(self) -> None:
        """Of a run that was killed once its result was there: the state, which the next run would take for its own."""
        with contextlib.suppress(OSError, DamagedFileError):
            if self.first and read_proven(self.folder / STATE)[1]["run"] == self.run:
                with self.alone():
                    shutil.rmtree(self.folder, ignore_errors=True)

    def model(self) -> DeciLMForCausalLM:
        """In float32, frozen."""
        return load(self.source)

    def windows(self, model: DeciLMForCausalLM, part: Part) -> torch.Tensor:
        """(count, length): for training, or held out."""
        folder = self.config.texts or self.folder
        return windows_of(self.config, self.source, model, part, self.text[part], folder, self.progress)

    def train(
        self, part: torch.nn.Module, loss: Loss, windows: torch.Tensor, rates: Mapping[str, float] | None = None
    ) -> tuple[list[float], Guard]:
        """See `train.train`."""
        return train(
            part,
            loss,
            windows,
            self.config.settings,
            folder=self.folder,
            run=self.run,
            seed=self.config.seed,
            progress=self.progress,
            rates=rates,
        )

    def prompts(self, held_out: torch.Tensor) -> list[list[int]]:
        settings = self.config.settings
        return [row[: settings.prompt].tolist() for row in held_out[: settings.measured]]

    def timed(self, model: CachedModel, held_out: torch.Tensor, drafters: Mapping[str, Drafter]) -> dict[str, Speed]:
        """By turns with plain decoding; empty if nothing is to be timed."""
        prompts = self.prompts(held_out)
        if not prompts:
            return {}
        self.progress("decoding held-out prompts by turns")
        new, eos = self.config.settings.new_tokens, [eos_of(self.source)]
        return by_turns(model, prompts, drafters, new_tokens=new, eos=eos)

    def record(
        self, *, predicted: Mapping[str, Any], measured: Mapping[str, Speed], losses: list[float], **more: Any
    ) -> dict[str, Any]:
        """For refound.json."""
        settings = self.config.settings
        steps = settings.steps
        told = {
            "kind": self.config.kind,
            "run": self.run,
            "settings": asdict(settings),
            "sources": list(self.config.sources),
            "seed": self.config.seed,
            "steps": steps,
            "tokens": steps * settings.batch * settings.length,
            "last_loss": losses[-1] if losses else None,
            **more,
            "predicted": dict(predicted),
            "measured": {name: speed.to_json() for name, speed in measured.items()},
        }
        base = {"path": str(self.source.path.absolute()), "sha256": self.fingerprint}
        return {"base": base, "heads": told}

    def finish(self, save: Callable[[], None], close: Callable[[], Any]) -> None:
        """The first rank writes; the state goes once that is done."""
        if self.first:
            save()
        if dist.is_initialized():
            dist.barrier()
        close()
        if self.first:
            shutil.rmtree(self.folder, ignore_errors=True)


def predicted(tokens_a_pass: float, pass_s: float, plain_s: float) -> dict[str, float]:
    """pass_s: seconds of a round of guessing and checking; plain_s: of a pass that says one token."""
    return {"tokens_a_pass": tokens_a_pass, "speedup": tokens_a_pass * plain_s / pass_s if pass_s else 1.0}
