# SPDX-License-Identifier: Apache-2.0
"""What the demo ran on, for its report."""

import importlib.metadata
import os
import platform
from pathlib import Path

from .. import __version__


def environment() -> dict[str, str]:
    """Versions and hardware, as words."""
    return {
        "refound": __version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": _memory(),
    }


def available_bytes() -> int | None:
    """Memory that can still be had without swapping, as the kernel estimates it; None if it does not say."""
    kilobytes = _field("/proc/meminfo", "MemAvailable").removesuffix(" kB")
    return int(kilobytes) * 1024 if kilobytes.isdigit() else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _field(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _memory() -> str:
    kilobytes = _field("/proc/meminfo", "MemTotal").removesuffix(" kB")
    return f"{int(kilobytes) / 2**20:.1f} GiB" if kilobytes.isdigit() else "unknown"
