# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: private sockets, one thread a process, and no room imported by its bare name."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("adapters", "chaos", "ckpt", "demo", "distill", "erasure", "export", "nas")


@pytest.fixture(scope="session", autouse=True)
def _private_runtime() -> Iterator[None]:
    """Keep the tests' snapshot processes away from those of a job that runs on this machine."""
    # Short, because a Unix socket's path has 107 bytes; pytest's own folders are longer.
    folder = tempfile.mkdtemp(prefix="rf-")
    os.environ["REFOUND_DIR"] = folder
    # Several processes on few cores: threads inside each only make them wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    yield
    del os.environ["REFOUND_DIR"]
    # The last snapshot process of a job takes the folder with it.
    if Path(folder).exists():
        shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_what_is_started() -> None:
    """A shell without job control starts what is in the background with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _rooms_keep_their_name() -> Iterator[None]:
    """`ckpt` is `refound.ckpt`; by its bare name it would be there twice, each with its own state."""
    yield
    bare = [name for name in ROOMS if name in sys.modules]
    assert not bare, f"imported without `refound.`: {bare}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root, which is the package."""
    return Path(__file__).resolve().parent.parent
