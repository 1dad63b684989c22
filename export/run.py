# SPDX-License-Identifier: Apache-2.0
"""The export as a whole: check, plan, write beside, prove, rename. Run again, it keeps what is already done."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .atomic import fresh_directory, recover, require_space
from .card import RECORD, make_card, make_record, read_record, recipe
from .compressed import BITS, require_library
from .convert import CONVERTED, require_converter
from .directory import ModelDirectory, open_directory, require_tokenizer
from .environments import engine_python
from .errors import EngineMissingError, ProofError
from .install import installable
from .plan import ExportConfig, ExportPlan, Part, make_plan
from .proof import Figures, Proof
from .quantizer import EngineQuantizer
from .writers import write_part


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One directory that is now there."""

    part: Part
    record: dict[str, Any]
    kept: bool
    """It was there already, made from the same source in the same way."""


def plan_export(config: ExportConfig, source: ModelDirectory | None = None) -> tuple[ModelDirectory, ExportPlan]:
    """Check source and engines, and plan; the weights' numbers are not read and nothing is written.

    source: what is at `config.model`, where that is not written yet.

    Raises:
        ExportError: see `directory.open_directory`, `plan.make_plan` and `atomic.require_space`; EngineMissingError if
            `verify` is asked for and an engine is not installed, or the quantizer of k-quants.
    """
    if source is None:
        source = open_directory(config.model, tokenizer=config.tokenizer)
    elif config.tokenizer:
        require_tokenizer(source.path)
    plan = make_plan(config, source)
    if config.quantize.endswith("_k"):
        EngineQuantizer()
    if config.quantize in BITS:
        require_library()
    for part in plan.parts:
        if part.layout in CONVERTED:
            require_converter(part.layout)
    if config.verify and (absent := [name for name in config.engines if engine_python(name) is None]):
        raise EngineMissingError(
            f"--verify needs {', '.join(absent)}, which cannot be run here. {installable(absent)}Leave --verify out "
            "to prove the export with the engines that are here"
        )
    return source, plan


def export_model(config: ExportConfig, progress: Callable[[str], None]) -> list[Exported]:
    """Write what `config` asks for.

    Raises:
        ExportError: whatever `plan_export` raises, ModelDamageError for NaN weights, OutputExistsError,
            OutputSpaceError, and ProofError if an engine's tokens are not the source's; then nothing was renamed.
    """
    source, plan = plan_export(config)
    progress(f"reading {config.origin or config.model}")
    fingerprint = source.fingerprint()
    for part in plan.parts:
        recover(part.directory)
    found = [_done(part, fingerprint) for part in plan.parts]
    records = [None if config.overwrite or _wants_proof(config, record) else record for record in found]
    # what was made from this source in this way may be replaced without a word: it comes out the same, but proven
    ours = [record is not None for record in found]
    if any(record is None for record in records):
        source.check_numbers()
        require_space(config.out, plan.bytes)
    proof = Proof(source, progress)
    try:
        return [
            Exported(part=part, record=record, kept=True)
            if record
            else _export_part(
                config, source, plan, part, fingerprint, proof, progress, overwrite=config.overwrite or own
            )
            for part, record, own in zip(plan.parts, records, ours, strict=True)
        ]
    finally:
        proof.close()


def _done(part: Part, fingerprint: str) -> dict[str, Any] | None:
    """The record of a part that needs no work: same source, same recipe, every file there with its size."""
    record = read_record(part.directory)
    if record is None or record["source"]["sha256"] != fingerprint or record["recipe"] != recipe(part):
        return None
    whole = all(
        (part.directory / name).is_file() and (part.directory / name).stat().st_size == file["bytes"]
        for name, file in record["files"].items()
    )
    return record if whole else None


def _wants_proof(config: ExportConfig, record: dict[str, Any] | None) -> bool:
    return bool(record) and config.verify is not False and any(engine_python(name) for name in record["unproven"])


def _export_part(
    config: ExportConfig,
    source: ModelDirectory,
    plan: ExportPlan,
    part: Part,
    fingerprint: str,
    proof: Proof,
    progress: Callable[[str], None],
    *,
    overwrite: bool,
) -> Exported:
    with fresh_directory(part.directory, overwrite=overwrite) as folder:
        write_part(part, source, folder, progress)
        figures, unproven = _prove(config, part, folder, proof)
        (folder / "README.md").write_text(make_card(config, part, source.decoder, figures, unproven))
        record = make_record(
            part,
            source,
            origin=config.origin or str(source.path.absolute()),
            fingerprint=fingerprint,
            directory=folder,
            findings=plan.findings,
            figures=figures,
            unproven=unproven,
        )
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return Exported(part=part, record=record, kept=False)


def _prove(config: ExportConfig, part: Part, folder: Path, proof: Proof) -> tuple[list[Figures], list[str]]:
    able = [name for name in part.engines if config.verify is not False and engine_python(name)]
    path = folder / part.model_path.name if part.layout == "gguf" else folder
    figures = [proof.check(part, path, name) for name in able]
    if wrong := [figure for figure in figures if not figure.holds]:
        raise ProofError(differences(part, wrong))
    return figures, [name for name in part.engines if name not in able]


def differences(part: Part, wrong: Sequence[Figures]) -> str:
    lines = [
        f"{figure}; where they part the source led by {figure.worst_margin:.2g} logits in the clearest case"
        for figure in wrong
    ]
    return f"the {part.layout} export does not compute what its source does, so it was not kept:\n  " + "\n  ".join(
        lines
    )
