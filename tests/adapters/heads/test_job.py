# SPDX-License-Identifier: Apache-2.0
"""Which run it is, what it may write over, and that it is alone there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from refound.adapters.heads.run import run_heads
from refound.adapters.heads.settings import DraftSettings, HeadsConfig, MedusaSettings
from refound.cli import main
from refound.distill.errors import CacheWriteError
from refound.distill.exclusive import only_one
from refound.distill.proven import write_proven
from refound.distill.resume import STATE, state_folder
from refound.export.errors import OutputExistsError, OutputSpaceError

from ...export.models import decoder, write_model

SETTINGS = MedusaSettings(
    tokens=0, length=24, batch=4, prompt=8, held_out=2, heads=1, nodes=1, measured=0, own=False, save_every=1
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model", decoder(layers=1))


def config(base: Path, out: Path, settings: MedusaSettings = SETTINGS, **more: object) -> HeadsConfig:
    return HeadsConfig(model=base, kind="medusa", out=out, settings=settings, **more)  # type: ignore[arg-type]


def quiet(_: str) -> None: ...


@pytest.mark.parametrize("own", [True, False])
def test_an_edited_text_is_another_run(own: bool, base: Path, tmp_path: Path) -> None:
    text, settings = tmp_path / "text.txt", replace(SETTINGS, own=own)
    text.write_text("one line of it\n" * 7000)
    mine = config(base, tmp_path / "out", settings, sources=(str(text),))
    run_heads(mine, quiet)
    said: list[str] = []
    run_heads(mine, said.append)
    assert "already" in said[-1]
    text.write_text("two line of it\n" * 7000)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run_heads(mine, quiet)


@pytest.mark.parametrize("where", ["model", "."])
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_result_never_takes_the_place_of_its_model(where: str, more: tuple[str, ...], tmp_path: Path) -> None:
    base = write_model(tmp_path / "folder" / "model", decoder(layers=1))
    before = (base / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    out = tmp_path / "link" / where
    done = CliRunner().invoke(main, ["heads", str(base), "--kind", "medusa", "--out", str(out), "--overwrite", *more])
    assert done.exit_code == 2 and "the model is in" in done.output and "another --out" in done.output
    assert (base / "model.safetensors").read_bytes() == before


def test_nor_of_anything_else_that_it_reads(base: Path, tmp_path: Path) -> None:
    text = tmp_path / "out" / "text.txt"
    text.parent.mkdir()
    text.write_text("a line\n")
    with pytest.raises(ValueError, match=r"what the model says \(--texts\) is in .*; the text .*text\.txt is in"):
        config(base, tmp_path / "out", sources=(str(text),), texts=tmp_path / "out" / "own")
    with pytest.raises(ValueError, match="the draft's start is in"):
        HeadsConfig(model=base, kind="draft", out=tmp_path / "out", settings=DraftSettings(start=str(tmp_path / "out")))


def test_one_training_at_a_time_writes_a_place(base: Path, tmp_path: Path) -> None:
    mine = config(base, tmp_path / "out")
    held = only_one(state_folder(mine.out), "training", "--out", taken=RuntimeError, unwritable=RuntimeError)
    with held, pytest.raises(OutputExistsError, match="another training writes"):
        run_heads(mine, quiet)
    assert run_heads(mine, quiet) is not None and not state_folder(mine.out).exists()


def test_the_state_of_a_run_that_has_its_result_goes(base: Path, tmp_path: Path) -> None:
    """As of one that was killed when its result was there and its state still was."""
    mine, aside = config(base, tmp_path / "out", replace(SETTINGS, tokens=192)), tmp_path / "aside"
    state = state_folder(mine.out)

    def progress(line: str) -> None:
        if line.startswith("step 1 "):
            shutil.copytree(state, aside)

    run_heads(mine, progress)
    shutil.copytree(aside, state)
    assert (state / STATE).is_file()
    said: list[str] = []
    run_heads(mine, said.append)
    assert "already" in said[-1] and not state.exists()
    write_proven(state / STATE, {}, {"run": "another"})  # that one goes on where it was
    run_heads(mine, quiet)
    assert (state / STATE).is_file()


def test_where_nothing_can_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputSpaceError, match=r"cannot write .*--out"):
        run_heads(config(base, tmp_path / "file" / "out"), quiet)
    mine = config(base, tmp_path / "out", replace(SETTINGS, own=True), texts=tmp_path / "file" / "texts")
    with pytest.raises(CacheWriteError, match=r"cannot write .*--texts"):
        run_heads(mine, quiet)


@pytest.mark.parametrize("option", ["--check", "--dry-run"])
def test_an_export_of_heads_has_nothing_to_tell_beforehand(tmp_path: Path, option: str) -> None:
    """It says so, instead of looking for a model there."""
    (tmp_path / "refound.json").write_text(json.dumps({"heads": {"kind": "medusa"}, "base": {"sha256": "0"}}))
    done = CliRunner().invoke(main, ["export", str(tmp_path), "--to", "vllm", option])
    assert done.exit_code == 2 and "are for models" in done.output
