# SPDX-License-Identifier: Apache-2.0
"""Directories that are built once and then only read: whole under their final name, or not there at all."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..export.atomic import sync, sync_one
from .errors import CacheWriteError


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/refound`, or `~/.cache/refound`; a relative `XDG_CACHE_HOME` is ignored, as XDG asks."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "refound"


def cached_directory(name: str, build: Callable[[Path], None], root: Path | None = None) -> Path:
    """The directory `root/name`, built by `build(empty directory)` if it is not there yet.

    It is built under another name, synced to the disk and renamed, so whoever finds it finds all of it. Several
    processes may ask at once: one builds, the others wait for it, and a builder that is killed leaves only scraps,
    which the next one clears away.

    Raises:
        CacheWriteError: if `root` cannot be written or is full. Whatever else `build` raises passes through.
    """
    root = root or cache_root()
    final = root / name
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{name}.lock").open("w")
    except OSError as error:
        raise _unwritable(root, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it with its holder, so a killed builder blocks nobody
        if not final.is_dir():
            _build(final, build)
    return final


def _build(final: Path, build: Callable[[Path], None]) -> None:
    for scrap in final.parent.glob(f".{final.name}-*.part"):
        shutil.rmtree(scrap)
    part = Path(tempfile.mkdtemp(prefix=f".{final.name}-", suffix=".part", dir=final.parent))
    try:
        build(part)
        sync(part)
        part.rename(final)
        sync_one(final.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _unwritable(final.parent, error) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unwritable(root: Path, error: OSError) -> CacheWriteError:
    return CacheWriteError(
        f"cannot write into the cache {root}: {error.strerror}. "
        "Nothing was left behind; set XDG_CACHE_HOME to a directory with room that you can write, and run again"
    )
