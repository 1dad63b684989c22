# SPDX-License-Identifier: Apache-2.0
"""Weights of tokens, and data made of records: what is marked, what is learned, and what a bad line is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refound.adapters.data import Record, collate, read_records, split, window_sample
from refound.adapters.errors import DataError, TuneUsageError
from refound.adapters.fait import Fait, compare
from refound.adapters.losses import fait_hook, logits_of, static_weights, token_loss
from refound.adapters.transforms import Elastic, Lemma, Maker, SelfEvaluation, Transforms, split_at_error
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from ..export.models import write_tokenizer
from .families import FAMILIES

RIGHT = "def twice(x):\n    y = x + x\n    return y\n"
WRONG = "def twice(x):\n    y = x * x\n    return y\n"
PLAIN = Transforms()
RECORD = Record(
    where="a.jsonl:1", prompt="Write twice.\n", completion=RIGHT, wrong=WRONG, thinking="hm " * 30, another=True
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    return FAMILIES["llama"]().eval()


def maker(tokenizer: Tokenizer, transforms: Transforms = PLAIN, *, length: int = 128, **changes: Any) -> Maker:
    return Maker(tokenizer, transforms, eos=1, length=length, template="{prompt}", **{"pairs": False} | changes)


def words(tokenizer: Tokenizer, sample: Any, *, learned: bool) -> str:
    return tokenizer.decode(
        [one for one, learn in zip(sample.ids, sample.learn, strict=True) if learn == learned],
        skip_special_tokens=False,
    )


# --- weights -------------------------------------------------------------------------------------------------------


def test_without_weights_it_is_cross_entropy_and_weights_of_one_change_no_bit(tokenizer: Tokenizer, model: Any) -> None:
    samples = maker(tokenizer, pairs=True).samples([RECORD, replace(RECORD, completion="pass", wrong="")])
    batch = collate(samples, fill=1)
    plain = token_loss(model, batch)
    logits, mask = logits_of(model, batch)[:, :-1], batch.learn[:, 1:]
    assert torch.allclose(plain, cross_entropy(logits[mask], batch.ids[:, 1:][mask]), rtol=1e-6)
    ones = fait_hook(Fait(line=0, token=0, char=0))
    assert torch.equal(token_loss(model, batch, [ones, static_weights]), plain)
    assert torch.equal(token_loss(model, batch, [ones], normalize=False), plain)
    assert not torch.equal(token_loss(model, batch, [fait_hook(Fait())]), plain)


def test_filling_changes_nothing(tokenizer: Tokenizer, model: Any) -> None:
    short, long = maker(tokenizer).samples([replace(RECORD, completion="x = 1"), RECORD])
    alone = token_loss(model, collate([short], fill=1))
    both, second = token_loss(model, collate([short, long], fill=1)), token_loss(model, collate([long], fill=1))
    counts = [sum(one.learn[1:]) for one in (short, long)]
    assert torch.allclose(both, (counts[0] * alone + counts[1] * second) / sum(counts), rtol=1e-5)


def test_what_differs_is_marked_in_lines_tokens_and_characters(tokenizer: Tokenizer) -> None:
    right, wrong = tokenizer.encode(RIGHT), tokenizer.encode(WRONG)
    marks = compare(RIGHT, WRONG, right.offsets, right.ids, wrong.ids)

    def told(level: str) -> str:
        return "".join(RIGHT[a:b] for (a, b), on in zip(right.offsets, marks[level], strict=True) if on)

    assert told("line") == "    y = x + x\n" or told("line").strip() == "y = x + x"
    assert "+" in told("token") and len(told("token")) < 6
    assert told("char").strip() == "+"


@given(st.text(max_size=40), st.text(max_size=40))
def test_texts_that_are_equal_have_no_marks_and_others_have_some(one: str, other: str) -> None:
    spans, ids, others = [(i, i + 1) for i in range(len(one))], [ord(c) for c in one], [ord(c) for c in other]
    marks = compare(one, other, spans, ids, others)
    assert all(len(flags) == len(one) for flags in marks.values())
    for level in ("token", "char"):
        assert any(marks[level]) == (one != other and bool(one))


def test_weights_follow_the_model_and_fade_when_it_has_learned(tokenizer: Tokenizer) -> None:
    torch.manual_seed(2)
    model = FAMILIES["llama"]()
    batch = collate(maker(tokenizer, pairs=True).samples([RECORD]), fill=1)
    hook = fait_hook(Fait(line=0, char=0, token=1.0))

    def marked() -> float:
        with torch.no_grad():
            return float(hook(model, batch, logits_of(model, batch))[batch.marks["token"]].mean())

    before = marked()
    assert 1 < before < 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        token_loss(model, batch, [hook]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 1 <= marked() < 1.3 < before
    static = fait_hook(Fait(line=0, char=0, token=1.0, dynamic=False))
    assert set(static(model, batch, logits_of(model, batch)).unique().tolist()) == {1.0, 2.0}


# --- transforms ----------------------------------------------------------------------------------------------------


def test_only_completions_are_learned(tokenizer: Tokenizer) -> None:
    (sample,) = maker(tokenizer).samples([RECORD])
    assert words(tokenizer, sample, learned=False) == RECORD.prompt
    assert words(tokenizer, sample, learned=True) == RIGHT + "</s>"
    with pytest.raises(DataError, match=r"a\.jsonl:1: nothing of the completion is left within data\.length = 4"):
        maker(tokenizer, length=4).samples([RECORD])


def test_lemma_corrects_the_first_error(tokenizer: Tokenizer) -> None:
    assert split_at_error(RIGHT, WRONG) == (
        "def twice(x):\n    y = x * x\n",
        "    y = x + x\n    return y\n",
    )
    table = Lemma(enabled=True, mode="both", fix="[fix]", restart="[anew]")
    _, fixed, anew = maker(tokenizer, Transforms(lemma=table)).samples([RECORD])
    assert words(tokenizer, fixed, learned=False) == RECORD.prompt + "def twice(x):\n    y = x * x\n"
    assert words(tokenizer, fixed, learned=True) == "[fix]    y = x + x\n    return y\n</s>"
    assert words(tokenizer, anew, learned=True) == "[anew]" + RIGHT + "</s>"
    (_, learned) = maker(tokenizer, Transforms(lemma=replace(table, mode="fix", learn_error=True))).samples([RECORD])
    assert words(tokenizer, learned, learned=False) == RECORD.prompt


@pytest.mark.parametrize(
    ("right", "wrong", "error", "correction"),
    [
        ("a\nb\nc\n", "a\nc\n", "a\nc\n", "b\nc\n"),  # it lacks a line: the next one is out of place
        ("a\nc\n", "a\nb\nc\n", "a\nb\n", "c\n"),  # it has one too many
        ("a\nb\nc\n", "a\nb\n", "a\nb\n", "c\n"),  # it ends too early
        ("a\nb\n", "x\nb\n", "x\n", "a\nb\n"),
        ("b\nc\n", "c\nd\n", "c\n", "b\nc\n"),
    ],
)
def test_what_is_corrected_is_wrong(right: str, wrong: str, error: str, correction: str) -> None:
    assert split_at_error(right, wrong) == (error, correction)


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_an_error_ends_with_the_first_line_that_differs(rights: list[str], wrongs: list[str]) -> None:
    right, wrong = ("".join(f"{line}\n" for line in lines) for lines in (rights, wrongs))
    error, correction = split_at_error(right, wrong)
    assert wrong.startswith(error) and right.endswith(correction)
    if rights != wrongs:
        assert not right.startswith(error) or error == wrong, "a correction follows nothing that is right"


def test_self_evaluation_learns_one_token(tokenizer: Tokenizer) -> None:
    table = SelfEvaluation(enabled=True, question="?", yes="Y", no="N", weight=3)
    made = maker(tokenizer, Transforms(self_evaluation=table)).samples([RECORD, replace(RECORD, another=False)])
    assert [words(tokenizer, sample, learned=True) for sample in made[1::2]] == ["Y", "N"]
    assert made[1].weights[-1] == 3 and made[1].weights[0] == 1
    with pytest.raises(TuneUsageError, match="is 3 tokens of this tokenizer"):
        maker(tokenizer, Transforms(self_evaluation=replace(table, yes="§%")))


def test_thinking_is_cut_after_its_budget_and_only_its_own_end_is_learned(tokenizer: Tokenizer) -> None:
    table = Elastic(enabled=True, budgets=(4, 1000), opening="<", closing=">")
    cut, whole = maker(tokenizer, Transforms(elastic=table), length=400).samples([RECORD, RECORD])
    assert words(tokenizer, cut, learned=False) == RECORD.prompt + "<>"
    assert words(tokenizer, whole, learned=False) == RECORD.prompt + "<"
    assert words(tokenizer, whole, learned=True) == RECORD.thinking + ">" + RIGHT + "</s>"
    assert len(cut.ids) < len(whole.ids)


def test_an_answer_that_does_not_fit_behind_its_thinking_is_told(tokenizer: Tokenizer) -> None:
    table = Transforms(elastic=Elastic(enabled=True, budgets=(60,), opening="<", closing=">"))
    (whole,) = maker(tokenizer, table, length=400).samples([RECORD])
    assert maker(tokenizer, table, length=len(whole.ids)).samples([RECORD]) == [whole]
    with pytest.raises(DataError, match=r"a\.jsonl:1: the completion does not fit behind its thinking within data"):
        maker(tokenizer, table, length=len(whole.ids) - 1).samples([RECORD])


def test_what_is_cut_off_is_known(tokenizer: Tokenizer) -> None:
    (whole,) = maker(tokenizer).samples([RECORD])
    (cut,) = maker(tokenizer, length=len(whole.ids) - 1).samples([RECORD])
    assert not whole.truncated and cut.truncated


def test_the_content_of_a_sample_is_all_that_training_sees(tokenizer: Tokenizer) -> None:
    (one,) = maker(tokenizer, pairs=True).samples([RECORD])
    (other,) = maker(tokenizer, pairs=True).samples([replace(RECORD, wrong=WRONG.replace("*", "-"))])
    assert one.ids == other.ids and one.content() != other.content()


# --- lines ---------------------------------------------------------------------------------------------------------


def test_every_bad_line_is_told_with_its_number(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "a", "completion": "b", "wrong": "c"})
    lines = [good, "{", "[]", '{"prompt": "a"}', '{"prompt": "a", "completion": " "}', "", good, '{"prompt": 3}']
    lines += ['{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": "b", "wrong": "b"}']
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / "data.jsonl", needs=("wrong",))
    told = str(caught.value)
    assert "has 7 lines that cannot be used" in told and "and 1 more" in told
    for number, why in (
        (2, "is no JSON"),
        (3, "is no JSON object"),
        (4, "has no completion"),
        (5, "has an empty completion"),
        (8, "has a prompt that is no text: 3"),
        (9, "is unpaired: it has no wrong"),
    ):
        assert f"line {number} {why}" in told
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="is empty"):
        read_records(tmp_path / "empty.jsonl")


@given(st.integers(2, 200), st.integers(1, 50))
def test_held_out_samples_are_held_out(count: int, held_out: int) -> None:
    learned, kept = split(count, held_out)
    assert sorted([*learned, *kept]) == list(range(count))
    assert len(kept) == min(held_out, count - 1)


def test_a_window_is_learned_whole() -> None:
    batch = collate([window_sample([1, 2, 3]), window_sample([4, 5])], fill=0)
    assert batch.learn.tolist() == [[True, True, True], [True, True, False]]
    assert batch.attention.sum() == 5 and batch.wrong is None
