# SPDX-License-Identifier: Apache-2.0
"""The search as a whole on a tiny teacher: what it returns is true, and kills, damage and bad input lose nothing."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refound.distill.config import Training
from refound.distill.errors import DistillUsageError, TextError
from refound.distill.models import load, open_blocks
from refound.distill.quality import measure
from refound.export.errors import ModelDamageError
from refound.nas.children import realize, weights_of
from refound.nas.errors import BudgetError, OtherSearchError
from refound.nas.jobs import Store
from refound.nas.ranks import Ranks, only_search
from refound.nas.recipe import Recipe, Text
from refound.nas.report import to_json, to_text, write_report
from refound.nas.scores import Scorer
from refound.nas.search import Found, Search, plan_search, run_search
from refound.nas.teacher import Teacher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .small import recipe, teacher


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def found(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One whole search, which several tests look at."""
    wanted = recipe(
        model, tmp_path_factory.mktemp("search"), distill=Training(tokens=4096, length=32, batch=4, lr=3e-4)
    )
    done = run_search(wanted, quiet)
    assert done is not None
    return done


# --- what comes out ----------------------------------------------------------------------------------------------


def test_the_child_meets_its_budget_and_is_what_was_measured(found: Found) -> None:
    child, own = found.children[0], found.teacher
    assert child.decoder.parameters <= 0.8 * own.source.decoder.parameters
    assert open_blocks(child.path).decoder.layers == child.decoder.layers
    quality = measure(load(open_blocks(child.path)), own.model, own.test)
    assert quality.to_json() == pytest.approx(child.test, rel=1e-5, abs=1e-7)


def test_transformers_loads_the_child_and_computes_the_same(
    found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    path = found.children[0].path
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
    ids = found.teacher.test[:2]
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, load(open_blocks(path))(input_ids=ids).logits)


def test_the_best_child_is_the_best_of_those_measured_and_distilling_helps(found: Found) -> None:
    measured = [one.measured["kl"] for one in found.chosen.measured]
    assert found.children[0].measured["kl"] == min(measured) and len(measured) >= 2
    assert all(one.solution.proven for one in found.chosen.measured)
    distilled = found.children[0].distilled
    assert distilled is not None and distilled["after"]["kl"] < distilled["before"]["kl"]


def test_every_library_variant_is_at_least_as_good_as_nothing(found: Found) -> None:
    losses = {key: facts["loss"] for key, facts in found.library.items()}
    assert all(0 <= loss <= 1.0 for loss in losses.values())
    for (layer, part, name), loss in losses.items():
        if part == "ffn" and name == "w72":
            assert loss <= losses[layer, part, "w24"]
        assert found.library[layer, part, name]["loss"] <= found.library[layer, part, name]["start"]


def test_the_report_is_whole(found: Found) -> None:
    file, pictures = write_report(found)
    told = json.loads(file.read_text())
    assert told == json.loads(json.dumps(to_json(found)))
    assert (
        len(told["scores"]) == len(found.scores)
        and told["front"]
        and told["children"][0]["export"].startswith("refound export")
    )
    page = pictures.read_text()
    assert "<svg" in page and "http" not in page and "<script" not in page
    text = to_text(found)
    assert "parameters" in text and "predicted" in text


# --- identities --------------------------------------------------------------------------------------------------


