# SPDX-License-Identifier: Apache-2.0
"""Heads as engines load them. A draft needs no such thing: it is a model directory, for `refound export` as it is.

Medusa heads: a directory in vLLM's layout, or FasterDecoding's (`--family fasterdecoding`), which TGI reads as well.
Exits: the model's directory with `assistant_early_exit` in its generation_config.json, for transformers, which drafts
from that layer with the model's own norm; the trained exit is not in it, as transformers has no place for one.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...export.atomic import fresh_directory
from ...export.directory import open_directory
from ...export.engines import ENGINES
from ...export.errors import EngineFitError
from ...export.medusa import MedusaLayout, read_medusa, write_medusa
from .errors import HeadsUsageError
from .exit_run import GENERATION
from .medusa_run import BASE, HEADS
from .record import heads_record, read_record

_LAYOUTS: dict[str, MedusaLayout] = {"": "vllm", "vllm": "vllm", "fasterdecoding": "fasterdecoding"}


@dataclass(frozen=True, kw_only=True)
class ExportedHeads:
    """What was written."""

    path: Path
    serve: str

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "parts": [{"path": str(self.path), "serve": self.serve}]}

    def to_text(self) -> str:
        return f"{self.path}\n  serve: {self.serve}"


def export_heads(
    path: Path, like: Path | None, engines: Sequence[str], out: Path, *, family: str, overwrite: bool
) -> ExportedHeads:
    """Heads at `path` into `out`, each engine's directory by its own name.

    like: the model they were trained on, if it has moved.

    Raises:
        EngineFitError: an engine has no place for them.
        HeadsUsageError, HeadsMismatchError: the model is another one, or a file is damaged.
    """
    told = heads_record(path)
    kind = "" if told is None else told["heads"]["kind"]
    _check_engines(kind, engines)
    if told is None or kind not in ("medusa", "exit"):
        raise HeadsUsageError(f"{path} holds no heads that are exported on their own")
    own = path / BASE
    base = open_directory(own if own.is_dir() else like or Path(told["base"]["path"]), tokenizer=False)
    record = read_record(path, kind, None if own.is_dir() else base.fingerprint())["heads"]
    if kind == "medusa":
        if family not in _LAYOUTS:
            raise HeadsUsageError(f"--family {family!r}: Medusa heads are written as vllm or fasterdecoding")
        target = out / (_LAYOUTS[family])
        write_medusa(read_medusa(path / HEADS), base.path, target, _LAYOUTS[family], overwrite=overwrite)
        speculation = {"method": "medusa", "model": str(target), "num_speculative_tokens": record["settings"]["heads"]}
        return ExportedHeads(
            path=target,
            serve=f"vllm serve {base.path} --host 127.0.0.1 --speculative-config '{json.dumps(speculation)}'"
            if _LAYOUTS[family] == "vllm"
            else f"text-generation-launcher --model-id {target}",
        )
    with fresh_directory(out / "transformers", overwrite=overwrite) as folder:
        for file in sorted(base.path.iterdir()):
            if file.is_file() and file.suffix in (".json", ".safetensors", ".py", ".txt", ".model", ".jinja"):
                shutil.copyfile(file, folder / file.name)
        shutil.copyfile(path / GENERATION, folder / GENERATION)
        layer = json.loads((folder / GENERATION).read_text())["assistant_early_exit"]
    return ExportedHeads(
        path=out / "transformers",
        serve=f"AutoModelForCausalLM.from_pretrained('{out / 'transformers'}').generate(…) drafts from layer {layer}",
    )


def _check_engines(kind: str, engines: Sequence[str]) -> None:
    for name in engines:
        if kind == "exit" and name != "transformers":
            raise EngineFitError(f"{name} has no early exits; transformers drafts from them: --to transformers")
        if kind == "medusa" and (rule := ENGINES[name].extras["medusa"]).support == "no":
            raise EngineFitError(
                f"{name} and Medusa heads: {rule.why}. vLLM takes them: --to vllm. For any engine with draft models: "
                "refound heads MODEL --kind draft"
            )
