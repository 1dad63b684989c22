# SPDX-License-Identifier: Apache-2.0
"""Where engines are installed: this interpreter's environment, or one of their own, made by `make engines`."""

import os
import sys
from pathlib import Path

DRIVERS = Path(__file__).parent / "drivers"


def engine_python(engine: str) -> Path | None:
    """The interpreter that has the engine: this one, or that of the environment made by `make engines`."""
    if engine == "transformers":
        return Path(sys.executable)
    python = engines_root() / engine / "bin" / "python"
    return python if python.is_file() and (DRIVERS / driver_name(engine)).is_file() else None


def driver_name(engine: str) -> str:
    """The script in `drivers` that runs models in the engine."""
    return f"run_{engine.replace('.', '_').replace('-', '_')}.py"


def engines_root() -> Path:
    """`$REFOUND_ENGINES`, or `engines` in refound's cache directory."""
    if given := os.environ.get("REFOUND_ENGINES"):
        return Path(given)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "refound" / "engines"