def test_the_full_width_child_equals_the_teacher_bit_for_bit(found: Found, tmp_path: Path) -> None:
    own = found.teacher
    child = found.programme.child(found.programme.teacher_choice())
    assert child == own.source.decoder
    realize(own, child, Store(tmp_path / "none"), tmp_path / "child", record={}, overwrite=False)
    written, there = (
        load_file(tmp_path / "child" / "model.safetensors"),
        load_file(own.source.path / "model.safetensors"),
    )
    assert written.keys() == there.keys() and all(torch.equal(written[name], there[name]) for name in there)
    ids = own.test[:2]
    theirs = AutoModelForCausalLM.from_pretrained(own.source.path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(load(open_blocks(tmp_path / "child"))(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_replacing_nothing_scores_nothing(found: Found) -> None:
    quality = Scorer(found.teacher, found.teacher.score).quality({})
    assert quality.kl == 0 and quality.kl_se == 0 and quality.cosine == pytest.approx(0, abs=1e-6)


def test_a_score_is_what_the_whole_model_answers(found: Found, tmp_path: Path) -> None:
    """The replacement in a model of its own, measured apart: the short run from the replaced layer on is the same."""
    search = Search(found.teacher.recipe, quiet, Ranks())
    space = found.space.layers[1]
    pair = next(pair for pair in space.pairs if pair[0] == 0 and space.ffn[pair[1]].kind == "none")
    choice = list(found.programme.teacher_choice())
    choice[1] = space.pairs.index(pair)
    child = found.programme.child(tuple(choice))
    realize(found.teacher, child, search.store, tmp_path / "child", record={}, overwrite=False)
    apart = measure(load(open_blocks(tmp_path / "child")), found.teacher.model, found.teacher.score)
    assert found.scores[1, "ffn", "none"] == pytest.approx(apart.to_json(), rel=1e-5, abs=1e-7)


# --- what happens to it ------------------------------------------------------------------------------------------


def library_bytes(out: Path) -> dict[str, bytes]:
    folders = (out / "store" / kind for kind in ("activations", "library", "score"))
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for folder in folders
        for path in folder.glob("*.safetensors")
    }


def command(model: Path, out: Path, tmp_path: Path) -> list[str]:
    """The very search of `small.recipe`, as it is typed."""
    file = tmp_path / "recipe.toml"
    file.write_text(
        f"""
teacher = "{model}"
out = "{out}"
text = {{ sources = ["python-docs"], length = 32, train = 1024, score = 256, test = 256 }}
space = {{ ffn_percent = [75, 50, 25], multiple = 8 }}
library = {{ steps = 2, batch = 4 }}
score = {{ probes = 2 }}
costs = {{ repeats = 1, workloads = [{{ name = "chat", prompt = 16, new = 4 }}] }}
budget = {{ parameters = "80%" }}
solver = {{ pool = 2, distance = 1, rounds = 2, points = 4, seconds = 20.0 }}
distill = {{ tokens = 0, length = 32 }}
"""
    )
    return [sys.executable, "-m", "refound", "search", str(file), "--json"]


def test_killed_anywhere_it_goes_on_to_the_same_bytes(model: Path, found: Found, tmp_path: Path) -> None:
    """SIGKILL after a few jobs, several times, in library and scores; then the same command to the end."""
    out, draw = tmp_path / "out", random.Random(3)
    typed = command(model, out, tmp_path)
    whole = library_bytes(Path(found.teacher.recipe.out))
    kills = 0
    while kills < 3:
        done = len(library_bytes(out))
        target = done + draw.randint(1, 12)
        process = subprocess.Popen(typed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(library_bytes(out)) < target:
            os.sched_yield()
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    ended = subprocess.run(typed, capture_output=True, text=True, check=True)
    assert library_bytes(out) == whole
    told = json.loads(ended.stdout)
    assert told["children"][0]["layers"] == to_json(found)["children"][0]["layers"]
    weights = [
        load_file(Path(path) / "model.safetensors") for path in (told["children"][0]["path"], found.children[0].path)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_what_is_damaged_is_made_anew(
    model: Path, found: Found, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = recipe(model, tmp_path / "out")
    run_search(wanted, quiet)
    sound = library_bytes(tmp_path / "out")
    for kind in ("library", "score"):
        path = next((tmp_path / "out" / "store" / kind).glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-3])
    said: list[str] = []
    run_search(wanted, said.append)
    assert library_bytes(tmp_path / "out") == sound
    assert "is damaged" in capfd.readouterr().err


def test_a_dry_run_does_nothing_and_counts_what_is_left(model: Path, found: Found, tmp_path: Path) -> None:
    wanted = recipe(model, tmp_path / "out")
    plan = plan_search(wanted)
    assert not (tmp_path / "out").exists()
    told = plan.to_json()
    assert told["jobs"] > 40 and told["bytes"] > 0 and told["hours"] > 0 and "--dry-run" in plan.to_text()
    done = {stage.name: stage.done for stage in plan_search(found.teacher.recipe).stages}
    assert done["library"] == len(found.library) and done["scores"] == len(found.scores)


# --- bad input ---------------------------------------------------------------------------------------------------


def test_an_infeasible_budget_says_why_and_what_is_nearest(found: Found) -> None:
    out = found.teacher.recipe.out
    both = {"parameters": "5%", "memory.chat": "90%"}
    with pytest.raises(BudgetError) as caught:
        run_search(replace(found.teacher.recipe, out=out, budget=both), quiet)
    told = str(caught.value)
    assert (
        "parameters: at most" in told
        and "the least that any child has is" in told
        and "memory" not in told.split("\n")[1]
    )
    nearest = told.split("nearest budget that can be met: ")[1]
    assert "parameters = " in nearest and "memory.chat = " in nearest


def test_a_directory_of_another_teacher_is_refused(found: Found, tmp_path: Path) -> None:
    other = teacher(tmp_path / "other", width=64)
    with pytest.raises(OtherSearchError, match="holds the search of another teacher"):
        run_search(replace(found.teacher.recipe, teacher=str(other)), quiet)


def test_another_recipe_reuses_what_fits_and_nothing_else(found: Found) -> None:
    """Same teacher, another ridge: none of the library is taken over; another budget: all of it."""
    own = found.teacher.recipe
    counted = {stage.name: stage.done for stage in plan_search(replace(own, budget={"parameters": "60%"})).stages}
    assert counted["library"] == len(found.library)
    library = replace(own.library, ridge=(1e-2,))
    counted = {stage.name: stage.done for stage in plan_search(replace(own, library=library)).stages}
    assert counted["library"] == 0 and counted["activations"] > 0


def test_two_searches_do_not_write_one_directory(model: Path, tmp_path: Path) -> None:
    with only_search(tmp_path), pytest.raises(OtherSearchError, match="another search writes"):
        run_search(recipe(model, tmp_path), quiet)


def test_too_little_text_is_refused_before_anything_is_done(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("few words\n" * 200)
    wanted = recipe(
        model, tmp_path / "out", text=Text(sources=(str(file),), length=32, train=1 << 20, score=32, test=32)
    )
    with pytest.raises(TextError, match="too little text"):
        run_search(wanted, quiet)


def test_a_teacher_of_other_blocks_is_refused(tmp_path: Path) -> None:
    other = teacher(tmp_path / "qwen", family="qwen3")
    with pytest.raises(DistillUsageError, match="qwen3 blocks"):
        run_search(recipe(other, tmp_path / "out"), quiet)


def test_a_teacher_with_nan_is_refused(tmp_path: Path) -> None:
    path = teacher(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelDamageError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
        run_search(recipe(path, tmp_path / "out"), quiet)


def test_a_variant_that_scores_nan_is_left_out_and_the_search_goes_on(model: Path, tmp_path: Path) -> None:
    """A learning rate that destroys what it trains: the closed form stays, or the variant is out."""
    wanted = recipe(model, tmp_path / "out")
    wild = replace(wanted, library=replace(wanted.library, lr=1e30, steps=2))
    done = run_search(wild, quiet)
    assert done is not None and done.children
    assert all(facts["loss"] == facts["start"] for facts in done.library.values() if "infeasible" not in facts)


def test_weights_keep_the_teachers_type(found: Found) -> None:
    own: Teacher = found.teacher
    child = found.children[0].decoder
    weights = weights_of(own, child, Store(Path(own.recipe.out) / "store"))
    assert weights.keys() == child.tensors().keys()
    assert {tensor.dtype for tensor in weights.values()} == {own.dtype}


def test_other_objectives_and_all_kinds_of_limits_at_once(found: Found) -> None:
    """The library and the scores are those of the first search; only the programme is another."""
    own = found.teacher.recipe
    budget = {"parameters": "85%", "memory": "90%", "latency": "300%", "first_token": "300%", "throughput": "10%"}
    wanted = replace(
        own, budget=budget, score=replace(own.score, objective="lm"), distill=Training(tokens=0, length=32)
    )
    done = run_search(wanted, quiet)
    assert done is not None
    totals = done.children[0].totals
    for limit in done.programme.budgets:
        assert totals[limit.name] <= limit.allowed * (1 + 1e-9)
    # the LM loss counts from the teacher's own
    teachers = Scorer(done.teacher, done.teacher.score).quality({}).lm
    quality = measure(load(open_blocks(done.children[0].path)), done.teacher.model, done.teacher.score)
    assert done.children[0].measured["lm"] == pytest.approx(quality.lm - teachers, abs=1e-5)


def test_the_recipe_that_was_used_is_kept(found: Found) -> None:
    own: Recipe = found.teacher.recipe
    kept = json.loads((Path(own.out) / "recipe.json").read_text())
    assert kept["library"] == own.to_json()["library"]
