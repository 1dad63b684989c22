# SPDX-License-Identifier: Apache-2.0
"""Recipes: read, overridden, and refused with every mistake at once."""

from pathlib import Path

import pytest
from refound.nas.budget import Limit, amount_text, parse_limits, row_limit
from refound.nas.errors import RecipeError
from refound.nas.recipe import Recipe, Workload, read_recipe

GOOD = """
teacher = "somewhere"
[text]
sources = ["python-docs"]
[[costs.workloads]]
name = "chat"
prompt = 64
[[costs.workloads]]
name = "long"
prompt = 512
batch = 4
[budget]
parameters = "70%"
latency.chat = "80%"
memory.long = "300 MB"
[toy]
text.train = 4096
budget.parameters = "50%"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_is_read_and_settings_go_over_it(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    found = read_recipe(path, ["text.train=8192", "out=runs/x", "budget.latency.chat=50%", "space.kv_heads=[1]"])
    assert found.teacher == "somewhere" and found.out == "runs/x" and found.text.train == 8192
    assert found.costs.workloads[1] == Workload(name="long", prompt=512, batch=4)
    assert found.budget == {"parameters": "70%", "latency.chat": "50%", "memory.long": "300 MB"}
    assert found.space.kv_heads == (1,)
    toy = read_recipe(path, toy=True)
    assert toy.text.train == 4096 and toy.budget["parameters"] == "50%" and toy.budget["latency.chat"] == "80%"


def test_every_mistake_is_told_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    text = GOOD.replace("sources", "source") + '[solver]\npool = "many"\n[library]\nstep = 3\n'
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(tmp_path, text), ["nonsense", "score.probe=1", "budget.latncy.chat=80%"])
    told = str(caught.value)
    for words in (
        "unknown key text.source; did you mean 'sources'?",
        "solver.pool is 'many'; a int is wanted",
        "unknown key library.step; did you mean 'steps'?",
        "'nonsense' is not of the form a.b=value",
        "unknown key score.probe; did you mean 'probes'?",
        "budget.latncy.chat is none of parameters, active, memory, latency, first_token, throughput, did you mean",
        "did you mean 'latency'?",
    ):
        assert words in told


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("budget.latncy.chat=80%", "did you mean 'latency'"),
        ("budget.latency.caht=80%", "did you mean 'chat'"),
        ("budget.latency=80%", "names no workload of chat, long"),
        ("budget.memory.chat=10 apples", "wants a number with %, or one of b, kb, mb"),
        ("budget.parameters=-3", "wants a number"),
        ("budget.parameters=0%", "must be positive"),
        ("space.ffn_percent=[120]", "each lies between 0 and 100"),
        ("text.score=3", "less than one window"),
        ("score.objective=bleu", "none of kl, lm, cosine"),
        ("distill.lr=0", "distill.lr is 0.0; it must be positive"),
        ("solver.pool=0", "solver.pool is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, setting: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(tmp_path, GOOD), [setting])
    assert says in str(caught.value)


def test_a_file_that_is_none_and_a_toy_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "nothing.toml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(write(tmp_path, "a = ["))
    with pytest.raises(RecipeError, match=r"no \[toy\] table"):
        read_recipe(write(tmp_path, "teacher = 'x'"), toy=True)


def test_the_shipped_recipe_is_one(root: Path) -> None:
    for toy in (False, True):
        assert read_recipe(root / "recipes" / "smollm2.toml", toy=toy).teacher == "smollm2-135m"


def test_limits_are_read_in_the_units_people_use() -> None:
    texts = {
        "parameters": "90M",
        "memory.chat": "1 GiB",
        "latency.chat": "120 ms",
        "first_token.chat": "0.5s",
        "throughput.chat": "150%",
    }
    found = parse_limits(texts, ["chat"])
    assert [limit.value for limit in found] == [90e6, 2**30, pytest.approx(0.12), 0.5, 150]
    assert found[-1] == Limit(quantity="throughput", workload="chat", value=150, percent=True)
    assert parse_limits({"latency": "80%"}, ["chat"])[0].workload == "chat"


def test_a_throughput_is_a_latency() -> None:
    workload = Workload(name="chat", batch=2, new=50)
    percent = Limit(quantity="throughput", workload="chat", value=200, percent=True)
    assert row_limit(percent, 3.0, workload) == 1.5
    rate = Limit(quantity="throughput", workload="chat", value=25, percent=False)
    assert row_limit(rate, 3.0, workload) == 4.0  # 100 tokens at 25 a second
    assert row_limit(Limit(quantity="latency", workload="chat", value=50, percent=True), 3.0, workload) == 1.5


def test_amounts_are_told_as_people_read_them() -> None:
    assert amount_text("parameters", 90_123_456) == "90.12M"
    assert amount_text("memory", 3e8) == "300.00 MB"
    assert amount_text("latency", 0.0123) == "12.30 ms"


def test_the_resolved_recipe_is_plain_json() -> None:
    assert Recipe().to_json()["solver"]["gap"] == 1e-4
