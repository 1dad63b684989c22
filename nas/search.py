# SPDX-License-Identifier: Apache-2.0
"""The search as a whole: activations, library, scores, costs, programme, children. Run again, it goes on."""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..export.architecture import Decoder
from .activations import activation_jobs, compute_activations
from .children import Speed, jobs_of, module_of, modules_of, realize, round_trained, speeds, times_here
from .choose import Chooser, Chosen
from .costs import CostMeter, CostTable, cost_job, distinct_blocks, read_table
from .engine_costs import EngineMeter, require_engine
from .errors import OtherSearchError, StoreError, TeacherError
from .estimate import Estimate, estimate
from .formats import roundings_of, source_decoder, source_of
from .jobs import Job, Progress, Result, Store, run_jobs
from .library import LibraryMaker, library_job, replacements, trained, variant_job
from .programme import Key, Programme
from .ranks import Ranks, joined, only_search
from .recipe import TORCH, Recipe
from .scores import Scorer, as_result, score_job
from .space import SearchSpace, make_space, name_of
from .speed import Times
from .teacher import Teacher

MARK = "search.lock.json"
"""Names the teacher that a directory's search is of."""


@dataclass(kw_only=True)
class Found:
    """What a search has found out, for the report."""

    teacher: Teacher
    space: SearchSpace
    library: dict[Key, dict[str, Any]] = field(default_factory=dict)
    scores: dict[Key, dict[str, Any]] = field(default_factory=dict)
    table: CostTable
    programme: Programme
    chosen: Chosen
    children: list["Child"] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Child:
    """A child that was written."""

    path: Path
    decoder: Decoder
    measured: dict[str, Any]
    """On the windows that chose it."""
    test: dict[str, Any]
    """On windows that nothing was chosen by."""
    speed: dict[str, Speed]
    totals: dict[str, float]
    distilled: dict[str, Any] | None = None


