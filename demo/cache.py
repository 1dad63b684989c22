# SPDX-License-Identifier: Apache-2.0
"""Directories that are built once and then only read: whole under their final name, or not there at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        CacheWriteError: if `root` cannot be written. Whatever `build` raises passes through, and nothing stays.
    """
    root = root or cache_root()
    final = root / name
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_builder(root / f".{name}.lock"):
            if not final.is_dir():
                _build(final, build)
    except PermissionError as error:
        raise CacheWriteError(
            f"cannot write {error.filename or root}: {error.strerror}. "
            "Nothing was built; set XDG_CACHE_HOME to a directory that you can write, and run again"
        ) from error
    return final


@contextmanager
def _only_builder(lock: Path) -> Iterator[None]:
    # The kernel drops the lock with its holder, so a killed builder blocks nobody.
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(final: Path, build: Callable[[Path], None]) -> None:
    for scrap in final.parent.glob(f".{final.name}-*.part"):
        shutil.rmtree(scrap)
    part = Path(tempfile.mkdtemp(prefix=f".{final.name}-", suffix=".part", dir=final.parent))
    try:
        build(part)
        _sync(part)
        part.rename(final)
        _sync_one(final.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync(directory: Path) -> None:
    # Rename alone may reach the disk before the contents do.
    for path in (*directory.rglob("*"), directory):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
