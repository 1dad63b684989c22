# SPDX-License-Identifier: Apache-2.0
"""Distillation of a tiny child: it comes nearer to its teacher, and a killed run ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refound.distill.config import DistillConfig, Training, read_training
from refound.distill.errors import DistillUsageError, StateMismatchError
from refound.distill.loop import distill, learning_rate
from refound.distill.models import load, open_blocks, positions_of, states_of
from refound.distill.resume import STATE, state_folder
from refound.export.architecture import FFN, Attention
from refound.export.errors import OutputExistsError
from transformers import AutoModelForCausalLM

from ..export.models import decoder, with_layer, write_model

TRAINING = Training(tokens=640, length=16, batch=4, lr=3e-3, save_every=3, quality_every=320)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(teacher, child): the child lacks a subblock or two, and has the teacher's other weights."""
    folder = tmp_path_factory.mktemp("models")
    base = decoder(layers=3)
    child = with_layer(with_layer(base, 1, attention=Attention(kind="none")), 2, ffn=FFN(kind="linear"))
    return write_model(folder / "teacher", base), write_model(folder / "child", child)


def config(models: tuple[Path, Path], out: Path, training: Training = TRAINING) -> DistillConfig:
    return DistillConfig(child=models[1], teacher=models[0], out=out, training=training, held_out=2)


def test_the_model_of_layers_is_the_teacher_bit_for_bit(models: tuple[Path, Path]) -> None:
    ours = load(open_blocks(models[0]))
    theirs = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        assert torch.equal(ours(input_ids=ids).logits, wanted)
        states = states_of(ours, ids, positions_of(ours, 12))
        assert torch.equal(ours.lm_head(ours.model.norm(states[-1])), wanted)


def test_a_child_learns_and_its_directory_is_what_it_learned(models: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    found = distill(config(models, tmp_path / "out"), said.append)
    assert found.steps == 10 and found.tokens == 640
    assert found.after.kl < 0.9 * found.before.kl
    assert [tokens for tokens, _ in found.curve] == [0, 320, 640]
    source = open_blocks(tmp_path / "out")
    assert source.decoder == open_blocks(models[1]).decoder
    record = json.loads((tmp_path / "out" / "refound.json").read_text())
    assert record["distilled"]["after"] == found.after.to_json()
    assert not state_folder(tmp_path / "out").exists()
    # the same again: it is done already
    assert distill(config(models, tmp_path / "out"), said.append) == found
    assert "already" in said[-1]


def test_a_killed_run_ends_with_the_bits_of_the_undisturbed_one(models: tuple[Path, Path], tmp_path: Path) -> None:
    distill(config(models, tmp_path / "whole"), lambda _: None)
    teacher, child = models
    command = [sys.executable, "-m", "refound", "distill", str(child), "--teacher", str(teacher)]
    command += ["--out", str(tmp_path / "killed"), "--set", "tokens=640", "--set", "length=16", "--set", "lr=3e-3"]
    command += ["--set", "save_every=3", "--set", "quality_every=320"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("step 7 "):  # a state of step 6 is on disk
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    assert (state_folder(tmp_path / "killed") / STATE).is_file()
    said: list[str] = []
    settings = replace(config(models, tmp_path / "killed"), held_out=DistillConfig.held_out)
    distill(settings, said.append)
    assert said[0] == "going on from step 6 of 10"
    whole, killed = (tmp_path / name / "model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()


def test_a_result_with_nowhere_to_go_is_refused_before_the_work(models: tuple[Path, Path], tmp_path: Path) -> None:
    out, said = tmp_path / "out", list[str]()
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        distill(config(models, out), said.append)
    assert not said and (out / "mine").read_text() == "kept"
    distill(replace(config(models, out), overwrite=True), said.append)
    assert open_blocks(out).decoder == open_blocks(models[1]).decoder and not (out / "mine").exists()


def test_a_state_of_another_run_or_a_damaged_one_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    state = state_folder(out) / STATE
    state.parent.mkdir()
    state.write_bytes(b"\0" * 99)
    with pytest.raises(StateMismatchError, match="is damaged"):
        distill(config(models, out), lambda _: None)
    state.unlink()
    stopped = _Stop(5)
    with pytest.raises(_Stopped):
        distill(config(models, out), stopped)
    with pytest.raises(StateMismatchError, match="other settings"):
        distill(config(models, out, replace(TRAINING, lr=1e-3)), lambda _: None)
    body = bytearray(state.read_bytes())
    body[-5] ^= 1
    state.write_bytes(body)
    with pytest.raises(StateMismatchError, match="bytes are not what was written"):
        distill(config(models, out), lambda _: None)


class _Stopped(Exception):
    pass


class _Stop:
    """Stops a run after some steps, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, line: str) -> None:
        if line.startswith(f"step {self.after} "):
            raise _Stopped


def test_a_child_learns_from_stored_logits_which_are_asked_for_once(models: tuple[Path, Path], tmp_path: Path) -> None:
    training = replace(TRAINING, cosine=0.0)
    said: list[str] = []
    for name in ("one", "two"):
        settings = replace(config(models, tmp_path / name, training), logits=tmp_path / "logits", stored=32)
        found = distill(settings, said.append)
        assert found.after.kl < 0.9 * found.before.kl
    assert sum(line.startswith("teacher's logits") for line in said) == 2  # shards, not runs
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(DistillUsageError, match="hold no hidden states"):
        replace(config(models, tmp_path / "three"), logits=tmp_path / "logits")


def test_a_child_of_another_teacher_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", decoder(layers=2))
    with pytest.raises(DistillUsageError, match=r"is no child of .*: 3 and 2 layers"):
        distill(replace(config(models, tmp_path / "out"), teacher=other), lambda _: None)


def test_the_learning_rate_rises_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(Training(lr=1.0, warmup=0.2), step, 100) for step in range(100)]
    assert rates[19] == rates[20] == 1 and max(rates) == 1
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_settings_are_read_and_every_mistake_is_told() -> None:
    assert read_training(["lr=1e-3", "tokens=99", "divergence=jsd"]) == Training(lr=1e-3, tokens=99, divergence="jsd")
    with pytest.raises(DistillUsageError, match=r"did you mean 'tokens'.*a float is wanted"):
        read_training(["token=1", "lr=fast"])
    with pytest.raises(DistillUsageError, match=r"training\.batch is 0.*training\.divergence is 'kl'"):
        DistillConfig(child=Path(), teacher=Path(), out=Path(), training=Training(batch=0, divergence="kl"))