class Search:
    """One search, stage by stage; every stage's jobs are in the store when it ends."""

    def __init__(self, recipe: Recipe, progress: Progress, ranks: Ranks) -> None:
        self.recipe, self.ranks = recipe, ranks
        self.progress: Progress = progress if ranks.is_first else lambda _: None
        self.out = Path(recipe.out)
        self.store = Store(self.out / "store")
        self.teacher = Teacher.open(recipe)
        self.space = make_space(self.teacher.source.decoder, recipe.space)
        self.seconds: dict[str, float] = {}
        self._activations = activation_jobs(self.teacher)
        self._trained = list(trained(self.space))
        self._scored = list(replacements(self.space))
        self._kinds = distinct_blocks(self.space)
        self.engine = EngineMeter(self.teacher.source, recipe) if recipe.costs.engine != TORCH else None
        self.windows = (len(self.teacher.score), len(self.teacher.test))  # too little text is said now, not later

    def library_jobs(self) -> list[Job]:
        return [library_job(self.teacher, layer, part, block) for layer, part, block in self._trained]

    def score_jobs(self) -> list[Job]:
        return [
            score_job(self.teacher, "score", [(layer, variant_job(self.teacher, layer, part, block))])
            for layer, part, block in self._scored
        ]

    def cost_jobs(self) -> list[Job]:
        return [cost_job(self.teacher.source.decoder, self.recipe, block) for block in self._kinds]

    def stage(self, name: str, jobs: Sequence[Job], compute: Callable[[Job], Result], *, alone: bool = False) -> None:
        """Do the jobs, then wait for the other ranks. alone: the first rank does all of them."""
        began = time.monotonic()
        if self.ranks.is_first or not alone:
            ranks = Ranks() if alone else self.ranks
            run_jobs(name, jobs, self.store, compute, self.progress, rank=ranks.rank, world_size=ranks.world_size)
        self.ranks.wait()
        self.seconds[name] = time.monotonic() - began

    def run_library(self) -> None:
        jobs = self.library_jobs()
        self._prove(jobs)
        if any(not self.store.is_done(job) for job in jobs):
            self._prove(self._activations)
            self.stage("activations", self._activations, lambda job: compute_activations(self.teacher, job))
        maker = LibraryMaker(self.teacher, self.space, self.store, self._activations)
        known = {job.id: blocks for job, blocks in zip(jobs, self._trained, strict=True)}
        # by layers over the ranks, so that each reads a layer's activations once
        order = sorted(range(len(jobs)), key=lambda index: (self._trained[index][0] % self.ranks.world_size, index))
        mine = [jobs[index] for index in order if self._trained[index][0] % self.ranks.world_size == self.ranks.rank]
        began = time.monotonic()
        run_jobs("library", mine, self.store, lambda job: maker.compute(*known[job.id]), self.progress)
        self.ranks.wait()
        self.seconds["library"] = time.monotonic() - began

    def _prove(self, jobs: Sequence[Job]) -> None:
        """Read what is there once: what is damaged is set aside, and counts as not done from here on."""
        if self.ranks.is_first:
            for job in jobs:
                with contextlib.suppress(KeyError):  # not done yet, or damaged and said so
                    self.store.read(job)
        self.ranks.wait()

    def run_scores(self) -> dict[Key, dict[str, Any]]:
        scorer = Scorer(self.teacher, self.teacher.score)
        own = scorer.quality({})
        if not own.lm < float("inf"):
            raise TeacherError(f"the teacher's own loss on held-out text is {own.lm}; nothing can be compared with it")
        jobs = self.score_jobs()
        known = {job.id: blocks for job, blocks in zip(jobs, self._scored, strict=True)}
        made = set(self._trained)

        def compute(job: Job) -> Result:
            layer, part, block = known[job.id]
            facts: dict[str, Any] = {}
            if (layer, part, source_of(block)) in made:  # else it is the teacher's own, rounded
                _, facts = self.store.read(library_job(self.teacher, layer, part, source_of(block)))
            if "infeasible" in facts:
                return {}, facts
            return as_result(scorer.quality({layer: [module_of(self.teacher, layer, part, block, self.store)]}))

        self.stage("scores", jobs, compute)
        return {
            (layer, part, name_of(block)): self.facts(job, compute)
            for (layer, part, block), job in zip(self._scored, jobs, strict=True)
        }

    def run_costs(self) -> CostTable:
        meter = self.engine or CostMeter(self.teacher.source.decoder, self.recipe, self.teacher.device)
        jobs = self.cost_jobs()
        known = {job.id: block for job, block in zip(jobs, self._kinds, strict=True)}
        self.stage("costs", jobs, lambda job: meter.compute(known[job.id]), alone=True)
        facts = [self.facts(job, lambda job: meter.compute(known[job.id])) for job in jobs]
        return read_table(self.teacher.source.decoder, list(zip(self._kinds, facts, strict=True)))

    def times(self, child: Decoder, path: Path) -> dict[str, list[list[Times]]]:
        """By workload, those of the teacher and of a child that is written at `path`, where costs are measured."""
        if self.engine is None:
            return times_here(self.teacher, child, self.store)
        models = [self.engine.exported(self.teacher.source.path, "teacher"), self.engine.exported(path, "child")]
        return {workload.name: self.engine.by_turns(models, workload) for workload in self.recipe.costs.workloads}

    def facts(self, job: Job, compute: Callable[[Job], Result]) -> dict[str, Any]:
        """Of a job that is done; a damaged result is made anew."""
        try:
            return self.store.facts(job)
        except KeyError:
            self.store.put(job, *compute(job))
            return self.store.facts(job)

    def library_facts(self) -> dict[Key, dict[str, Any]]:
        return {
            (layer, part, name_of(block)): self.store.facts(job)
            for (layer, part, block), job in zip(self._trained, self.library_jobs(), strict=True)
        }

    def quality(self, kind: str, child: Decoder, scorer: Scorer) -> dict[str, Any]:
        """The measured quality of a child, as a job."""
        job = score_job(self.teacher, kind, jobs_of(self.teacher, child))

        def compute(_: Job) -> Result:
            return as_result(scorer.quality(modules_of(self.teacher, child, self.store)))

        if not self.store.is_done(job):
            self.store.put(job, *compute(job))
        return self.facts(job, compute)


def run_search(recipe: Recipe, progress: Progress) -> Found | None:
    """The whole search; None on ranks other than the first.

    Raises:
        SearchError, ExportError, DistillError: see `errors`; BudgetError if no child meets the budget.
    """
    if recipe.costs.engine != TORCH:
        require_engine(recipe.costs.engine)
    with joined() as ranks, only_search(Path(recipe.out)) if ranks.is_first else contextlib.nullcontext():
        search = Search(recipe, progress, ranks)
        if ranks.is_first:
            _claim(search)
            _keep(recipe)
            search.store.sweep()
        ranks.wait()
        try:
            found = _run(search)
        finally:
            if search.engine is not None and ranks.is_first:
                search.engine.close()
    if found is not None and recipe.distill.tokens:
        # The other ranks have gone, and their process group with them.
        with only_search(Path(recipe.out)):
            first = found.children[0]
            found.children[0] = replace(first, distilled=_distil(search, first))
    return found


