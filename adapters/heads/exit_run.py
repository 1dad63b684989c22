# SPDX-License-Identifier: Apache-2.0
"""Exits from text to a directory: train, calibrate, choose the exit to draft from, time it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ...distill.errors import DamagedFileError
from ...distill.models import DeciLMForCausalLM
from ...distill.proven import read_proven, write_proven
from ...export.directory import ModelDirectory
from .cached import CachedModel
from .calibrate import Threshold, choose_threshold, grid
from .decode_self import ExitHead, SelfDraft
from .errors import HeadsMismatchError
from .exits import ExitLoss, ExitPart, Seen, evaluate, exit_layers, leaving, stopping
from .job import Job, Outcome, predicted
from .measure import interpolate, pass_seconds, seconds_of
from .record import read_record, save_heads
from .runs import expected_of_chain, run_lengths
from .settings import ExitSettings, HeadsConfig

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
    losses, keeper = job.train(
        part,
        ExitLoss(part=part, model=model, settings=settings),
        windows,
    )
    part.requires_grad_(False)
    made: list[Outcome] = []
    job.finish(lambda: made.append(_saved(job, model, part, held_out, losses)), keeper.close)
    return made[0] if made else Outcome(path=job.config.out, record={})


def _saved(job: Job, model: DeciLMForCausalLM, part: ExitPart, held_out: torch.Tensor, losses: list[float]) -> Outcome:
    settings = cast(ExitSettings, job.config.settings)
    first = settings.prompt - 1 if settings.own else 0
    job.progress("calibrating exits on held-out text")
    seen = evaluate(part, model, held_out)
    thresholds = calibrated(seen, settings, first)
    cached = CachedModel(model)
    trained, bare = _choices(cached, part, seen, settings.guesses, first)
    layer, exit_ = trained.layer, part.exits[part.layers.index(trained.layer)]
    gate = part.gates[part.layers.index(layer)]
    drafters = {
        "exit": SelfDraft(layer, length=trained.guesses, head=exit_),
        "exit, bare": SelfDraft(bare.layer, length=bare.guesses),
        "exit, gated": SelfDraft(layer, length=_MOST, head=exit_, gate=cast(Any, gate), threshold=0.5),
    }
    measured = job.timed(cached, held_out, drafters)
    rows = zip(part.layers, seen.right, seen.bare, strict=True)
    agreement = {
        str(after): {
            "trained": right[:, first:].double().mean().item(),
            "bare": plain[:, first:].double().mean().item(),
        }
        for after, right, plain in rows
    }
    record = job.record(
        predicted={"exit": trained.predicted, "exit, bare": bare.predicted},
        measured=measured,
        losses=losses,
        layers=list(part.layers),
        exit_layer=layer,
        guesses=trained.guesses,
        transformers={"exit_layer": bare.layer, "guesses": bare.guesses},
        agreement=agreement,
        thresholds={name: _json(one) for name, one in thresholds.items()},
        told=_told(settings, agreement, thresholds, trained, bare),
    )

    def write(folder: Path) -> None:
        write_proven(folder / EXITS, part.state_dict(), {"layers": list(part.layers), "settings": asdict(settings)})
        # transformers has no place for a trained exit: what is best with the model's own norm
        generation = {"assistant_early_exit": bare.layer, "num_assistant_tokens": bare.guesses}
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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An exit to draft from."""

    layer: int
    guesses: int
    """In a row."""
    predicted: dict[str, float]


def _choices(model: CachedModel, part: ExitPart, seen: Seen, guesses: int, first: int) -> tuple[Choice, Choice]:
    """(of the trained exits, of the model's own norm after the same layers)."""
    costs = pass_seconds(model)
    heads: tuple[Sequence[ExitHead], ...] = (list(part.exits), [model.norm] * len(part.layers))
    trained, bare = (
        choose_exit(
            {layer: found[:, first:] for layer, found in zip(part.layers, right, strict=True)},
            {layer: _guess_seconds(model, layer, head) for layer, head in zip(part.layers, each, strict=True)},
            costs,
            depth=len(model.layers),
            guesses=guesses,
        )
        for right, each in zip((seen.right, seen.bare), heads, strict=True)
    )
    return trained, bare


def choose_exit(
    right: Mapping[int, torch.Tensor],
    guess_s: Mapping[int, float],
    pass_s: Mapping[int, float],
    *,
    depth: int,
    guesses: int = 0,
) -> Choice:
    """The best predicted speed.

    right: after each layer, where its token is the model's, (windows, length). guess_s: seconds of a guess there.
    pass_s: of a pass over so many positions, through all `depth` layers. guesses: in a row; 0: what is best, up to 8.
    """
    found = []
    for layer, places in right.items():
        share = layer / depth
        for count in [guesses] if guesses else range(1, _MOST + 1):
            expected = 1 + expected_of_chain(run_lengths(places, count))
            # every node passes the first layers alone, and the others together
            took = count * guess_s[layer] + share * pass_s[1] + (1 - share) * interpolate(pass_s, count + 1)
            found.append(Choice(layer=layer, guesses=count, predicted=predicted(expected, took, pass_s[1])))
    return max(found, key=lambda one: one.predicted["speedup"])


def _guess_seconds(model: CachedModel, layer: int, exit_: ExitHead) -> float:
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
    trained: Choice,
    bare: Choice,
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
    return found | {
        "drafts": f"{trained.guesses} tokens after {trained.layer} layers",
        "drafts in transformers": f"{bare.guesses} tokens after {bare.layer} layers, by the model's own norm",
    }


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
