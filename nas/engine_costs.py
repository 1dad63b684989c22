# SPDX-License-Identifier: Apache-2.0
"""What a variant costs in an engine: models of random weights, written as `refound export` writes them, run there.

As on the device itself (`costs`), times are differences between whole models that are measured by turns: all layers but
the first get the variant. The first keeps its own, since engines have rules for it alone, and for models in which
nothing attends. Where an engine has no place for a subblock, what the export writes in its stead is what is measured.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..distill.save import fill_model
from ..export.architecture import Decoder
from ..export.bench import plain_prompts
from ..export.directory import ModelDirectory, open_directory
from ..export.environments import engine_python
from ..export.errors import EngineMissingError
from ..export.own_code import own_code
from ..export.plan import ExportConfig, make_plan
from ..export.proof import Prompts, default_threads, run_engine
from ..export.writers import write_part
from .blocks import part_of
from .costs import base_layer, noise
from .jobs import Result
from .recipe import Recipe, Workload
from .space import Block
from .speed import Times, median

_DECODED = 16
"""Tokens decoded for one measurement."""


def require_engine(engine: str) -> None:
    """Raises EngineMissingError if it is not installed: now, and not after hours."""
    if engine_python(engine) is None:
        raise EngineMissingError(
            f"costs.engine is {engine}, which is not installed here: make engines ENGINES={engine}"
        )


class EngineMeter:
    """Measures in the engine of a recipe. Its files lie in a folder of the search's, and go with `close`."""

    def __init__(self, source: ModelDirectory, recipe: Recipe) -> None:
        self._source, self._costs = source, recipe.costs
        self._folder = Path(recipe.out, ".costs")
        self._base: Path | None = None

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._base = None

    def compute(self, block: Block) -> Result:
        """By workload: `base` (the base model's times) and `difference` (for one subblock of this kind).

        Raises:
            ExportError: EngineFitError or ProofError, if the engine does not take such a model.
        """
        teacher = self._source.decoder
        base, part = base_layer(teacher), part_of(block)
        count = len(teacher.layers)
        if self._base is None:
            shutil.rmtree(self._folder, ignore_errors=True)  # of a search that was killed
            self._base = self._written("base", replace(teacher, layers=(base,) * count))
        other, changed = self._base, max(count - 1, 1)
        if block != getattr(base, part):
            layers = [replace(base, **{part: block})] * count
            layers[: count - changed] = [base] * (count - changed)
            other = self._written("other", replace(teacher, layers=tuple(layers)))
        facts = {}
        for workload in self._costs.workloads:
            own, with_other = self.by_turns([self._base, other], workload)
            differences = [one - two for one, two in zip(with_other, own, strict=True)]
            facts[workload.name] = {
                "base": asdict(median(own)),
                "difference": asdict(median(differences).scaled(1 / changed)),
            }
        return {}, facts

    def exported(self, model: Path, name: str) -> Path:
        """A model as the engine loads it: a directory, or a file."""
        source = open_directory(model)
        config = ExportConfig(
            model=model, engines=(self._costs.engine,), out=self._folder / name, quantize=self._costs.quantize
        )
        (part,) = make_plan(config, source).parts
        shutil.rmtree(part.directory, ignore_errors=True)
        part.directory.mkdir(parents=True)
        write_part(part, source, part.directory, lambda line: None)
        return part.model_path

    def by_turns(self, models: Sequence[Path], workload: Workload) -> list[list[Times]]:
        """Each run `repeats` times, by turns in one process, after a run that is not counted: times for each model."""
        asked = [model for _ in range(self._costs.repeats + 1) for model in models]
        decoded = max(1, min(_DECODED, workload.new))
        answers = run_engine(
            self._costs.engine,
            asked,
            Prompts(ids=plain_prompts(workload.batch, workload.prompt), text=()),
            trust=tuple(path for model in models for path in own_code(model)),
            new_tokens=decoded,
            threads=self._costs.threads or default_threads(),
        )["models"]
        times = [times_of(answer, workload) for answer in answers]
        return [times[index :: len(models)][1:] for index in range(len(models))]

    def _written(self, name: str, decoder: Decoder) -> Path:
        plain = self._folder / f"{name}-plain"
        shutil.rmtree(plain, ignore_errors=True)
        plain.mkdir(parents=True, mode=0o700)
        fill_model(plain, decoder, _Noise(decoder), companions_of=self._source, record={})
        path = self.exported(plain, name)
        shutil.rmtree(plain)
        return path


class _Noise(Mapping[str, torch.Tensor]):
    """Random weights of a decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self._specs = decoder.tensors()

    def __getitem__(self, name: str) -> torch.Tensor:
        return noise(self._specs[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


def times_of(answer: Mapping[str, float], workload: Workload) -> Times:
    """What a driver tells of one model: rates over all prompts."""
    return Times(
        prefill_s=workload.batch * workload.prompt / answer["prefill_tok_s"],
        decode_s=workload.batch / answer["decode_tok_s"] if workload.new else 0.0,
    )
