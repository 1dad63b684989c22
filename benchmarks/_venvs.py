# SPDX-License-Identifier: Apache-2.0
"""Environments for what refound is measured beside, each on top of this one's packages, so that torch is the same."""

import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path("runs/rivals")
REQUIREMENTS = {
    "torchsnapshot": ["torchsnapshot==0.1.0"],
    "dlrover": ["dlrover==0.6.1", "grpcio", "protobuf", "kubernetes", "tornado"],
    "lm-resiliency": ["lm-resiliency==0.2.0"],
    "torchft": ["torchft-nightly"],
    "nvrx": ["nvidia-resiliency-ext==0.4.1"],
}


def python(name: str) -> Path:
    """The interpreter of a rival's environment, which may not be there."""
    return FOLDER / name / "bin" / "python"


def installed(name: str) -> bool:
    return python(name).exists()


def install(name: str) -> None:
    """Makes a rival's environment, anew if there is one.

    Raises:
        subprocess.CalledProcessError: if pip cannot install it here.
    """
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    ours = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
    (site / "zz_base.pth").write_text(f"{ours}\n")
    import torch

    constraint = folder / "constraints.txt"
    constraint.write_text(f"torch=={torch.__version__.split('+')[0]}\n")
    pip = [str(python(name)), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(constraint), *REQUIREMENTS[name]], check=True)
