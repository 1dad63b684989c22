# SPDX-License-Identifier: Apache-2.0
"""A directory that is there whole under its final name, or not at all: written beside it, synced, renamed.

A writer that is killed leaves only scraps with a dot in front, which the next one for the same place clears away; one
that is killed while it replaces an older directory leaves either the old one or the new one to be found again.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import ExportError, OutputExistsError, OutputSpaceError


def _aside(final: Path) -> tuple[Path, Path, Path]:
    return tuple(final.parent / f".{final.name}.{end}" for end in ("part", "old", "lock"))  # type: ignore[return-value]


@contextlib.contextmanager
def fresh_directory(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty directory beside `final`, which takes its name when the block ends well, and goes when it does not.

    Raises:
        OutputExistsError: if `final` is there and `overwrite` is not given, or another export writes it now.
        OutputSpaceError: if the disk is full or cannot be written.
    """
    part, old, _ = _aside(final)
    with _only_writer(final):
        try:
            require_absent(final, overwrite=overwrite)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            yield part
            sync(part)
            if final.exists():
                final.rename(old)
            part.rename(final)
            sync_one(final.parent)
        except OSError as error:
            if not isinstance(error, ExportError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise OutputSpaceError(f"cannot write {final}: {error.strerror}. Nothing was left behind") from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)


def write_file(final: Path, body: bytes) -> None:
    """One file, beside its place, synced, renamed: a kill leaves what was there before.

    Raises:
        OutputSpaceError: if it cannot be written.
    """
    part = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        part.replace(final)
        sync_one(final.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first one is what is told
            part.unlink()
        raise OutputSpaceError(f"cannot write {final}: {error.strerror}. Choose another place") from error


@contextlib.contextmanager
def _only_writer(final: Path) -> Iterator[None]:
    """Holds a lock that the kernel drops with its holder. The file goes too, while it is held."""
    _, _, path = _aside(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise OutputSpaceError(f"cannot write into {final.parent}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.stat().st_ino == os.fstat(lock.fileno()).st_ino  # not one that its holder has just removed
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise OutputExistsError(f"another export writes {final} right now; wait for it, or choose another --out")
        try:
            yield
        finally:
            path.unlink()


def require_absent(final: Path, *, overwrite: bool) -> None:
    """Before long work too, so that nobody learns at its end that it has nowhere to go.

    Raises:
        OutputExistsError: if `final` is there and `overwrite` is not given.
    """
    recover(final)
    if final.exists() and not overwrite:
        raise OutputExistsError(f"{final} is there already and is something else; say --overwrite to replace it")


def require_apart(final: Path, sources: Iterable[Path]) -> None:
    """That what is written replaces nothing that it is made of: no source is `final`, or lies in it.

    Raises:
        OutputExistsError: if one does, `--overwrite` or not.
    """
    place = final.resolve()
    for source in sources:
        if place in (source.resolve(), *source.resolve().parents):
            what = "is" if place == source.resolve() else "holds"
            raise OutputExistsError(f"{final} {what} {source} itself, which this is made of; choose another --out")


def recover(final: Path) -> None:
    """Put back what was set aside by a writer that was killed between two renames."""
    _, old, _ = _aside(final)
    if old.exists() and not final.exists():
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            old.rename(final)


def require_space(parent: Path, needed_bytes: int) -> None:
    """Refuse before anything is written.

    Raises:
        OutputSpaceError: if the file system of `parent` (or of what is there above it) has not that much room.
    """
    there = next(folder for folder in (parent.absolute(), *parent.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(there).free
    if free_bytes < needed_bytes:
        raise OutputSpaceError(
            f"the export needs {size_text(needed_bytes)} and {there} has {size_text(free_bytes)} free. "
            "Nothing was written; choose another place with --out"
        )


def size_text(size_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"


def sync(directory: Path) -> None:
    """All in it and itself, to the disk: a rename alone may get there before the contents do."""
    for path in (*directory.rglob("*"), directory):
        sync_one(path)


def sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
