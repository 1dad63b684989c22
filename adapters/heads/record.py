# SPDX-License-Identifier: Apache-2.0
"""A directory of heads: their weights, and a record that says of which model they are and what was measured.

    OUT/refound.json      kind, base (path and SHA-256), settings, accuracies, tree or thresholds, figures
    OUT/heads/            Medusa heads in vLLM's layout (see export/medusa.py)
    OUT/exits.safetensors exits and gates
    OUT/base/             the model that heads of a joint training (Medusa-2) belong to

A draft is a model directory like any other, with the same record in it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...distill.save import RECORD, SCHEMA, file_sha256
from ...export.atomic import fresh_directory
from .errors import HeadsMismatchError, HeadsUsageError


def save_heads(out: Path, write: Callable[[Path], None], record: Mapping[str, Any], *, overwrite: bool) -> None:
    """`write` fills an empty directory, which takes its name once the record is in it.

    Raises:
        OutputExistsError, OutputSpaceError: see `export.atomic.fresh_directory`.
    """
    with fresh_directory(out, overwrite=overwrite) as folder:
        write(folder)
        files = {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        told = {"schema": SCHEMA, **record, "files": files}
        (folder / RECORD).write_text(json.dumps(told, indent=2) + "\n")


def heads_record(path: Path) -> dict[str, Any] | None:
    """The record of heads at `path`; None if there are none."""
    try:
        found = json.loads((path / RECORD).read_text())
        return found if found["heads"]["kind"] and found["base"]["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def has_heads(path: Path) -> bool:
    """Whether these are heads that are no model themselves."""
    found = heads_record(path)
    return found is not None and found["heads"]["kind"] != "draft"


def read_record(path: Path, kind: str, fingerprint: str | None) -> dict[str, Any]:
    """The record of heads of that kind, of the model of that fingerprint (None: any), every file as it was written.

    Raises:
        HeadsUsageError: there are none, or of another kind.
        HeadsMismatchError: they are of another model, or damaged.
    """
    found = heads_record(path)
    if found is None or found["heads"]["kind"] != kind:
        what = "none" if found is None else f"of kind {found['heads']['kind']}"
        raise HeadsUsageError(f"{path}: heads of kind {kind} are wanted, and these are {what}")
    if fingerprint is not None and found["base"]["sha256"] != fingerprint:
        raise HeadsMismatchError(
            f"{path} was trained on the model {found['base']['path']} (SHA-256 {found['base']['sha256'][:12]}…), and "
            f"the one here has {fingerprint[:12]}…: its guesses would be of another model. Give it that model, or "
            f"train heads for this one: refound heads MODEL --kind {kind}"
        )
    for name, file in found["files"].items():
        if not (path / name).is_file() or file_sha256(path / name) != file["sha256"]:
            raise HeadsMismatchError(f"{path / name} is not what was written: copy it again, or train it again")
    return found
