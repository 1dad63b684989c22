# SPDX-License-Identifier: Apache-2.0
"""What `refound export` prints: the fit, the plan, the result, each as text and as JSON."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import run
from .architecture import Decoder
from .atomic import size_text
from .directory import ModelDirectory, read_decoder
from .engines import ENGINES
from .fit import Finding, check_fit
from .plan import ExportConfig, ExportPlan
from .plugin import WHEEL

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Which engines take a model."""

    decoder: Decoder
    findings: dict[str, list[Finding]]

    @property
    def fits(self) -> bool:
        return all(finding.exact for found in self.findings.values() for finding in found)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": str(self.decoder),
            "fits": self.fits,
            "engines": {
                name: {
                    "fits": all(finding.exact for finding in found),
                    "findings": [
                        {"layer": finding.layer, "exact": finding.exact is not None, "told": str(finding)}
                        for finding in found
                    ],
                }
                for name, found in self.findings.items()
            },
        }

    def to_text(self) -> str:
        lines = [str(self.decoder)]
        for name, found in self.findings.items():
            exact = all(finding.exact for finding in found)
            verdict = (
                "fits" if not found else "fits, with replacements that compute the same" if exact else "does not fit"
            )
            lines.append(f"{ENGINES[name].title}: {verdict}")
            lines += [f"  {finding}" for finding in found]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What would be written."""

    plan: ExportPlan

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "parts": [part.to_json() for part in self.plan.parts],
            "bytes": self.plan.bytes,
            "replaced": [str(finding) for finding in self.plan.findings],
            "notes": list(self.plan.notes),
        }

    def to_text(self) -> str:
        lines = []
        for part in self.plan.parts:
            titles = ", ".join(ENGINES[name].title for name in part.engines)
            lines.append(f"{part.directory}  {size_text(part.bytes)}, for {titles}")
            lines += [f"  {name}  {size_text(size)}" for name, size in part.files]
        lines += [f"{ENGINES[finding.engine].title}: {finding}" for finding in self.plan.findings]
        return "\n".join([*lines, *self.plan.notes, "nothing was written (--dry-run)"])


@dataclass(frozen=True, kw_only=True)
class Done:
    """What was written."""

    exported: list[run.Exported]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "parts": [
                {
                    "path": str(one.part.model_path),
                    "engines": list(one.part.engines),
                    "kept": one.kept,
                    "bytes": sum(file["bytes"] for file in one.record["files"].values()),
                    "proof": one.record["proof"],
                    "unproven": one.record["unproven"],
                    "replaced": one.record["replaced"],
                }
                for one in self.exported
            ],
        }

    def to_text(self) -> str:
        lines = []
        for one in self.exported:
            total = sum(file["bytes"] for file in one.record["files"].values())
            kept = ", already done" if one.kept else ""
            lines.append(f"{one.part.model_path}  {size_text(total)}{kept}")
            for proof in one.record["proof"]:
                asked = proof["prompts"] * proof["tokens_each"]
                lines.append(f"  {proof['engine']} {proof['version']}: {proof['equal_tokens']} of {asked} tokens equal")
            lines += [f"  {name}: not proven, it is not installed or was not run" for name in one.record["unproven"]]
            lines += [f"  {told}" for told in one.record["replaced"]]
            lines += [f"  first, for vLLM: pip install {one.part.directory / WHEEL}"] if one.part.plugin else []
            lines += [f"  serve: {ENGINES[name].serve.format(path=one.part.model_path)}" for name in one.part.engines]
        return "\n".join(lines)


def check(model: Path, engines: tuple[str, ...]) -> Fit:
    decoder = read_decoder(model)
    return Fit(decoder=decoder, findings={name: check_fit(decoder, name) for name in engines})


def plan(config: ExportConfig, source: ModelDirectory | None = None) -> Planned:
    """source: as for `run.plan_export`."""
    return Planned(plan=run.plan_export(config, source)[1])


def export(config: ExportConfig, progress: Callable[[str], None]) -> Done:
    return Done(exported=run.export_model(config, progress))
