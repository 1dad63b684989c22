# SPDX-License-Identifier: Apache-2.0
"""Bits for each expert: the best of all choices, and harm that is what rounding really does."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.export.engines import ENGINES
from refound.nas.serving.bits import bytes_of, plan_bits, servable
from refound.nas.serving.errors import CapacityError, PlanError
from refound.nas.serving.expert_store import StreamConfig
from refound.nas.serving.sensitivity import divergences, measure_harm, rounded
from refound.nas.serving.streaming import open_streamed

from ...export.models import decoder, write_model

WIDTHS = (2, 4, 32)
IDS = torch.randint(0, 384, (4, 24), generator=torch.Generator().manual_seed(0))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 20), min_size=8, max_size=8), st.sampled_from([3.0, 4.0, 5.0, 9.0, 20.0, 40.0]))
def test_the_plan_is_the_best_of_all_choices(numbers: list[int], mean_bits: float) -> None:
    """2 layers of 2 experts at 3 widths, harm falling with bits."""
    fall = np.array(numbers, float).reshape(2, 2, 2)
    harm = np.concatenate([fall[..., ::-1].cumsum(-1)[..., ::-1], np.zeros((2, 2, 1))], axis=2)
    sizes = np.array([bytes_of(width, 64, 32) for width in WIDTHS])
    best = min(
        sum(harm.reshape(4, 3)[item, option] for item, option in enumerate(choice))
        for choice in product(range(3), repeat=4)
        if sizes[list(choice)].sum() <= mean_bits / 8 * 64 * 4
    )
    found = plan_bits(harm, WIDTHS, parameters=64, mean_bits=mean_bits)
    assert found.harm == pytest.approx(best) and found.proven
    assert found.harm <= found.baseline_harm + 1e-9 and found.mean_bits <= mean_bits
    # what it is held against fills the bytes as far as whole experts do, without looking at harm
    spent = [bytes_of(width, 64, 32) for width in found.baseline.ravel().tolist()]
    place = [WIDTHS.index(width) for width in found.baseline.ravel().tolist()]
    left = mean_bits / 8 * 64 * 4 - sum(spent)
    wider = np.diff(sizes)[min(place)] if min(place) < 2 else np.inf
    assert 0 <= left < wider and max(place) - min(place) <= 1 and place == sorted(place, reverse=True)
    layers = plan_bits(harm, WIDTHS, parameters=64, mean_bits=mean_bits, granularity="layer")
    assert (layers.bits == layers.bits[:, :1]).all() and layers.harm >= found.harm - 1e-9


def test_eight_bits_are_not_held_against_four() -> None:
    """At 8 bits a weight with scales 8.5 does not fit, and nearly all experts can have it nevertheless."""
    harm = np.tile(np.array([4.0, 2.0, 1.0, 0.1, 0.0]), (4, 8, 1))
    found = plan_bits(harm, (2, 3, 4, 8, 16), parameters=1024, mean_bits=8)
    assert (found.baseline == 8).sum() == 28 and (found.baseline == 4).sum() == 4
    assert found.baseline_harm < harm[:, :, 2].sum() / 2


def test_an_expert_that_no_token_took_is_not_the_one_that_bears_most(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", decoder("mixtral", layers=2))
    harm = measure_harm(path, IDS[:1, :1], (2, 4))  # one token takes 2 of 4 experts
    assert (harm[:, :, 0] > 0).all()
    for layer in harm[:, :, 0]:
        unseen = [value for value in layer if (layer == value).sum() == 2]
        assert len(unseen) == 2 and unseen[0] == pytest.approx(layer.mean())


def test_bits_that_cannot_be_are_refused() -> None:
    harm = np.zeros((2, 2, 3))
    with pytest.raises(CapacityError, match=r"fewer than the narrowest width takes with its scales \(2\.5\)"):
        plan_bits(harm, WIDTHS, parameters=64, mean_bits=2.4)
    with pytest.raises(PlanError, match="ascending"):
        plan_bits(harm, (4, 2, 32), parameters=64, mean_bits=8)
    with pytest.raises(PlanError, match="finite"):
        plan_bits(harm + np.inf, WIDTHS, parameters=64, mean_bits=8)


def test_rounding_is_as_near_as_its_bits_allow() -> None:
    weight = torch.randn(8, 80, generator=torch.Generator().manual_seed(0))
    errors = [(rounded(weight, bits) - weight).abs().max().item() for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.03
    assert torch.equal(rounded(torch.zeros(2, 5), 2), torch.zeros(2, 5))
    values = rounded(weight, 3)[0, :32].unique()
    assert len(values) <= 8  # one scale, three bits


def test_harm_is_what_rounding_an_expert_does_to_its_layer(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", decoder("mixtral", layers=2))
    harm = measure_harm(path, IDS, (2, 4, 8))
    assert harm.shape == (2, 4, 4) and (harm[:, :, 3] == 0).all()
    assert (np.diff(harm, axis=2) < 0).all()
    # by hand: the first layer's output with expert 2 rounded to 2 bits, against the output with it as it is
    with open_streamed(path, StreamConfig(device_slots=4, host_slots=8, read_ahead=0)) as (model, store):
        seen: list[torch.Tensor] = []
        model.model.layers[0].mlp.experts.register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
        with torch.no_grad():
            model(IDS)
            for weight in store.get((0, 2)):
                weight.copy_(rounded(weight, 2))  # in its device slot: all four experts of the layer stay there
            model.model.layers[1].mlp.experts.forward = lambda hidden, *_: hidden  # so that they are not given up
            model(IDS)
    wanted = (seen[1] - seen[0]).double().square().sum() / seen[0].double().square().sum()
    assert harm[0, 2, 0] == pytest.approx(float(wanted), rel=1e-4)


def test_fewer_bits_diverge_more(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", decoder("qwen3_moe", layers=2))
    plans = [np.full((2, 4), width) for width in (32, 8, 4, 2)]
    same, eight, four, two = divergences(path, IDS, plans, 32)
    assert same == 0 and 0 < eight < four < two


def test_engines_say_how_they_serve_bits_or_why_not() -> None:
    with_experts = ENGINES.keys() - {"onnxruntime"}
    mixed, layers = servable(np.array([[4, 8], [4, 4]])), servable(np.array([[4, 4], [8, 8]]))
    alike, whole = servable(np.full((2, 2), 4)), servable(np.full((2, 2), 16))
    for name in with_experts:
        assert mixed[name].startswith("no: experts of one layer differ")
        assert "layers differ" in layers[name]
        assert whole[name].startswith("yes, nothing is rounded")
    assert "--quantize q4_k" in alike["llama.cpp"] and alike["vllm"].startswith("no: refound export writes no experts")
    assert {told["onnxruntime"] for told in (mixed, layers, alike, whole)} == {
        "no: its builder does not know that architecture"
    }
