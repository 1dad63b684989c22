# SPDX-License-Identifier: Apache-2.0
"""Exits from text to a directory: train, calibrate, choose the exit to draft from, time it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from ...distill.errors import DamagedFileError
from ...distill.models import DeciLMForCausalLM
from ...distill.proven import read_proven, write_proven
from ...export.directory import ModelDirectory
from .cached import CachedModel
from .calibrate import Threshold, choose_threshold, grid
from .decode_self import SelfDraft
from .errors import HeadsMismatchError
from .exits import ExitLoss, ExitPart, Seen, exit_layers, leaving, look, stopping
from .job import Job, Outcome, predicted
from .measure import at, pass_seconds, seconds_of
from .record import read_record, save_heads
from .runs import expected_of_chain, run_lengths
from .settings import ExitSettings, HeadsConfig
from .train import train

EXITS, GENERATION = "exits.safetensors", "generation_config.json"
_MOST = 8
"""Guesses in a row."""


def run_exit(job: Job) -> Outcome:
    """Raises what `train.train` and `record.save_heads` do."""
    settings = cast(ExitSettings, job.config.settings)
    layers = exit_layers(settings, len(job.source.decoder.layers))
    model = job.model()
    windows, held_out = job.windows(model, "train"), job.windows(model, "test")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.config.seed)
        part = ExitPart(model, layers, settings)
    losses, keeper = train(
        part,
        ExitLoss(part=part, model=model, settings=settings),
        windows,
        settings,
        folder=job.folder,
        run=job.run,
        seed=job.config.seed,
        progress=job.progress,
    )
    part.requires_grad_(False)
    made: list[Outcome] = []
    job.finish(lambda: made.append(_saved(job, model, part, held_out, losses)), keeper.close)
    return made[0] if made else Outcome(path=job.config.out, record={})


def _saved(job: Job, model: DeciLMForCausalLM, part: ExitPart, held_out: torch.Tensor, losses: list[float]) -> Outcome:
    settings = cast(ExitSettings, job.config.settings)
    first = settings.prompt - 1 if settings.own else 0
    job.progress("calibrating exits on held-out text")
    seen = look(part, model, held_out)
    thresholds = calibrated(seen, settings, first)
    cached = CachedModel(model)
    layer, guesses, expected = choose_exit(cached, part, seen, first)
    exit_, gate = part.exits[part.layers.index(layer)], part.gates[part.layers.index(layer)]
    drafters = {
        "exit": SelfDraft(layer, length=guesses, head=exit_),
        "exit, gated": SelfDraft(layer, length=_MOST, head=exit_, gate=cast(Any, gate), threshold=0.5),
    }
    measured = job.timed(cached, held_out, drafters)
    rows = zip(part.layers, seen.right, seen.bare, strict=True)
    agreement = {
        str(after): {"trained": right[:, first:].double().mean().item(), "bare": bare[:, first:].double().mean().item()}
        for after, right, bare in rows
    }
    record = job.record(
        predicted={"exit": expected},
        measured=measured,
        losses=losses,
        layers=list(part.layers),
        exit_layer=layer,
        guesses=guesses,
        agreement=agreement,
        thresholds={name: _json(one) for name, one in thresholds.items()},
        told=_told(settings, agreement, thresholds, layer, guesses),
    )

    def write(folder: Path) -> None:
        write_proven(folder / EXITS, part.state_dict(), {"layers": list(part.layers), "settings": asdict(settings)})
        generation = {"assistant_early_exit": layer, "num_assistant_tokens": guesses}
        own = job.source.path / GENERATION
        told = json.loads(own.read_text()) if own.is_file() else {}
        (folder / GENERATION).write_text(json.dumps(told | generation, indent=2) + "\n")

    save_heads(job.config.out, write, record, overwrite=job.config.overwrite)
    return Outcome(path=job.config.out, record=record)


def calibrated(seen: Seen, settings: ExitSettings, first: int) -> dict[str, Threshold]:
    """`leave`: of all gates together; `stop`: where there is real text to see uses by."""
    bound = {"limit": settings.risk, "confidence": settings.confidence, "values": grid()}
    found = {"leave": choose_threshold(leaving(seen, first), **bound)}
    if not settings.own:
        found["stop"] = choose_threshold(stopping(seen, settings.useful, first), **bound)
    return found


def choose_exit(model: CachedModel, part: ExitPart, seen: Seen, first: int) -> tuple[int, int, dict[str, float]]:
    """(layer, guesses in a row) of the best predicted speed here, and what is predicted."""
    costs = pass_seconds(model)
    found = []
    for (layer, exit_, _), right in zip(part.each(), seen.right, strict=True):
        one = _guess_seconds(model, layer, exit_)
        share = layer / len(model.layers)
        for guesses in range(1, _MOST + 1):
            expected = 1 + expected_of_chain(run_lengths(right[:, first:], guesses))
            # every node passes the first layers alone, and the others together
            took = guesses * one + share * costs[1] + (1 - share) * at(costs, guesses + 1)
            found.append((layer, guesses, predicted(expected, took, costs[1])))
    return max(found, key=lambda one: one[2]["speedup"])


def _guess_seconds(model: CachedModel, layer: int, exit_: Any) -> float:
    """Of one guess: the layers below the exit, and what makes it a token."""

    def guess() -> None:
        places = model.grow([-1])
        model.logits(exit_(model.through(model.embed([0]), places, 0, layer))).argmax()
        model.keep([])

    return seconds_of(guess)


def _json(threshold: Threshold) -> dict[str, Any]:
    return {"value": None if threshold.never else threshold.value, "risk": threshold.risk, "acts": threshold.acts}


def _told(
    settings: ExitSettings,
    agreement: Mapping[str, Mapping[str, float]],
    thresholds: Mapping[str, Threshold],
    layer: int,
    guesses: int,
) -> dict[str, str]:
    found = {
        f"after {after} layers": f"the model's token at {one['trained']:.1%} of places ({one['bare']:.1%} untrained)"
        for after, one in agreement.items()
    }
    bound = f"risk at most {settings.risk:g} with confidence {settings.confidence:g}"
    for name, one in thresholds.items():
        found[name] = (
            f"never: no threshold has a {bound}"
            if one.never
            else f"from a score of {one.value:.2f}: {one.acts:.1%} of tokens, {one.risk:.2%} by mistake; {bound}"
        )
    return found | {"drafts": f"{guesses} tokens after {layer} layers"}


def open_exits(path: Path, base: ModelDirectory, model: DeciLMForCausalLM) -> tuple[ExitPart, dict[str, float]]:
    """The exits in `path`, which were trained on `base`, and the thresholds (infinity: never).

    Raises:
        HeadsUsageError, HeadsMismatchError: see `record.read_record`.
    """
    record = read_record(path, "exit", base.fingerprint())["heads"]
    try:
        tensors, facts = read_proven(path / EXITS)
    except (DamagedFileError, OSError) as error:
        raise HeadsMismatchError(f"{error}. Copy it again, or train it again") from error
    told = facts["settings"] | {"layers": tuple(facts["settings"]["layers"])}
    part = ExitPart(model, facts["layers"], ExitSettings(**told))
    part.load_state_dict(tensors)
    values = {name: one["value"] for name, one in record["thresholds"].items()}
    return part.requires_grad_(False), {k: math.inf if v is None else v for k, v in values.items()}


def planned_parameters(config: HeadsConfig, source: ModelDirectory) -> int:
    settings = cast(ExitSettings, config.settings)
    hidden, width, inside = source.decoder.hidden_size, settings.width, settings.gate_width
    layers = len(exit_layers(settings, len(source.decoder.layers)))
    exits = hidden + (width * (2 * hidden + 1) if width else 0)
    gate = {
        "mlp": (hidden + 1) * inside + inside + 1,
        "gru": 3 * inside * (hidden + inside + 2) + inside + 1,
        "ssm": 2 * inside * (hidden + 1) + inside * (inside + 1) + 16 * (inside + 1) + 8 * inside + inside + 1,
    }[settings.gate]
    return layers * exits + (layers + 1) * gate
