# SPDX-License-Identifier: Apache-2.0
"""Whether the modelling code beside a model is refound's own. No other is ever run.

A directory that was downloaded may bring any code, and its configuration may name more on the Hub; engines that are
told to trust it run all of that.
"""

import tempfile
from pathlib import Path
from typing import Any

from .directory import read_json
from .errors import ExportUsageError
from .forms import OWN_FILES, needs_code
from .plugin import WHEEL, write_plugin

_LARGEST_BYTES = 1 << 20


def own_code(directory: Path) -> tuple[Path, ...]:
    """`(directory,)` if an engine is to be told to trust what lies in it, `()` if the model needs no code.

    Raises:
        ExportUsageError: if it needs code, and not all of what is there is refound's own, byte for byte.
        ModelDamageError: if its configuration cannot be read.
    """
    config = directory / "config.json"
    if not directory.is_dir() or not config.exists():
        return ()
    raw = read_json(config)
    if not needs_code(raw):
        return ()
    if strange := [*_elsewhere(raw), *_strange_files(directory)]:
        raise ExportUsageError(
            f"{directory} needs code to be run, and this is not what refound writes beside a model: "
            f"{', '.join(strange[:4])}. Nothing of it was run. Write it anew with code of refound's own: "
            f"refound export {directory} --to transformers"
        )
    return (directory,)


def _elsewhere(raw: dict[str, Any]) -> list[str]:
    """Classes that the configuration has from other repositories."""
    named = raw.get("auto_map")
    classes = named.values() if isinstance(named, dict) else ()
    return [str(name) for name in classes if not isinstance(name, str) or "--" in name]


def _strange_files(directory: Path) -> list[str]:
    own = {path.name: path.read_bytes() for path in OWN_FILES}
    with tempfile.TemporaryDirectory() as folder:
        own[WHEEL] = write_plugin(Path(folder)).read_bytes()
    found = sorted(path for pattern in ("*.py", "*.whl", "*.so") for path in directory.rglob(pattern))
    return [
        str(path.relative_to(directory))
        for path in found
        if path.parent != directory or path.stat().st_size > _LARGEST_BYTES or own.get(path.name) != path.read_bytes()
    ]
