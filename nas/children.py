# SPDX-License-Identifier: Apache-2.0
"""Children: put together from the teacher and the library, measured as a whole, written as model directories."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..distill.models import build, open_blocks
from ..distill.quality import Quality, measure
from ..distill.save import save_model
from ..export.architecture import Decoder
from .blocks import PARTS, Module, Part, fill, make, shapes
from .formats import Block, as_served, rounding_in, roundings_of, source_decoder, source_of
from .jobs import Job, Store
from .library import library_job, variant_job
from .recipe import Workload
from .speed import Times, by_turns, measure_once, median, threads
from .teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A child beside its teacher, measured by turns, and what was predicted of it."""

    teacher: Times
    child: Times
    predicted: Times
    predicted_teacher: Times

    def speedup(self, workload: Workload) -> float:
        return self.teacher.latency_s(workload) / self.child.latency_s(workload)

    def predicted_speedup(self, workload: Workload) -> float:
        return self.predicted_teacher.latency_s(workload) / self.predicted.latency_s(workload)


def replaced(teacher: Decoder, child: Decoder) -> Iterator[tuple[int, Part, Block]]:
    """The subblocks of a child that are not its teacher's."""
    for index, (own, other) in enumerate(zip(teacher.layers, child.layers, strict=True)):
        for part in PARTS:
            if getattr(own, part) != getattr(other, part):
                yield index, part, getattr(other, part)


def modules_of(teacher: Teacher, child: Decoder, store: Store) -> dict[int, list[Module]]:
    """By layer, the child's subblocks that are not the teacher's, on its device in float32."""
    found: dict[int, list[Module]] = {}
    for layer, part, block in replaced(teacher.source.decoder, child):
        found.setdefault(layer, []).append(module_of(teacher, layer, part, block, store))
    return found


def module_of(teacher: Teacher, layer: int, part: Part, block: Block, store: Store) -> Module:
    tensors, rounding = tensors_of(teacher, layer, part, block, store), rounding_in(block)
    if rounding is None:
        widened = {name: tensor.float() for name, tensor in tensors.items()}
    else:
        widened = as_served(tensors, rounding)
    return fill(make(teacher.source.decoder, block), widened).moved(teacher.device)


def tensors_of(teacher: Teacher, layer: int, part: Part, block: Block, store: Store) -> dict[str, torch.Tensor]:
    """The weights of a subblock by their names within a layer, in the teacher's type, before any rounding."""
    source = source_of(block)
    if source == getattr(teacher.source.decoder.layers[layer], part):
        own = teacher.layer_weights[layer]
        return {name: own[name] for name in shapes(teacher.source.decoder, source)}
    return store.read(library_job(teacher, layer, part, source))[0]


def jobs_of(teacher: Teacher, child: Decoder) -> list[tuple[int, Job]]:
    return [
        (layer, variant_job(teacher, layer, part, block))
        for layer, part, block in replaced(teacher.source.decoder, child)
    ]


def weights_of(teacher: Teacher, child: Decoder, store: Store) -> dict[str, torch.Tensor]:
    """All weights of the child, in the type the teacher is stored in; the teacher's own are untouched.

    None is rounded yet: `formats.roundings_of` says which are to be.
    """
    changed: dict[str, torch.Tensor] = {}
    for layer, part, block in replaced(teacher.source.decoder, child):
        tensors = tensors_of(teacher, layer, part, block, store)
        changed |= {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
    own = teacher.source.decoder.tensors()
    kept = [name for name in child.tensors() if name not in changed and name in own]
    changed |= dict(teacher.source.weights(kept))
    missing = {name: spec for name, spec in child.tensors().items() if name not in changed}  # biases, of zeros
    return changed | {name: torch.zeros(spec.shape, dtype=teacher.dtype) for name, spec in missing.items()}


def realize(
    teacher: Teacher, child: Decoder, store: Store, directory: Path, *, record: Mapping[str, Any], overwrite: bool
) -> None:
    """Write the child as a Hugging Face directory that `refound export` takes.

    Rounded weights are packed as compressed-tensors: such a directory is what engines load, and not exported again.

    Raises:
        ExportError: the package compressed-tensors is missing, and weights are rounded.
        OutputExistsError, OutputSpaceError: see `export.atomic.fresh_directory`.
    """
    lineage = {"teacher": {"path": str(teacher.source.path.absolute()), "sha256": teacher.fingerprint}}
    save_model(
        directory,
        source_decoder(child),
        weights_of(teacher, child, store),
        companions_of=teacher.source,
        record=lineage | dict(record),
        overwrite=overwrite,
        roundings=roundings_of(child),
    )


def round_trained(
    teacher: Teacher, child: Decoder, trained: Path, directory: Path, *, record: Mapping[str, Any]
) -> Quality:
    """Write the child with the weights of `trained`, which has its shapes, in the child's own formats.

    What was trained in numbers that are not rounded is rounded at the end, once: the quality is of what is written, on
    the teacher's test windows.

    Raises:
        OutputSpaceError: see `export.atomic.fresh_directory`; what is in `directory` is replaced.
        ExportError: the package compressed-tensors is missing.
    """
    source, decoder, roundings = open_blocks(trained), source_decoder(child), roundings_of(child)
    weights = dict(source.weights(list(decoder.tensors())))
    save_model(directory, decoder, weights, companions_of=source, record=record, overwrite=True, roundings=roundings)
    read = {
        name: roundings[name].as_read(name, weight) if name in roundings else weight.float()
        for name, weight in weights.items()
    }
    model: Any = build(decoder, read, dtype=torch.float32)
    return measure(model.to(teacher.device), teacher.model, teacher.test.to(teacher.device))


def times_here(teacher: Teacher, child: Decoder, store: Store) -> dict[str, list[list[Times]]]:
    """By workload, those of the teacher and of the child on this device, by turns.

    Weights are computed with in float32, as transformers does after it has unpacked those that are rounded.
    """
    model = _running(teacher, child, store).to(teacher.device)
    costs = teacher.recipe.costs
    found = {}
    with threads(costs.threads):
        for workload in costs.workloads:
            measures = [lambda w=workload: measure_once(teacher.model, w), lambda w=workload: measure_once(model, w)]
            found[workload.name] = by_turns(measures, costs.repeats)
    return found


def speeds(
    measured: Mapping[str, Sequence[Sequence[Times]]], predicted: Mapping[str, Times], base: Mapping[str, Times]
) -> dict[str, Speed]:
    """By workload. measured: of teacher and child; predicted, base: of the child and of the teacher, by the table."""
    return {
        name: Speed(teacher=median(own), child=median(other), predicted=predicted[name], predicted_teacher=base[name])
        for name, (own, other) in measured.items()
    }


def _running(teacher: Teacher, child: Decoder, store: Store) -> Any:
    """The child as transformers runs it, in float32: where it has experts, what a token takes alone is computed."""
    if not child.moe_layers:
        widened = {name: tensor.float() for name, tensor in weights_of(teacher, child, store).items()}
        return build(source_decoder(child), widened, dtype=torch.float32)
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(dir=store.root, prefix="child-") as folder:
        path = Path(folder) / "model"
        realize(teacher, child, store, path, record={}, overwrite=False)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)


def quality_json(quality: Quality | None) -> dict[str, Any] | None:
    return None if quality is None else quality.to_json()
