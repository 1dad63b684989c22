# SPDX-License-Identifier: Apache-2.0
"""Pre-gating: causal, trained by turns with the experts, proven as it is read, and scheduled by."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from refound.cli import main
from refound.distill.config import Training
from refound.distill.errors import TextError
from refound.export.directory import open_directory
from refound.export.errors import OutputExistsError
from refound.nas.moe.carve import run_carve
from refound.nas.moe.errors import CarveUsageError, LayoutError, MoeError, TraceError
from refound.nas.moe.hearing import gate_choice, oracle_energy
from refound.nas.moe.module import load_carved, mixtures
from refound.nas.moe.pregate import (
    PreGate,
    PreGateShape,
    agreement,
    pregate_loss,
    read_sidecar,
    start,
    write_sidecar,
)
from refound.nas.moe.pregating import pregated, run_pregating
from refound.nas.moe.pregating_config import PreGateConfig
from refound.nas.moe.scheduler import Scheduler
from refound.nas.moe.trace import model_sha256

from .small import config, dense

SHAPE = PreGateShape(vocab_size=50, layers=3, experts=4, top_k=2, size=32)


def quiet(_: str) -> None:
    pass


def ids(rows: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the model ---------------------------------------------------------------------------------------------------


def test_it_is_causal() -> None:
    model, one = start(SHAPE, torch.randn(50, 64), seed=0), ids()
    other = one.clone()
    other[:, 7:] = ids(seed=1)[:, 7:]
    first, second = model(one), model(other)
    assert first.shape == (4, 12, 3, 4)
    assert torch.allclose(first[:, :7], second[:, :7], atol=1e-5)
    assert not torch.allclose(first[:, 7:], second[:, 7:], atol=1e-3)


def test_it_starts_from_the_principal_directions_of_the_embedding() -> None:
    embedding = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) @ torch.randn(8, 64)
    first = start(replace(SHAPE, size=16), embedding, seed=0).embedding.weight
    centred = embedding - embedding.mean(0)
    apart, wanted = torch.cdist(first, first), torch.cdist(centred, centred)
    assert torch.allclose(apart / apart.max(), wanted / wanted.max(), atol=1e-3)
    assert torch.equal(first, start(replace(SHAPE, size=16), embedding, seed=0).embedding.weight)


def test_it_learns_which_experts_a_token_takes() -> None:
    """Experts that follow from the token and the one before it: what no table of tokens knows."""
    model, windows = start(SHAPE, torch.randn(50, 64), seed=0), ids(64, 16)
    before = torch.nn.functional.pad(windows, (1, 0))[:, :-1]
    best = (windows % 2 + 2 * (before % 2))[..., None].expand(-1, -1, 3)
    energy = torch.nn.functional.one_hot(best, 4) * 0.9 + 0.025
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = pregate_loss(model(windows), energy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agreement(model(windows)[:, 1:].topk(1).indices, best[:, 1:, :, None]) > 0.95


def test_agreement_counts_the_wanted_that_were_found() -> None:
    assert agreement(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 2], [3, 2]])) == 0.75


@pytest.mark.parametrize("change", [{"size": 30}, {"heads": 0}, {"top_k": 5}, {"layers": -1}, {"size": True}])
def test_shapes_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(MoeError, match="cannot be so"):
        PreGate(replace(SHAPE, **change))


# --- the sidecar -------------------------------------------------------------------------------------------------


def test_a_sidecar_comes_back(tmp_path: Path) -> None:
    model = start(SHAPE, torch.randn(50, 64), seed=0)
    write_sidecar(tmp_path, model, of="ab" * 32, facts={"measured": 1})
    found = read_sidecar(tmp_path, of="ab" * 32)
    assert torch.equal(found.choice(ids()), model.choice(ids()))
    with pytest.raises(TraceError, match="the experts of another model"):
        read_sidecar(tmp_path, of="cd" * 32)


@pytest.mark.parametrize("what", ["byte", "gone", "format", "shape", "huge", "list"])
def test_a_damaged_sidecar_is_refused(tmp_path: Path, what: str) -> None:
    write_sidecar(tmp_path, start(SHAPE, torch.randn(50, 64), seed=0), of="ab" * 32, facts={})
    weights, facts = tmp_path / "pregate.safetensors", tmp_path / "pregate.json"
    told = json.loads(facts.read_text())
    if what == "byte":
        body = bytearray(weights.read_bytes())
        body[-3] ^= 1
        weights.write_bytes(body)
    elif what == "gone":
        weights.unlink()
    elif what == "list":
        facts.write_text("[]")
    else:
        told |= {"format": "x"} if what == "format" else {}
        told["shape"] |= {"shape": {"layers": 4}, "huge": {"vocab_size": 1 << 40}}.get(what, {})
        facts.write_text(json.dumps(told))
    with pytest.raises(TraceError, match="no sound pre-gating model"):
        read_sidecar(tmp_path)


# --- by turns with the experts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PreGateConfig:
    folder = tmp_path_factory.mktemp("pregate")
    model = dense(folder / "dense")
    carved = run_carve(config(model, folder / "carved"), quiet).path
    return PreGateConfig(
        model=carved,
        dense=model,
        out=folder / "out",
        tokens=2048,
        length=32,
        rounds=2,
        steps=50,
        size=32,
        training=Training(tokens=384, length=32, batch=4, lr=3e-4, save_every=1),
        held_out=8,
    )


@pytest.fixture(scope="module")
def found(made: PreGateConfig) -> Any:
    return run_pregating(made, quiet)


def test_it_agrees_more_than_by_chance_and_says_so_truly(made: PreGateConfig, found: Any) -> None:
    assert found.oracle > found.chance + 0.1 and len(found.rounds) == 2
    child, sidecar = load_carved(open_directory(made.out)), read_sidecar(made.sidecar, of=model_sha256(made.out))
    test = torch.from_numpy(np.asarray(_test_windows(made)))
    with pregated(child, sidecar):
        oracle = oracle_energy(child, test).topk(2, dim=-1).indices
    assert agreement(sidecar.choice(test), oracle) == pytest.approx(found.oracle, abs=1e-6)
    told = json.loads((made.out / "refound.json").read_text())
    assert told["pregated"]["oracle"] == found.oracle
    assert not list(made.out.glob("pregate*"))  # engines load every *.safetensors that they find


def _test_windows(made: PreGateConfig) -> Any:
    from refound.distill.texts import open_tokenizer, pack

    tokenizer = open_tokenizer(made.dense)
    return pack(made.sources, "test", tokenizer=tokenizer, eos=1, count=made.held_out, length=made.length)


def test_with_its_own_choice_forced_a_model_computes_the_same(made: PreGateConfig) -> None:
    child = load_carved(open_directory(made.model))
    windows = torch.from_numpy(_test_windows(made))[:2]
    with torch.no_grad():
        wanted, own = child(input_ids=windows).logits, gate_choice(child, windows)
        for index, mixture in enumerate(mixtures(child)):
            mixture.forced = own[:, :, index]
        assert torch.allclose(child(input_ids=windows).logits, wanted, atol=1e-5)
        mixtures(child)[0].forced = (own[:, :, 0] + 1) % 6
        assert not torch.allclose(child(input_ids=windows).logits, wanted, atol=1e-3)


def test_oracle_energy_is_that_of_the_experts_outputs(made: PreGateConfig) -> None:
    mixture = mixtures(load_carved(open_directory(made.model)))[0]
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    energy = mixture.output_energy(hidden)
    part = slice(16, 32)
    inner = torch.nn.functional.silu(hidden @ mixture.gate[part].T) * (hidden @ mixture.up[part].T)
    assert torch.allclose(energy[:, 1], (inner @ mixture.down[:, part].T).square().sum(1), rtol=1e-4)


@pytest.mark.parametrize(
    "at",
    [
        "round 2: experts, step 2",
        pytest.param("round 1: gates, step 50", marks=pytest.mark.campaign),
        pytest.param("round 1: experts, step 3", marks=pytest.mark.campaign),
    ],
)
def test_cut_off_it_goes_on_to_the_same_bytes(made: PreGateConfig, found: Any, tmp_path: Path, at: str) -> None:
    class CutOff(Exception):
        pass

    def say(line: str) -> None:
        if line.startswith(at):
            raise CutOff

    other = replace(made, out=tmp_path / "out")
    with pytest.raises(CutOff):
        run_pregating(other, say)
    assert not other.out.exists()
    assert run_pregating(other, quiet).oracle == found.oracle
    for one, two in ((other.out, made.out), (other.sidecar, made.sidecar)):
        for file in two.glob("*.safetensors"):
            assert file.read_bytes() == (one / file.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.pregate"]


def test_the_same_run_is_done_once(made: PreGateConfig, found: Any) -> None:
    said: list[str] = []
    assert run_pregating(made, said.append).to_json() == json.loads(json.dumps(found.to_json()))
    assert "already" in said[0] and len(said) == 1
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run_pregating(replace(made, seed=1), quiet)


def test_cut_off_between_sidecar_and_model_it_goes_on(made: PreGateConfig, found: Any, tmp_path: Path) -> None:
    """And what a process leaves that is killed between a result and the end of its state goes too."""
    short = replace(made, out=tmp_path / "out", rounds=1, steps=2)

    class Killed(BaseException):
        pass

    def say(line: str) -> None:
        if "sidecar is written" in line:
            raise Killed

    with pytest.raises(Killed):
        run_pregating(short, say)
    assert short.sidecar.exists() and not short.out.exists()
    for name in ("gates1", "experts1"):
        (tmp_path / f".out.{name}.state").mkdir()
    run_pregating(short, quiet)
    read_sidecar(short.sidecar, of=model_sha256(short.out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.pregate"]
    other = replace(made, out=tmp_path / "two", rounds=1, steps=3)
    short.sidecar.rename(other.sidecar)
    with pytest.raises(OutputExistsError, match="--overwrite"):  # it is another run's
        run_pregating(other, quiet)


def test_too_little_text_for_a_later_round_is_said_first(made: PreGateConfig, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven.\n" * 2500)
    said: list[str] = []
    with pytest.raises(TextError, match="too little text"):
        run_pregating(
            replace(
                made,
                out=tmp_path / "out",
                sources=(str(text),),
                steps=2,
                rounds=40,
                held_out=1,
                training=replace(made.training, tokens=2048),
            ),
            said.append,
        )
    assert said == []


def test_models_that_do_not_belong_together(made: PreGateConfig, tmp_path: Path) -> None:
    other = dense(tmp_path / "other", layers=3)
    with pytest.raises(LayoutError, match="another number of layers"):
        run_pregating(replace(made, dense=other, out=tmp_path / "out"), quiet)
    with pytest.raises(LayoutError, match="has no experts"):
        run_pregating(replace(made, model=made.dense, out=tmp_path / "out"), quiet)


def test_settings_that_cannot_be(made: PreGateConfig) -> None:
    with pytest.raises(CarveUsageError, match=r"rounds, steps, batch.*less than a batch"):
        replace(made, rounds=0, tokens=10)


# --- the scheduler -----------------------------------------------------------------------------------------------


class _Table(PreGate):
    """Says what a table says: every token takes the pair of experts that it is in."""

    def choice(self, ids: torch.Tensor) -> torch.Tensor:
        first = (ids % 2 * 2)[..., None, None].expand(-1, -1, self.shape.layers, 1)
        return torch.cat([first, first + 1], -1)


def test_batches_are_of_requests_that_want_the_same_experts() -> None:
    scheduler = Scheduler(_Table(SHAPE), batch=2)
    assert [scheduler.submit(tokens) for tokens in ([0, 2], [1], [4], [3, 5], [0, 1])] == [0, 1, 2, 3, 4]
    first, second, third = scheduler.next_batch(), scheduler.next_batch(), scheduler.next_batch()
    assert first and second and third and scheduler.next_batch() is None
    assert (first.requests, second.requests, third.requests) == ((0, 2), (1, 3), (4,))
    assert first.experts == (frozenset({0, 1}),) * 3 and first.unique == 2 and third.unique == 4


def test_nothing_waits_for_ever() -> None:
    """The oldest is taken though all that come after it would go better together."""
    scheduler = Scheduler(_Table(SHAPE), batch=2)
    scheduler.submit([1])
    for _ in range(5):
        scheduler.submit([0])
    batch = scheduler.next_batch()
    assert batch and 0 in batch.requests


def test_a_scheduler_needs_requests_that_can_be() -> None:
    with pytest.raises(CarveUsageError, match="batch is 0"):
        Scheduler(_Table(SHAPE), batch=0)
    for tokens in ([], [50], [-1]):
        with pytest.raises(CarveUsageError, match="tokens from 0 to 49"):
            Scheduler(_Table(SHAPE), batch=1).submit(tokens)


def test_the_command_says_what_is_wrong(made: PreGateConfig, tmp_path: Path) -> None:
    base = ["pregate", str(made.model), "--dense", str(made.dense), "--out", str(tmp_path / "out")]
    for arguments, code, told in (
        (["--rounds", "0"], 2, "rounds, steps, batch and held_out must be at least 1"),
        (["--set", "tokns=1"], 2, "did you mean 'tokens'"),
        (["--size", "30"], 2, "a size that divides into 4 heads of an even width, as 32 does"),
        (["--length", "32", "--tokens", "100000000"], 1, "too little text"),
    ):
        done = CliRunner().invoke(main, [*base, *arguments])
        assert done.exit_code == code and told in done.output and "Traceback" not in done.output
