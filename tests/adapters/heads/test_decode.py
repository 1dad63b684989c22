# SPDX-License-Identifier: Apache-2.0
"""Whatever is guessed, by whatever drafter, greedy decoding says the very tokens of the model alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.adapters.heads.cached import CachedModel
from refound.adapters.heads.decode import Decoded, Drafter, NoDraft, Proposal, Typical, decode, decode_plain, pick
from refound.adapters.heads.decode_draft import DynamicTreeDraft, ModelDraft
from refound.adapters.heads.decode_lookup import LookupDraft
from refound.adapters.heads.decode_medusa import MedusaDraft
from refound.adapters.heads.decode_self import SelfDraft
from refound.adapters.heads.decode_tree import Shape, Tree, best_shape, chain
from refound.adapters.heads.errors import HeadsMismatchError, HeadsUsageError
from refound.adapters.heads.gates import GateStopper, make_gate
from refound.adapters.heads.states import final_states
from refound.distill.models import build, load, open_blocks
from refound.export.medusa import MedusaHead, MedusaHeads
from transformers import AutoModelForCausalLM

from ...export.models import VOCAB, decoder, weights
from .small import Adversary, folder, model, surely

NEW = 12
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20)


def own_draft(of: CachedModel) -> CachedModel:
    """The same model once more: every guess is right."""
    return CachedModel(of.model)


def other_draft(of: CachedModel) -> CachedModel:
    return CachedModel(model("small", 3, of.dtype).model)


def random_heads(of: CachedModel) -> MedusaHeads:
    draw = torch.Generator().manual_seed(1)
    output = of.model.lm_head.weight

    def head(number: int) -> MedusaHead:
        matrix = torch.randn(output.shape[1], output.shape[1], generator=draw, dtype=of.dtype)
        return MedusaHead(weights=(matrix,), biases=(), output=output.roll(number, 0))

    return MedusaHeads(heads=tuple(head(number) for number in range(3)))


DRAFTERS: dict[str, Callable[[CachedModel], Drafter]] = {
    "none": lambda _: NoDraft(),
    "lookup": lambda _: LookupDraft(ngram=2, length=5),
    "the model itself": lambda of: ModelDraft(own_draft(of), length=3),
    "another model": lambda of: ModelDraft(other_draft(of), length=4, confidence=0.2),
    "dynamic tree, the model itself": lambda of: DynamicTreeDraft(own_draft(of), budget=7, depth=3),
    "dynamic tree, another model": lambda of: DynamicTreeDraft(other_draft(of), budget=9, depth=4, threshold=0.01),
    "first layer": lambda _: SelfDraft(1, length=3),
    "first layers, timid": lambda _: SelfDraft(2, length=6, confidence=0.3),
    "Medusa in bfloat16": lambda of: MedusaDraft(random_heads(of).to(torch.bfloat16), best_shape([[0.5, 0.2]] * 3, 5)),
    "Medusa": lambda of: MedusaDraft(random_heads(of), best_shape([[0.5, 0.2, 0.1]] * 3, 9)),
}


@pytest.mark.parametrize("kind", ["llama", "mixed"])
@pytest.mark.parametrize("name", DRAFTERS)
@given(prompt=PROMPTS)
@settings(max_examples=4, deadline=None)
def test_greedy_tokens_are_those_of_the_model_alone(name: str, kind: str, prompt: list[int]) -> None:
    of = model(kind)
    found = decode(of, prompt, DRAFTERS[name](of), new_tokens=NEW)
    assert found.tokens == surely(of, prompt, NEW)
    assert sum(found.accepted) + len(found.accepted) + 1 >= NEW


@pytest.mark.parametrize("name", [*DRAFTERS, "too deep"])
@pytest.mark.parametrize("new_tokens", [1, 2, 6])
def test_up_to_the_last_position_of_the_model(name: str, new_tokens: int) -> None:
    """Trees may not be deeper than what is left, whoever guesses them."""
    of, prompt = model(), [(7 * at) % VOCAB for at in range(256 - new_tokens)]
    truth = surely(of, prompt, new_tokens)
    for seed in range(5 if name == "too deep" else 1):
        drafter = DRAFTERS[name](of) if name in DRAFTERS else Adversary(truth, seed)
        assert decode(of, prompt, drafter, new_tokens=new_tokens).tokens == truth


def test_a_draft_of_fewer_positions_guesses_as_long_as_it_has_some() -> None:
    of = model()
    told = decoder(layers=3)
    short = CachedModel(build(replace(told, max_positions=16), weights(told), dtype=torch.float64).double())
    prompt = [5, 6, 7]
    truth = surely(of, prompt, 24)
    for drafter in (ModelDraft(short, length=3), DynamicTreeDraft(short, budget=7, depth=3)):
        found = decode(of, prompt, drafter, new_tokens=24)
        assert found.tokens == truth and sum(found.guessed) > 0 and found.guessed[-1] == 0


@given(prompt=PROMPTS, seed=st.integers(0, 2**32), kind=st.sampled_from(["llama", "mixed"]))
@settings(max_examples=25, deadline=None)
def test_whatever_is_guessed(prompt: list[int], seed: int, kind: str) -> None:
    of = model(kind)
    truth = surely(of, prompt, NEW)
    assert decode(of, prompt, Adversary(truth, seed), new_tokens=NEW).tokens == truth


def test_drafters_that_are_right_save_passes() -> None:
    of, prompt = model(), [5, 6, 7]
    for drafter, least in ((ModelDraft(own_draft(of), length=3), 2.8), (Adversary(surely(of, prompt, 40), 1), 0.3)):
        found = decode(of, prompt, drafter, new_tokens=24)
        assert sum(found.accepted) / len(found.accepted) >= least
        assert len(found.accepted) < 20 and found.tokens_a_pass > 1.3
    own = DynamicTreeDraft(own_draft(of), budget=30, depth=3, threshold=0.0, width=6)
    decode(of, prompt, own, new_tokens=24)
    assert 1 < own.expected <= 4


def test_in_float32_as_transformers_says_it() -> None:
    """Fixed prompts: with rounding, a token whose lead is as small as that may be decided otherwise."""
    of = model("llama", 0, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    for seed in range(3):
        prompt = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(seed))
        told = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
        wanted = told[0, 9:].tolist()
        for drafter in DRAFTERS.values():
            found = decode(of, prompt[0].tolist(), drafter(of), new_tokens=24, eos=[1])
            assert list(found.tokens) == wanted


def test_equal_logits_are_decided_alike_by_every_pass() -> None:
    """Each row of the output matrix comes three times, so every largest logit is a tie."""
    told = decoder(layers=3)
    made = weights(told)
    made["lm_head.weight"] = made["lm_head.weight"][: VOCAB // 3].repeat(3, 1)
    of = CachedModel(build(told, made, dtype=torch.float32))
    plain = decode_plain(of, [3, 1, 4], new_tokens=NEW)
    assert max(plain.tokens) < VOCAB // 3
    for drafter in DRAFTERS.values():
        assert decode(of, [3, 1, 4], drafter(of), new_tokens=NEW).tokens == plain.tokens
    truth = plain.tokens
    assert all(decode(of, [3, 1, 4], Adversary(truth, s), new_tokens=NEW).tokens == truth for s in range(20))


def test_the_lowest_of_tied_tokens_is_picked() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0 + 5e-6, 1.0], [3.0, 3.0, 3.0, 3.1], [2.0, 2.0 + 5e-6, -100.0, 0.0]])
    assert pick(logits).tolist() == [1, 3, 0]
    assert pick(logits.double()).tolist() == [2, 3, 1]


@given(prompt=PROMPTS, at=st.integers(0, NEW - 1))
@settings(max_examples=8, deadline=None)
def test_it_ends_at_the_end_token_and_with_it(prompt: list[int], at: int) -> None:
    of = model()
    truth = surely(of, prompt, NEW)
    end = truth[at]
    wanted = truth[: truth.index(end) + 1]
    for drafter in (NoDraft(), ModelDraft(own_draft(of)), Adversary(truth, at)):
        assert decode(of, prompt, drafter, new_tokens=NEW, eos=[end]).tokens == wanted


@given(prompt=PROMPTS, seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_a_tree_is_what_its_paths_are_one_by_one(prompt: list[int], seed: int) -> None:
    of = model("mixed")
    tree = Adversary([1, 2, 3], seed).propose(prompt, torch.empty(0), 9).tree
    with torch.no_grad():
        of.reset()
        of.run(prompt, range(-1, len(prompt) - 1))
        of.keep(range(len(prompt)))
        together = of.logits(of.run(tree.tokens, tree.parents))
        of.cut(len(prompt))
        for node in range(len(tree.tokens)):
            path = [node]
            while tree.parents[path[0]] >= 0:
                path.insert(0, tree.parents[path[0]])
            whole = [*prompt, *(tree.tokens[step] for step in path)]
            alone = of.model(input_ids=torch.tensor([whole])).logits[0, -1]
            assert torch.allclose(together[node], alone, atol=1e-9)


def test_what_was_kept_of_a_tree_is_a_text() -> None:
    of = model()
    with torch.no_grad():
        of.reset()
        of.run([9, 8], [-1, 0])
        of.keep([0, 1])
        of.run([7, 6, 5, 4], [-1, 0, 0, 2])
        of.keep([0, 2, 3])
        found = of.logits(of.run([3], [-1]))[0]
        wanted = of.model(input_ids=torch.tensor([[9, 8, 7, 5, 4, 3]])).logits[0, -1]
    assert torch.allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("kind", ["mlp", "gru"])
@given(prompt=PROMPTS, seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_a_text_stops_at_the_same_token_however_it_is_decoded(kind: str, prompt: list[int], seed: int) -> None:
    """A gate that is random, and sure at one token in three or so."""
    torch.manual_seed(seed)
    of, gate = model(), make_gate(kind, 64, 8).double()
    plain = decode_plain(of, prompt, new_tokens=NEW)
    with torch.no_grad():  # as thresholds are chosen: over the whole text, the prompt with it
        states = final_states(of.model, torch.tensor([[*prompt, *plain.tokens[:-1]]]))
        scores = gate(states)[0].sigmoid()[0, len(prompt) - 1 :].tolist()
    threshold = sorted(scores)[-len(scores) // 3]
    at = next(index for index, score in enumerate(scores) if score >= threshold)
    stopper = GateStopper(gate, threshold - 1e-9)
    for drafter in (NoDraft(), ModelDraft(own_draft(of)), Adversary(plain.tokens, seed)):
        assert decode(of, prompt, drafter, new_tokens=NEW, stopper=stopper).tokens == plain.tokens[:at]


# --- typical acceptance ----------------------------------------------------------------------------------------------


def typical(logits: Sequence[Sequence[float]], tree: Tree, **settings: float) -> tuple[list[int], int]:
    return Typical(**settings).walk(tree, torch.tensor(logits))  # type: ignore[arg-type]


def test_typical_acceptance_takes_the_longest_path_that_is_likely_enough() -> None:
    # by 0: tokens 1 and 2 with 0.5 each; by 1: token 3 for sure; by 2: token 0 for sure
    logits = [[-99, 0, 0, -99], [-99, -99, -99, 9], [9, -99, -99, -99], [9, -99, -99, -99.0]]
    tree = Tree(tokens=(0, 1, 2, 3), parents=(-1, 0, 0, 1))
    assert typical(logits, tree) == ([0, 1, 3], 0)  # 2 is as likely as 1, but nothing follows it
    turned = [logits[node] for node in (0, 2, 1, 3)]
    assert typical(turned, Tree(tokens=(0, 2, 1, 3), parents=(-1, 0, 0, 2)))[0] == [0, 2, 3]
    # 0.4 and 0.6 have an entropy of 0.673, so the threshold is delta * 0.51
    uneven = [[-99, log(0.4), log(0.6), -99], *logits[1:]]
    assert typical(uneven, tree, epsilon=1, delta=1)[0] == [0, 2]
    assert typical(uneven, tree, epsilon=1, delta=0.7)[0] == [0, 1, 3]
    assert typical(uneven, tree, epsilon=0.3, delta=1)[0] == [0, 1, 3]


def test_typical_decoding_says_only_what_is_typical() -> None:
    of, rule = model(), Typical(epsilon=0.2, delta=0.5, seed=3)
    found = decode(of, [4, 2], DynamicTreeDraft(own_draft(of), budget=9, width=3), new_tokens=20, acceptance=rule)
    whole = torch.tensor([[4, 2, *found.tokens]])
    with torch.no_grad():
        logs = of.model(input_ids=whole).logits[0, 1:-1].log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    said = logs.exp().gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    least = (0.5 * (-entropy).exp()).clamp(max=0.2)
    assert ((said > least) | (said == logs.exp().max(-1).values)).all()
    again = decode(of, [4, 2], NoDraft(), new_tokens=20, acceptance=Typical(epsilon=0.2, delta=0.5, seed=3))
    assert len(again.tokens) == 20
    assert sum(found.accepted) > 0


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"delta": 2.0}, {"temperature": 0.0}])
def test_a_threshold_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(HeadsUsageError, match="typical acceptance"):
        Typical(**wrong)  # type: ignore[arg-type]


# --- trees and mistakes ----------------------------------------------------------------------------------------------


def test_lookup_guesses_what_followed_before() -> None:
    drafter, nothing = LookupDraft(ngram=2, length=3), torch.empty(0)
    drafter.start(model(), [1, 2, 3, 4, 5, 9, 2, 3])
    found = drafter.propose([1, 2, 3, 4, 5, 9, 2, 3], nothing, 9)
    assert found == Proposal(tree=chain([3, 4, 5, 9]))
    assert drafter.propose([1, 2, 3, 4, 5, 9, 2, 3, 7], nothing, 9).tree.tokens == (7,)
    assert drafter.propose([1, 2, 3, 4, 5, 9, 2, 3, 7, 2, 3], nothing, 9).tree.tokens == (3, 7, 2, 3)
    assert drafter.propose([1, 2, 3, 4, 5, 9, 2, 3, 7, 2, 3], nothing, 1).tree.tokens == (3,)


def test_a_draft_of_another_tokenizer_and_a_layer_that_is_not_there() -> None:
    of = model()
    other = decoder(layers=1, vocab_size=VOCAB + 2)
    foreign = CachedModel(build(other, weights(other), dtype=torch.float64).double())
    with pytest.raises(HeadsMismatchError, match="vocabulary has 386 tokens and the model's 384"):
        decode(of, [1], ModelDraft(foreign), new_tokens=3)
    heads = MedusaHeads(heads=(MedusaHead(weights=(), biases=(), output=torch.zeros(9, 64)),))
    with pytest.raises(HeadsMismatchError, match=r"\[9, 64\] and the model's \[384, 64\]"):
        decode(of, [1], MedusaDraft(heads, Shape()), new_tokens=3)
    with pytest.raises(HeadsUsageError, match="after 1 to 2 of them, not 3"):
        decode(of, [1], SelfDraft(3), new_tokens=3)
    with pytest.raises(HeadsUsageError, match="a prompt of at least one token"):
        decode(of, [], NoDraft(), new_tokens=3)
    with pytest.raises(HeadsUsageError, match="256 positions"):
        decode(of, [1] * 250, NoDraft(), new_tokens=12)
    assert decode(of, [1] * 250, NoDraft(), new_tokens=6).tokens


def test_the_model_is_not_tired_by_a_mistake() -> None:
    of = CachedModel(load(open_blocks(folder()), dtype=torch.float64))
    with pytest.raises(HeadsUsageError):
        decode(of, [1] * 257, NoDraft(), new_tokens=1)
    found = decode_plain(of, [1, 2], new_tokens=4)
    assert isinstance(found, Decoded) and found.tokens == surely(of, [1, 2], 4)
