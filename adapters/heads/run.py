# SPDX-License-Identifier: Apache-2.0
"""One training of heads, a draft or exits: planned, or done."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...distill.models import open_blocks
from ...distill.ranks import on_every_rank
from ...export.atomic import size_text
from . import draft, exit_run, medusa_run
from .job import Job, Outcome
from .own_text import Progress
from .settings import HeadsConfig, Kind, MedusaSettings

_RUN: dict[Kind, Callable[[Job], Outcome]] = {
    "medusa": medusa_run.run_medusa,
    "draft": draft.run_draft,
    "exit": exit_run.run_exit,
}
_PARAMETERS = {
    "medusa": medusa_run.planned_parameters,
    "draft": draft.planned_parameters,
    "exit": exit_run.planned_parameters,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training would do."""

    kind: Kind
    steps: int
    tokens: int
    own_tokens: int
    """That the model would say itself first."""
    trained: int
    """Parameters."""
    state_bytes: int
    """Of a snapshot: what is trained, and two moments of it."""
    out_bytes: int
    """About."""

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **self.__dict__}

    def to_text(self) -> str:
        return "\n".join(
            [
                f"{self.kind}: {self.trained:,} parameters are trained, {self.steps} steps over {self.tokens:,} tokens",
                f"the model says {self.own_tokens:,} tokens itself first"
                if self.own_tokens
                else "on the text as it is",
                f"a snapshot holds {size_text(self.state_bytes)}; the result is about {size_text(self.out_bytes)}",
            ]
        )


def plan_heads(config: HeadsConfig) -> Plan:
    """Raises ExportError or HeadsUsageError if the model is none, or has not the layers that are asked for."""
    source = open_blocks(config.model)
    settings = config.settings
    trained = _PARAMETERS[config.kind](config, source)
    windows = settings.steps * settings.batch
    own = (windows + settings.held_out) * (settings.length - settings.prompt) if settings.own else 0
    output = source.decoder.vocab_size * source.decoder.hidden_size
    written = trained * (4 if isinstance(settings, MedusaSettings) and settings.joint else 2)
    if config.kind == "draft":
        written = 4 * (trained + output * (1 if source.decoder.tied else 2))
    elif config.kind == "medusa":
        written += 2 * output
    return Plan(
        kind=config.kind,
        steps=settings.steps,
        tokens=windows * settings.length,
        own_tokens=own,
        trained=trained,
        state_bytes=12 * trained,
        out_bytes=written,
    )


def run_heads(config: HeadsConfig, progress: Progress) -> Outcome | None:
    """Train on all ranks of this process's torchrun; None on ranks other than the first.

    What is there already of the same run is returned.

    Raises:
        ExportError, DistillError: for a model, a text, a setting or a state that cannot be used.
    """
    return on_every_rank(lambda told: _run(config, told), progress)


def _run(config: HeadsConfig, progress: Progress) -> Outcome:
    job = Job(config, progress)
    if job.done is not None:
        job.clear()
        return job.done
    with job.alone():
        return _RUN[config.kind](job)
