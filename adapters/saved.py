# SPDX-License-Identifier: Apache-2.0
"""A directory that `refound tune` wrote: what it is, and how it is served. Imports nothing heavy until it is opened.

refound.json names the base with its hash, the method with all settings, and how the training went; the method's own
files lie beside it. Kinds that servers take beside the base are PEFT directories; the others become models.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distill.save import RECORD, file_sha256
from .errors import AdapterDamageError

if TYPE_CHECKING:
    from .base import Base
    from .method import Attached, Recast

SCHEMA = 1


def tuned_kind(path: Path) -> str | None:
    """The `kind` of what was tuned into `path`; None if it is something else."""
    try:
        kind = json.loads((path / RECORD).read_text())["method"]["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if isinstance(kind, str) else None


def becomes_model(path: Path) -> bool:
    """Whether it is served as a model, because servers do not take it beside its base."""
    kind = tuned_kind(path)
    return kind is not None and kind not in ("lora", "rslora")


def is_rounded(base: Path) -> bool:
    """Whether the model directory `base` has quantized weights."""
    try:
        return "quantization_config" in json.loads((base / "config.json").read_text())
    except (OSError, ValueError):
        return False  # what is wrong is told by who reads it next


def base_named(path: Path) -> Path:
    """Where its base was. Raises AdapterDamageError if it does not say."""
    return Path(str(_record(path)["base"]["path"]))


def open_tuned(path: Path, base: "Base") -> "Attached":
    """The method on a freshly loaded base, with what was trained.

    Raises:
        BaseMismatchError: it was trained on other weights.
        AdapterDamageError: its files are not what was written.
    """
    from ..distill.tables import read_table
    from .base import check_base, load_model
    from .kinds import KINDS
    from .method import Method

    check_base(path, base)
    record = _record(path)
    check_files(path, record)
    problems: list[str] = []
    kinds: Any = {Method: KINDS}
    method: Method | None = read_table(Method, record["method"], "method", problems, kinds)
    if method is None:
        raise AdapterDamageError(f"{path / RECORD} describes no known method: {'; '.join(problems)}")
    attached = method.attach(load_model(base), seed=record.get("seed", 0))
    attached.load(path)
    return attached


def recast_tuned(path: Path, base: "Base") -> "Recast":
    """Raises NotServableError, and as `open_tuned`."""
    return open_tuned(path, base).recast()


@contextmanager
def served_model(path: Path, like: Path | None, folder: Path) -> Iterator[tuple[Path, str]]:
    """A model directory below `folder` that computes what the base does with `path` on it, and a word on what it is.

    Raises:
        NotServableError, BaseMismatchError, AdapterDamageError: see above.
        ExportError: the base cannot be opened.
    """
    from .base import open_base, write_recast

    base = open_base(like or base_named(path))
    recast = recast_tuned(path, base)
    told = f"{base.path} with {path} ({tuned_kind(path)}) {recast.how}"
    record = {"base": {"path": str(base.path), "sha256": base.fingerprint()}, "adapter": str(path.absolute())}
    write_recast(base, recast, folder / "model", record=record | {"how": recast.how})
    yield folder / "model", told


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """refound.json, with the hashes of the files beside it."""
    files = {file.name: file_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
    (folder / RECORD).write_text(json.dumps({"schema": SCHEMA, **record, "files": files}, indent=2) + "\n")


def check_tuned(folder: Path) -> None:
    """Raises AdapterDamageError if a file of what refound wrote is not what was written; else knows nothing."""
    try:
        record = json.loads((folder / RECORD).read_text())
        files = record["files"]
        ours = all(isinstance(value, str) for value in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if ours:
        check_files(folder, record)


def check_files(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises AdapterDamageError if a file is not, byte for byte, what was written."""
    files = record.get("files", {})
    if not isinstance(files, Mapping):
        raise AdapterDamageError(f"{folder / RECORD} lists no files: it is damaged. Tune again")
    for name, wanted in files.items():
        file = folder / Path(name).name
        if not file.is_file() or file_sha256(file) != wanted:
            raise AdapterDamageError(f"{file} is missing or damaged: its bytes are not what {RECORD} says. Tune again")


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / RECORD).read_text())
        _ = record["base"]["path"], record["base"]["sha256"], record["method"]["kind"]
        if not isinstance(record.get("seed", 0), int):
            raise ValueError(f"seed is {record['seed']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterDamageError(f"{path / RECORD} cannot be read as what `refound tune` writes: {error}") from error
    return record
