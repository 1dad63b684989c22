# SPDX-License-Identifier: Apache-2.0
"""What a worker has imported, by name, and importing the same beforehand in a process that is to take its place.

Only installed modules count: the script's own files may be edited before the next start, and may look at the
environment (`RANK`) as they are imported.
"""

import importlib
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import PurePath
from types import ModuleType

BASE = ("torch", "torch.distributed", "refound.ckpt.protection")
"""For scripts that never say what they have imported, since they are not protected."""
MOST_NAMES = 50_000
WARM_ENV = "REFOUND_WARM"
"""Tells workers that somebody wants to know what they have imported."""
_INSTALLED = {"site-packages", "dist-packages"}


def loaded() -> list[str]:
    """The installed modules that this process has imported, in that order."""
    return [name for name, module in list(sys.modules.items()) if _is_installed(name, module)]


def _is_installed(name: str, module: ModuleType | None) -> bool:
    spec = getattr(module, "__spec__", None)
    origin = getattr(spec, "origin", None)
    if spec is None or spec.name != name or name in ("__main__", "__mp_main__") or not isinstance(origin, str):
        return False
    if name.partition(".")[0] == "refound" or origin in ("built-in", "frozen"):
        return True
    path = PurePath(origin)
    return not _INSTALLED.isdisjoint(path.parts) or path.is_relative_to(sysconfig.get_path("stdlib"))


def preload(names: Iterable[str]) -> int:
    """Import them; returns how many could not be. A worker that needs one of those finds out by itself."""
    failed = 0
    for name in names:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except (Exception, SystemExit):
                failed += 1
    return failed
