# SPDX-License-Identifier: Apache-2.0
"""Is this machine fit to protect a training job? All checks in order; their findings as text and as JSON."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __version__, checks
from .checks import Finding, Verdict
from .text import columns

_WORDS: dict[Verdict, str] = {"ok": "ok", "note": "note", "fail": "FAIL"}


def examine(checkpoint_dir: Path | None = None) -> list[Finding]:
    """Look at everything and return what was found, the environment first; takes a few seconds."""
    looks: list[Callable[[], Finding]] = [
        checks.python,
        *(lambda name=name: checks.package(name) for name in checks.REQUIRED),
        lambda: checks.entry_point("torchrun.handlers", "torchrun --rdzv-backend=refound"),
        lambda: checks.entry_point("torchrun.logs_specs", "torchrun --logs-specs=refound"),
        checks.plugin_loads,
        checks.erasure,
        checks.memfd,
        checks.memory,
        checks.locked_memory,
        checks.open_files,
        checks.huge_pages,
        checks.cpus,
        checks.runtime_dir,
        checks.loopback,
        *(lambda name=name: checks.extra(name) for name in checks.EXTRAS),
    ]
    if checkpoint_dir is not None:
        looks.append(lambda: checks.checkpoint_dir(checkpoint_dir))
    return [_look(look) for look in looks]


def _look(look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except ImportError as error:
        # A broken installation is what this command is for: the other findings are still worth having.
        fix = "install refound with what it needs: python -m pip install -e ."
        return Finding(name=error.name or "import", verdict="fail", found=f"does not load: {error}", fix=fix)


def failed(findings: Sequence[Finding]) -> bool:
    """Say whether anything that refound needs is missing."""
    return any(finding.verdict == "fail" for finding in findings)


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return what `refound doctor --json` prints."""
    return {
        "schema": 1,
        "refound": __version__,
        "ok": not failed(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def to_text(findings: Sequence[Finding]) -> str:
    """Return a table, then what to do about each finding that is not ok, then the verdict."""
    lines = [f"refound {__version__} on {platform.system()} {platform.release()} ({platform.machine()})", ""]
    lines += columns([(_WORDS[each.verdict], each.name, each.found) for each in findings])
    fixes = [each for each in findings if each.verdict != "ok" and each.fix]
    if fixes:
        lines += ["", "What to do:"]
        lines += [f"  {each.name}: {each.fix}" for each in fixes]
    count = sum(each.verdict == "fail" for each in findings)
    lines += [
        "",
        f"{count} of {len(findings)} checks failed." if count else "This machine can protect training jobs.",
    ]
    return "\n".join(lines)
