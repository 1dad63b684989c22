# SPDX-License-Identifier: Apache-2.0
"""A directory that one process at a time may write."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def only_one(
    directory: Path, what: str, option: str, *, taken: type[Exception], unwritable: type[Exception]
) -> Iterator[None]:
    """Holds the directory against others of its kind, by a lock that the kernel drops with its holder.

    what, option: for the message, as in "search" and "--out".

    Raises:
        taken: if another one holds it now.
        unwritable: if the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise unwritable(
            f"cannot write {directory}: {error.strerror}. Choose another directory with {option}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise taken(
                f"another {what} writes {directory} right now; wait for it, or choose another with {option}"
            ) from error
        yield