def _run(search: Search) -> Found | None:
    search.run_library()
    scores = search.run_scores()
    table = search.run_costs()
    if not search.ranks.is_first:
        return None
    values = {key: facts[search.recipe.score.objective] for key, facts in scores.items() if "infeasible" not in facts}
    scorer = Scorer(search.teacher, search.teacher.score)
    # the LM loss counts from the teacher's own
    own = scorer.quality({}).lm if search.recipe.score.objective == "lm" else 0.0
    values = {key: value - own for key, value in values.items()}
    decoder = search.teacher.source.decoder
    programme = Programme(decoder, search.space, search.recipe, values, table)

    def measure(child: Decoder) -> dict[str, Any]:
        facts = search.quality("child", child, scorer)
        return facts | {"lm": facts["lm"] - own} if own and "lm" in facts else facts

    began = time.monotonic()
    chosen = Chooser(programme, measure, search.progress).choose()
    search.seconds["choice"] = time.monotonic() - began
    found = Found(
        teacher=search.teacher,
        space=search.space,
        library=search.library_facts(),
        scores=scores,
        table=table,
        programme=programme,
        chosen=chosen,
        seconds=search.seconds,
    )
    _write_children(search, found)
    return found


def _write_children(search: Search, found: Found) -> None:
    recipe, programme = search.recipe, found.programme
    test = Scorer(search.teacher, search.teacher.test)
    for number, solution in enumerate(found.chosen.best(recipe.children), start=1):
        decoder = programme.child(solution.choice)
        predicted = {workload.name: found.table.child(decoder, workload) for workload in recipe.costs.workloads}
        own = programme.teacher
        base: dict[str, Times] = {w.name: found.table.child(own, w) for w in recipe.costs.workloads}
        told = test.quality(modules_of(search.teacher, decoder, search.store)).to_json()
        path = search.out / "children" / str(number)
        record = {"recipe": recipe.to_json(), "measured": solution.measured, "test": told}
        realize(search.teacher, decoder, search.store, path, record=record, overwrite=True)
        search.progress(f"child {number}: written to {path}")
        search.progress(f"child {number}: measuring its speed beside the teacher's")
        speed = speeds(search.times(decoder, path), predicted, base)
        child = Child(
            path=path,
            decoder=decoder,
            measured=solution.measured,
            test=told,
            speed=speed,
            totals=programme.totals(solution.choice),
        )
        found.children.append(child)


def _distil(search: Search, child: Child) -> dict[str, Any]:
    """What is stored in fewer bits is distilled before it is rounded, in a directory of its own, and then rounded."""
    from ..distill.config import DistillConfig
    from ..distill.loop import distill

    recipe, path, is_rounded = search.recipe, child.path, bool(roundings_of(child.decoder))
    if is_rounded:
        path = path.with_name(f"{path.name}-source")
        realize(search.teacher, source_decoder(child.decoder), search.store, path, record={}, overwrite=True)
    config = DistillConfig(
        child=path,
        teacher=search.teacher.source.path,
        out=path.with_name(f"{path.name}-distilled"),
        sources=recipe.text.sources,
        training=recipe.distill,
        held_out=max(recipe.text.test // recipe.distill.length, 1),
        seed=recipe.seed,
        overwrite=True,
    )
    search.progress(f"distilling {path}")
    told = {"path": str(config.out), **distill(config, search.progress, alone=True).to_json()}
    if not is_rounded:
        return told
    out = child.path.with_name(f"{child.path.name}-distilled")
    record = {"source": {"path": str(config.out.absolute())}}
    quality = round_trained(search.teacher, child.decoder, config.out, out, record=record)
    search.progress(f"rounded as it was chosen, on test text: {quality}")
    return told | {"rounded": {"path": str(out), "test": quality.to_json()}}


def plan_search(recipe: Recipe) -> Estimate:
    """What `run_search` would do, without doing any of it."""
    search = Search(recipe, lambda _: None, Ranks())
    stages = {
        "activations": search._activations,
        "library": search.library_jobs(),
        "scores": search.score_jobs(),
        "costs": search.cost_jobs(),
    }
    counts = {name: len(jobs) for name, jobs in stages.items()}
    counts["probes"] = min(recipe.score.probes, len(search.space.layers))
    counts["children"] = recipe.solver.pool * recipe.solver.rounds
    counts["distillation"] = int(recipe.distill.tokens > 0)
    done = {name: sum(search.store.is_done(job) for job in jobs) for name, jobs in stages.items()}
    return estimate(search.teacher, search.space, done, counts)


def _keep(recipe: Recipe) -> None:
    """The resolved recipe stays beside its results."""
    _write(Path(recipe.out) / "recipe.json", recipe.to_json())


def _claim(search: Search) -> None:
    mark = search.out / MARK
    wanted = {"teacher": search.teacher.fingerprint}
    if mark.is_file():
        try:
            found = json.loads(mark.read_text())
        except ValueError:
            found = None  # cut short by a kill; it is written anew
        if found is not None and found != wanted:
            raise OtherSearchError(
                f"{search.out} holds the search of another teacher ({str(found.get('teacher'))[:12]}… and not "
                f"{search.teacher.fingerprint[:12]}…). Its library is of no use to this one: say --set out=DIRECTORY"
            )
    _write(mark, wanted)


def _write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(value, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; make room and run the same command again") from error
