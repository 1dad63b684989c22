# SPDX-License-Identifier: Apache-2.0
"""What an export says about itself: `refound.json` for programs, `README.md` (the model card) for people."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .architecture import Decoder
from .atomic import size_text
from .directory import ModelDirectory
from .engines import ENGINES
from .fit import Finding
from .plan import ExportConfig, Part
from .plugin import WHEEL
from .proof import Figures

SCHEMA = 1
WRITER = 1
"""Raised when the same source and settings come out as other bytes than before."""
RECORD = "refound.json"
_LIBRARIES = {"huggingface": "transformers", "gguf": "llama.cpp", "openvino": "openvino", "onnx": "onnxruntime-genai"}


def make_record(
    part: Part,
    source: ModelDirectory,
    *,
    origin: str,
    fingerprint: str,
    directory: Path,
    findings: Sequence[Finding],
    figures: Sequence[Figures],
    unproven: Sequence[str],
) -> dict[str, Any]:
    """The contents of `refound.json`: what it was made from and how, hashes, and what was measured."""
    return {
        "schema": SCHEMA,
        "source": {"path": origin, "sha256": fingerprint, "notes": list(source.notes)},
        "recipe": recipe(part),
        "replaced": [str(finding) for finding in findings if finding.engine in part.engines],
        "parameters": source.decoder.parameters,
        "files": {file.name: _file(file) for file in sorted(directory.iterdir()) if file.name != RECORD},
        "proof": [figure.to_json() for figure in figures],
        "unproven": list(unproven),
    }


def recipe(part: Part) -> dict[str, Any]:
    """What decides the bytes of a part, beside its source."""
    return {
        "writer": WRITER,
        "layout": part.layout,
        "family": part.decoder.family,
        "engines": list(part.engines),
        "weights": part.weights,
        # said only where they are used, so that what older versions wrote is still known as done
        **({"form": part.form} if part.form == "per_layer_config" else {}),
        **({"plain": True} if part.plain else {}),
    }


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a finished export, or None if there is none that can be read."""
    try:
        found = json.loads((directory / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def _file(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def make_card(
    config: ExportConfig, part: Part, source: Decoder, figures: Sequence[Figures], unproven: Sequence[str]
) -> str:
    """The model card, in Markdown with the metadata that the Hub reads."""
    lines = ["---", f"library_name: {_LIBRARIES[part.layout]}"]
    lines += ["tags: [refound]", "pipeline_tag: text-generation", "---", "", f"# {config.name}", ""]
    lines += [f"{source.parameters / 1e6:.1f} M parameters: {source}.", ""]
    lines += [f"Made of {config.origin}.", ""] if config.origin else []
    lines += [f"Written by `refound export` as {part.layout}, weights {part.weights}, {size_text(part.bytes)}.", ""]
    lines += ["## Serve it", ""]
    target = part.shards[0][0] if part.layout == "gguf" else "."
    lines += [f"- {ENGINES[engine].title}: `{ENGINES[engine].serve.format(path=target)}`" for engine in part.engines]
    if part.plugin:
        lines += ["", f"vLLM computes its linear subblocks with the plugin that lies here: `pip install ./{WHEEL}`."]
    lines += ["", "## Held against its source", ""]
    if figures:
        lines += [
            "Greedy tokens beside transformers in float32 on the source; speeds are of the machine that proved it.",
            "",
            "| engine | equal tokens | largest logit difference | perplexity (source) | load | prefill | decode |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_row(figure) for figure in figures]
    for engine in unproven:
        lines.append(f"\nNot proven in {ENGINES[engine].title}: it was not run when this was written.")
    return "\n".join(lines) + "\n"


def _row(figure: Figures) -> str:
    total = figure.prompts * figure.tokens_each
    logits = "" if figure.logit_difference is None else f"{figure.logit_difference:.2g}"
    text = "" if figure.perplexity is None else f"{figure.perplexity:.3f} ({figure.source_perplexity:.3f})"
    return (
        f"| {figure.engine} {figure.version} | {figure.equal_tokens} of {total} | {logits} | {text} | "
        f"{figure.load_s:.1f} s | {figure.prefill_tok_s:.0f} tok/s | {figure.decode_tok_s:.0f} tok/s |"
    )
