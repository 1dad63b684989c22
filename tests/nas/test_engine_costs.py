# SPDX-License-Identifier: Apache-2.0
"""Costs of subblocks measured in a real engine, and a search that uses them."""

from dataclasses import replace
from pathlib import Path

import pytest
from refound.export import environments, install
from refound.export.errors import EngineMissingError
from refound.nas import engine_costs
from refound.nas.costs import cost_job, distinct_blocks
from refound.nas.engine_costs import EngineMeter
from refound.nas.ranks import Ranks
from refound.nas.recipe import Costs, Recipe, Space, check
from refound.nas.search import Search, run_search
from refound.nas.space import name_of
from refound.nas.speed import Times

from .small import WORKLOAD, recipe, teacher

LLAMA_CPP = Space(engines=("transformers", "llama.cpp"), ffn_percent=(50,), multiple=32)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    install.install("llama.cpp")
    folder = tmp_path_factory.mktemp("engine")
    costs = Costs(engine="llama.cpp", workloads=(replace(WORKLOAD, batch=2),), repeats=1)
    return recipe(teacher(folder / "model"), folder / "out", space=LLAMA_CPP, costs=costs)


def test_a_search_by_the_times_of_an_engine(wanted: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child and its teacher are then run there as well; nothing but results stays."""
    asked: list[list[str]] = []
    run = engine_costs.run_engine

    def counted(engine: str, models: list[Path], *rest: object, **more: object) -> object:
        asked.append([engine, *(path.name for path in models)])
        return run(engine, models, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_costs, "run_engine", counted)
    found = run_search(wanted, lambda _: None)
    assert found is not None
    blocks = distinct_blocks(found.space)
    assert len(asked) == len(blocks) + 1, "each kind of subblock, then the child"
    assert all(engine == "llama.cpp" and len(names) == 4 for engine, *names in asked), "two models, twice by turns"
    times = found.table.base_times["chat"]
    assert times.prefill_s > 0 and times.decode_s > 0
    speed = found.children[0].speed["chat"]
    assert min(speed.teacher.decode_s, speed.child.decode_s, speed.speedup(wanted.costs.workloads[0])) > 0
    assert not Path(wanted.out, ".costs").exists()
    # another time nothing is measured but the child
    run_search(wanted, lambda _: None)
    assert len(asked) == len(blocks) + 2


def test_what_the_engine_is_given(wanted: Recipe) -> None:
    """A layer of the base stays first; the variant is in all others; a job is named by engine and format."""
    opened = Search(wanted, lambda _: None, Ranks())
    source, space = opened.teacher.source, opened.space
    given = []
    meter = EngineMeter(source, replace(wanted, out=f"{wanted.out}-given"))
    meter._written = lambda name, decoder: given.append(decoder) or Path(name)  # type: ignore[method-assign]
    meter.by_turns = lambda models, workload: [[Times(prefill_s=3.0, decode_s=6.0)]] * 2  # type: ignore[method-assign]
    for block in distinct_blocks(space):
        _, facts = meter.compute(block)
        assert facts["chat"]["difference"] == {"prefill_s": 0, "decode_s": 0}
    base, *others = given
    for decoder in others:
        assert decoder.layers[0] == base.layers[0] != decoder.layers[1] == decoder.layers[2]
    names = [{name_of(d.layers[1].attention), name_of(d.layers[1].ffn)} for d in others]
    assert len({frozenset(name) for name in names}) == len(others)
    kinds = [wanted.costs, replace(wanted.costs, quantize="q8_0"), replace(wanted.costs, engine="torch")]
    block = distinct_blocks(space)[0]
    assert len({cost_job(source.decoder, replace(wanted, costs=costs), block).id for costs in kinds}) == 3


def test_what_cannot_be_is_said_before_anything_is_done(
    wanted: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (told,) = check(replace(wanted, costs=replace(wanted.costs, engine="vllm")))
    assert "'vllm', none of torch, transformers, llama.cpp" in told
    (told,) = check(replace(wanted, costs=replace(wanted.costs, engine="torch", quantize="q8_0")))
    assert "torch gets float32" in told
    mixed = replace(wanted, space=replace(wanted.space, formats=("source", "int8")), budget={"memory.chat": "50%"})
    assert any("given one format" in problem for problem in check(mixed))
    monkeypatch.setenv("REFOUND_ENGINES", str(tmp_path / "none"))
    assert environments.engine_python("llama.cpp") is None
    with pytest.raises(EngineMissingError, match=r"make engines ENGINES=llama\.cpp"):
        run_search(replace(wanted, out=str(tmp_path / "out")), lambda _: None)
    assert not (tmp_path / "out").exists()
