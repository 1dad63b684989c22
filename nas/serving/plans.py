# SPDX-License-Identifier: Apache-2.0
"""All plans for one trace: made on its first sequences, judged on the rest.

Each says its *predicted* figures, which are those on the part it was made on, and its *measured* ones on the held-out
part, each beside what engines do without a plan. `plan_files` keeps them.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..moe.trace import RoutingTrace, model_sha256, read_trace
from .affinity import affinity_of, hops_of, load_of
from .balance import balanced
from .batching import Batching, batches_of, shared_of
from .caching import hit_rates
from .coclusters import Coclusters, cocluster, locality_of
from .devices import Devices
from .errors import MismatchError, PlanError
from .heldout import hashes_of, unseen
from .placement import capacities, contiguous, place
from .prediction import Predictor, fit, hit_rate, marginal_guess

FORMAT = "refound-serving-plan-1"
KINDS = ("placement", "coclusters", "caching", "batching", "prediction")
BITS = "bits"
"""A further kind, which needs the model and text."""
PREDICTOR = "predictor.safetensors"
Progress = Callable[[str], None]
_REPLAYED = 4096
"""Tokens that cache plans are judged on: a replay for each policy takes about a second for a thousand."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How plans are made."""

    batching: Batching = field(default_factory=Batching)
    look_ahead: int = 64
    """Tokens whose ids are known beforehand, as a queue has them, and whose routing is guessed."""
    slots: int = 0
    """Experts of a layer in a cache; 0: what the devices' memory holds."""
    share: float = 0.5
    """Of the sequences, to plan on."""
    seed: int = 0
    unbalanced: bool = False
    """Place for fewest hops alone, however busy one device gets."""

    def __post_init__(self) -> None:
        if self.look_ahead < 0 or self.slots < 0 or not 0 < self.share < 1:
            raise PlanError("a look-ahead or slots below 0, or a share of sequences that is not between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large one expert and one hidden state are."""

    expert_bytes: float
    hidden_bytes: float
    parameters: float
    """Weights of one expert."""
    model_layers: int
    """All layers, dense ones too."""
    moe_layers: tuple[int, ...]
    """Which of them have experts."""
    source_bits: int = 16
    """Of a weight as it is stored."""
    family: str = ""
    """Of the model, as its config.json says; empty where no model was named."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is planned for: a trace of a model, the devices it will be served on, and how large things are."""

    trace: RoutingTrace
    sha256: str
    """Of the trace's file."""
    devices: Devices
    sizes: Sizes

    def split(self, share: float) -> tuple[RoutingTrace, RoutingTrace]:
        """(to plan on, to judge by).

        Raises:
            PlanError: if the trace has a single sequence.
        """
        at = self.split_at(share)
        return self.trace.part(0, at), self.trace.part(at, self.trace.sequences)

    def split_at(self, share: float) -> int:
        if self.trace.sequences < 2:
            raise PlanError(
                "the trace has one sequence, and a plan that is made on it cannot be judged on others. Make one of "
                "several windows of text: refound trace MODEL"
            )
        return min(max(round(share * self.trace.sequences), 1), self.trace.sequences - 1)


def open_subject(path: Path, devices: Devices, model: Path | None) -> Subject:
    """A trace for these devices. model: the directory it is of, which says how large experts are.

    Raises:
        TraceError: if the trace is damaged, or one of another model.
        PlanError: if neither a model nor the devices' [experts] table says how large experts are.
        CapacityError: if the devices cannot hold the experts.
        ExportError: if the model's directory is none.
    """
    trace = read_trace(path, model=model_sha256(model) if model else None)
    sizes = _sizes_of_model(model, trace) if model else _sizes_of_table(devices, trace)
    devices.require_room(trace.experts, trace.layers, sizes.expert_bytes)
    capacities(trace.experts, devices.count)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Subject(trace=trace, sha256=digest, devices=devices, sizes=sizes)


def _sizes_of_table(devices: Devices, trace: RoutingTrace) -> Sizes:
    if devices.experts is None:
        raise PlanError(
            "how large is an expert? Name the model with --model, or give the devices an [experts] table with "
            "expert_mb and hidden_kb"
        )
    size = devices.experts.expert_mb * 1e6
    return Sizes(
        expert_bytes=size,
        hidden_bytes=devices.experts.hidden_kb * 1e3,
        parameters=size / 2,
        model_layers=trace.layers,
        moe_layers=tuple(range(trace.layers)),
    )


def _sizes_of_model(model: Path, trace: RoutingTrace) -> Sizes:
    from ...export.directory import read_decoder

    decoder = read_decoder(model)
    layers = tuple(index for index, layer in enumerate(decoder.layers) if layer.ffn.kind == "moe")
    shapes = {(decoder.layers[index].ffn.experts, decoder.layers[index].ffn.width) for index in layers}
    if len(layers) != trace.layers or len(shapes) != 1 or next(iter(shapes))[0] != trace.experts:
        raise MismatchError(
            f"{model} has {len(layers)} layers of experts, and the trace is of {trace.layers} layers of {trace.experts}"
        )
    bytes_each = {"float32": 4, "float64": 8}.get(decoder.dtype, 2)
    parameters = 3 * decoder.hidden_size * next(iter(shapes))[1]
    return Sizes(
        expert_bytes=float(parameters * bytes_each),
        hidden_bytes=float(decoder.hidden_size * bytes_each),
        parameters=float(parameters),
        model_layers=len(decoder.layers),
        moe_layers=layers,
        source_bits=8 * bytes_each,
        family=decoder.family,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Plans:
    """Plans that belong to one model, and what was said of them."""

    placement: np.ndarray
    """A device for each expert, (layers, experts)."""
    coclusters: Coclusters
    predictor: Predictor
    batching: Batching
    look_ahead: int
    told: Mapping[str, Mapping[str, Any]]
    """By kind: what its file says."""
    slots: int = 0
    """Experts of a layer that a device keeps, as it was asked for; 0: what its memory holds."""
    expert_bytes: np.ndarray | None = None
    """(layers, experts), if bits are planned."""


def judged_part(subject: Subject, plans: Plans) -> RoutingTrace:
    """The sequences that the plans were not made on: of their own trace those kept for it, of another what has no text
    in common with what they were made on.

    Raises:
        PlanError: if none is left.
    """
    told = plans.told["placement"]
    if told["trace"] == subject.sha256:
        return subject.trace.part(*told["judged_on"])
    return unseen(subject.trace, told["planned_text"])


def make_plans(subject: Subject, settings: Settings, progress: Progress = lambda _: None) -> Plans:
    """All plans, each judged on the sequences that it was not made on.

    Raises:
        PlanError: if there is one sequence only, or fewer experts than devices.
    """
    planned, held = subject.split(settings.share)
    progress("placing experts by what follows what")
    device_of, is_optimal = _place(subject, planned, settings)
    progress("grouping token ids and experts")
    groups = cocluster(planned.choice, planned.tokens, planned.experts, subject.devices.count, start=device_of)
    progress("counting routing paths")
    predictor = fit(planned.choice, planned.tokens, planned.starts, planned.experts)
    mark = {
        "format": FORMAT,
        "model": subject.trace.model,
        "trace": subject.sha256,
        "made_on": [0, planned.sequences],
        "judged_on": [planned.sequences, subject.trace.sequences],
        "experts": planned.experts,
        "layers": planned.layers,
        "devices": dataclasses.asdict(subject.devices),
    }
    plans = Plans(
        placement=device_of,
        coclusters=groups,
        predictor=predictor,
        batching=settings.batching,
        look_ahead=settings.look_ahead,
        slots=settings.slots,
        told={},
    )
    told = {
        "placement": _tell_placement(subject, plans, planned, held, balanced=not settings.unbalanced)
        | {"optimal": is_optimal, "planned_text": hashes_of(planned)},
        "coclusters": _tell_coclusters(subject, plans, planned, held),
        "prediction": {
            "plan": {"file": PREDICTOR, "weights": predictor.weights},
            **_both(lambda part: _judge_prediction(part, predictor), planned, held),
        },
    }
    progress("replaying caches")
    told["caching"] = _tell_caching(subject, plans, planned, held)
    progress("making batches")
    told["batching"] = {
        "plan": dataclasses.asdict(settings.batching),
        **_both(lambda part: _judge_batching(part, settings.batching), planned, held),
    }
    return dataclasses.replace(plans, told={kind: {"kind": kind, **mark, **told[kind]} for kind in KINDS})


def _place(subject: Subject, planned: RoutingTrace, settings: Settings) -> tuple[np.ndarray, bool]:
    """A device for each expert, and whether no placement has fewer hops."""
    devices, experts = subject.devices, planned.experts
    affinity = affinity_of(planned.choice, experts)
    distance = devices.distance(subject.sizes.hidden_bytes)
    placed = place(affinity, distance, seed=settings.seed)
    if settings.unbalanced:
        return placed.device_of, placed.is_optimal
    load, capacity = load_of(planned.choice, experts), capacities(experts, devices.count)
    device_of = balanced(placed.device_of, affinity, distance, load, capacity)
    return device_of, placed.is_optimal and bool((device_of == placed.device_of).all())


def _tell_placement(
    subject: Subject, plans: Plans, planned: RoutingTrace, held: RoutingTrace, *, balanced: bool
) -> dict[str, Any]:
    devices = subject.devices
    return {
        "plan": {"device_of": plans.placement.tolist(), "devices": devices.count, "balanced": balanced},
        **_both(lambda part: _judge_placement(part, plans.placement, devices), planned, held),
    }


def _tell_coclusters(subject: Subject, plans: Plans, planned: RoutingTrace, held: RoutingTrace) -> dict[str, Any]:
    groups = plans.coclusters
    return {
        "plan": {
            "ids": groups.ids.tolist(),
            "home": groups.home.tolist(),
            "device_of": groups.device_of.tolist(),
            "devices": groups.devices,
        },
        **_both(lambda part: _judge_coclusters(part, groups, subject.devices), planned, held),
    }


def _tell_caching(subject: Subject, plans: Plans, planned: RoutingTrace, held: RoutingTrace) -> dict[str, Any]:
    by_memory = subject.devices.slots(subject.sizes.expert_bytes, planned.layers)
    slots = min(plans.slots or by_memory, planned.experts)
    return {
        "plan": {"policy": "belady", "look_ahead": plans.look_ahead, "slots": slots, "asked_slots": plans.slots},
        **_both(lambda part: _judge_caching(part, plans, slots), planned, held),
    }


def with_bits(
    plans: Plans, subject: Subject, model: Path, text: tuple[np.ndarray, np.ndarray], mean_bits: float
) -> Plans:
    """The plans and one of bits beside them. text: windows (n, length) to plan on, and others to judge by.

    Raises:
        CapacityError: if so few bits cannot be.
        ExportError, MismatchError: see `streaming.open_streamed`.
    """
    import torch

    from .bits import WIDTHS, bytes_of, plan_bits, told_of
    from .sensitivity import divergences, measure_harm

    sizes = subject.sizes
    harm = measure_harm(model, torch.from_numpy(text[0]), WIDTHS)
    widths = (*WIDTHS, sizes.source_bits)
    found = plan_bits(harm, widths, parameters=sizes.parameters, mean_bits=mean_bits)
    both = [found.baseline, found.bits]
    before, after = divergences(model, torch.from_numpy(text[1]), both, sizes.source_bits)
    mark = {key: value for key, value in plans.told["placement"].items() if key in _MARK}
    mark |= {name: _text_mark(windows) for name, windows in zip(("made_on", "judged_on"), text, strict=True)}
    measured = {"without": before, "with": after}
    told = {"kind": BITS, **mark, **told_of(found, sizes.source_bits), "measured": measured}
    each = {width: bytes_of(width, sizes.parameters, sizes.source_bits) for width in widths}
    expert_bytes = np.vectorize(each.__getitem__, otypes=[float])(found.bits)
    return dataclasses.replace(plans, told={**plans.told, BITS: told}, expert_bytes=expert_bytes)


def _text_mark(windows: np.ndarray) -> dict[str, Any]:
    """Bits are made and judged on text, not on sequences of the trace."""
    digest = hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()
    return {"windows": windows.shape[0], "length": windows.shape[1], "sha256": digest}


_MARK = ("format", "model", "trace", "experts", "layers", "devices")


def _both(
    judge: Callable[[RoutingTrace], dict[str, Any]], planned: RoutingTrace, held: RoutingTrace
) -> dict[str, dict[str, Any]]:
    return {"predicted": judge(planned), "measured": judge(held)}


def _judge_placement(part: RoutingTrace, device_of: np.ndarray, devices: Devices) -> dict[str, Any]:
    usual = contiguous(part.layers, capacities(part.experts, devices.count))
    before = hops_of(part.choice, usual, devices.node_of)
    after = hops_of(part.choice, device_of, devices.node_of)
    cut = 1 - after.cross_device / before.cross_device if before.cross_device else 0.0
    return {"without": before.to_json(), "with": after.to_json(), "cut": cut}


def _judge_coclusters(part: RoutingTrace, groups: Coclusters, devices: Devices) -> dict[str, Any]:
    usual = contiguous(part.layers, capacities(part.experts, devices.count))
    before = locality_of(part.choice, sequence_homes(part, devices.count), usual, devices.count)
    after = locality_of(part.choice, groups.home_of(part.tokens), groups.device_of, devices.count)
    return {"without": before.to_json(), "with": after.to_json()}


def sequence_homes(part: RoutingTrace, devices: int) -> np.ndarray:
    """Without a plan a sequence is served by one device, by turns: (tokens,)."""
    return np.repeat(np.arange(part.sequences) % devices, np.diff(part.starts))


def _judge_prediction(part: RoutingTrace, predictor: Predictor) -> dict[str, Any]:
    base = hit_rate(marginal_guess(predictor.marginal, len(part.tokens), part.top_k), part.choice)
    found = {}
    for known in ("ahead", "path"):
        guess = predictor.guess(part.choice, part.tokens, part.starts, known, part.top_k)
        found[known] = hit_rate(guess, part.choice)
    return {"without": base, **found}


def _judge_caching(part: RoutingTrace, plans: Plans, slots: int) -> dict[str, Any]:
    """Each device has so many slots, and is asked for the experts that are placed on it."""
    choice, tokens = part.choice[:, :_REPLAYED], part.tokens[:_REPLAYED]
    guess = plans.predictor.guess(choice, tokens, part.starts, "queue", part.top_k)
    how: dict[str, Any] = {"look_ahead": plans.look_ahead, "predicted": guess, "device_of": plans.placement}
    found = hit_rates(choice, part.experts, slots, **how)
    return {name: cached.hit_rate for name, cached in found.items()}


def _judge_batching(part: RoutingTrace, how: Batching) -> dict[str, Any]:
    found = {}
    for name, aware in (("without", False), ("with", True)):
        batches = batches_of(part.choice, part.starts, part.experts, how, expert_aware=aware)
        found[name] = shared_of(part.choice, part.starts, batches).to_json()
    return found
