# SPDX-License-Identifier: Apache-2.0
"""Where the snapshot processes of this user put their sockets: one private directory, one folder a job."""

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from .errors import ConfigError

MAX_SOCKET_PATH_BYTES = 107  # sun_path, less its terminator


def runtime_dir() -> Path:
    """The private directory of this user's snapshot processes, which may not exist yet.

    `$REFOUND_DIR`, else `$XDG_RUNTIME_DIR/refound`, else `/tmp/refound-<uid>`.
    """
    if chosen := os.environ.get("REFOUND_DIR"):
        return Path(chosen)
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "refound"
    return Path("/tmp") / f"refound-{os.getuid()}"


def private_dir(path: Path) -> Path:
    """Make `path` a directory that only this user can enter, or say why it is not one.

    Raises ConfigError: it cannot be made, is a link, not a directory, another user's, or open to others.
    """
    try:
        with contextlib.suppress(FileExistsError):  # what is there is looked at below
            path.mkdir(mode=0o700, parents=True)
        info = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"{path} could not be made: {error.strerror}; set REFOUND_DIR to a directory of yours"
        ) from error
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"{path} is not a directory; set REFOUND_DIR to a private directory of yours")
    if info.st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to uid {info.st_uid}, not to you (uid {os.getuid()}); set REFOUND_DIR")
    if info.st_mode & 0o077:
        raise ConfigError(f"{path} is open to others (mode {stat.S_IMODE(info.st_mode):o}); run: chmod 700 {path}")
    return path


def job_dir(job: str) -> Path:
    """The folder of one job inside `runtime_dir()`; named by a hash, since a run id may hold anything."""
    return runtime_dir() / hashlib.sha256(job.encode()).hexdigest()[:12]


def socket_path(job: str, node: str) -> Path:
    """The Unix socket of the snapshot process of one node of one job.

    Raises ConfigError if the system could not bind so long a path.
    """
    name = hashlib.sha256(node.encode()).hexdigest()[:8]
    path = job_dir(job) / f"{name}.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"{path} is too long for a Unix socket; set REFOUND_DIR to a shorter directory")
    return path
