# SPDX-License-Identifier: Apache-2.0
"""An adapter for serving beside its base: the PEFT directory, and a GGUF adapter, each run in the engine with the base.

What an engine says with base and adapter is held against transformers on the base with the adapter merged, in float32.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .adapter import CONFIG, RECORD, WEIGHTS, Adapter, merged
from .atomic import fresh_directory, require_space, size_text
from .configs import uniform_obstacles
from .directory import ModelDirectory
from .engines import ENGINES
from .environments import engine_python
from .errors import EngineFitError, EngineMissingError, ExportError, ProofError
from .fit import adapt, check_fit
from .gguf_file import write_gguf_adapter
from .plan import ExportConfig, make_plan, refuse
from .proof import TOLERANCES, Figures, compare, make_prompts, run_engine
from .trained import write_directory
from .writers import write_part

SCHEMA = 1
GGUF_FILE = "adapter-f32.gguf"
_SLACK_BYTES = 1 << 20
_COMMANDS = {
    "transformers": "model.load_adapter('{path}')",
    "vllm": "vllm serve {base} --host 127.0.0.1 --enable-lora --max-lora-rank {rank} --max-loras 2 "
    "--lora-modules name={path}",
    "llama.cpp": "llama-server -m BASE.gguf --lora {path} --host 127.0.0.1",
    "sglang": "python -m sglang.launch_server --model-path {base} --lora-paths name={path}",
    "tensorrt-llm": "LoRARequest('name', 1, '{path}')",
}


@dataclass(frozen=True, kw_only=True)
class ExportedAdapter:
    """One adapter directory that is now there."""

    path: Path
    engines: tuple[str, ...]
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AdaptersDone:
    """What was written, for the command line."""

    exported: list[ExportedAdapter]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        parts = [
            {"path": str(one.path), "engines": list(one.engines)}
            | {key: one.record[key] for key in ("proof", "unproven")}
            for one in self.exported
        ]
        return {"schema": SCHEMA, "parts": parts, "notes": list(self.notes)}

    def to_text(self) -> str:
        lines = []
        for one in self.exported:
            size_bytes = sum(file.stat().st_size for file in one.path.iterdir())
            lines.append(f"{one.path}  {size_text(size_bytes)}")
            for proof in one.record["proof"]:
                asked = proof["prompts"] * proof["tokens_each"]
                lines.append(f"  {proof['engine']} {proof['version']}: {proof['equal_tokens']} of {asked} tokens equal")
            lines += [f"  {name}: not proven, it is not installed or was not run" for name in one.record["unproven"]]
            lines += [f"  serve: {one.record['serve'][name]}" for name in one.engines]
        return "\n".join([*lines, *self.notes])


def export_adapter(
    config: ExportConfig, adapter: Adapter, base: ModelDirectory, progress: Callable[[str], None]
) -> AdaptersDone:
    """Write the adapter for `config.engines` into directories in `config.out`.

    Raises:
        EngineFitError: an engine does not take the base.
        EngineMissingError: `config.verify` is asked for and an engine is not here.
        ModelDamageError: NaN weights. ProofError: an engine's tokens are not the merged model's; nothing is kept.
        OutputExistsError, OutputSpaceError: see `atomic`.
    """
    refuse([finding for name in config.engines for finding in check_fit(base.decoder, name)])
    refuse_engines(base, config.engines)
    absent = [name for name in config.engines if engine_python(name) is None]
    if config.verify and absent:
        raise EngineMissingError(f"--verify needs {', '.join(absent)}, which cannot be run here")
    if beyond := [
        name for name in config.engines if adapter.rank > max(ENGINES[name].lora_ranks, default=adapter.rank)
    ]:
        limits = ", ".join(f"{ENGINES[name].title} up to {ENGINES[name].lora_ranks[-1]}" for name in beyond)
        raise EngineFitError(f"the adapter has rank {adapter.rank}, and engines take it only so far: {limits}")
    adapter.check_numbers()
    require_space(config.out, 2 * adapter.bytes + _SLACK_BYTES)
    proof = _Proof(adapter, base, progress)
    done = []
    for layout in ("huggingface", "gguf"):
        engines = tuple(name for name in config.engines if ENGINES[name].layout == layout)
        if engines:
            final = config.out / ("peft" if layout == "huggingface" else "gguf-adapter")
            done.append(_write(config, adapter, base, engines, final, proof))
    return AdaptersDone(exported=done, notes=adapter.notes)


def refuse_engines(base: ModelDirectory, engines: tuple[str, ...]) -> None:
    """Raise EngineFitError for engines that serve no adapter, or not beside the base as they get it."""
    bad = [f"{ENGINES[name].title}: {rule.why}" for name in engines if (rule := ENGINES[name].extras["lora"]).why]
    for name in engines:
        if any(finding.alike for finding in check_fit(base.decoder, name)):
            bad.append(
                f"{ENGINES[name].title}: the base is written with layers made alike, to which it does not belong"
            )
    if bad:
        raise EngineFitError(
            "the adapter cannot be served beside its base; --merge writes it into the weights:\n  " + "\n  ".join(bad)
        )


def _write(
    config: ExportConfig, adapter: Adapter, base: ModelDirectory, engines: tuple[str, ...], final: Path, proof: "_Proof"
) -> ExportedAdapter:
    in_gguf = final.name == "gguf-adapter"
    with fresh_directory(final, overwrite=config.overwrite) as folder:
        if in_gguf:
            decoder = adapt(base.decoder, engines)
            pairs = {c.weight: (adapter.read(c.a), c.scale * adapter.read(c.b)) for c in adapter.changes}
            write_gguf_adapter(folder / GGUF_FILE, decoder, pairs)
        else:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(adapter.path / name, folder / name)
        able = [name for name in engines if config.verify is not False and engine_python(name)]
        figures = [proof.check(name, folder / GGUF_FILE if in_gguf else folder) for name in able]
        if wrong := [figure for figure in figures if not figure.holds]:
            raise ProofError(
                "the adapter beside its base does not compute what both do merged, so it was not kept:\n  "
                + "\n  ".join(map(str, wrong))
            )
        path = final / GGUF_FILE if in_gguf else final
        record = {
            "schema": SCHEMA,
            "source": {"path": str(adapter.path.absolute())},
            "base": {"path": str(base.path.absolute()), "sha256": base.fingerprint()},
            "changes": len(adapter.changes),
            "serve": {
                name: _COMMANDS[name].format(base=base.path, path=path, rank=_named_rank(adapter.rank, name))
                for name in engines
            },
            "proof": [figure.to_json() for figure in figures],
            "unproven": [name for name in engines if name not in able],
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return ExportedAdapter(path=final, engines=engines, record=record)


def _named_rank(rank: int, engine: str) -> int:
    """The smallest that the engine can be told and that holds `rank`."""
    return next((known for known in ENGINES[engine].lora_ranks if known >= rank), rank)


class _Proof:
    """Base with adapter in each engine, beside transformers on both merged."""

    def __init__(self, adapter: Adapter, base: ModelDirectory, progress: Callable[[str], None]) -> None:
        self._adapter, self._base, self._progress = adapter, base, progress
        self._prompts = replace(make_prompts(base), text=())
        self._reference: dict[str, Any] | None = None

    def check(self, engine: str, path: Path) -> Figures:
        self._progress(f"proving the adapter beside its base in {engine}")
        with tempfile.TemporaryDirectory(prefix="refound-adapter-") as folder:
            if self._reference is None:
                self._reference = self._run_merged(Path(folder, "merged"))
            model = self._base_for(engine, Path(folder, "base"))
            trust = (model,) if uniform_obstacles(self._base.decoder) else ()
            answer = run_engine(engine, [model], self._prompts, trust=trust, adapters=[path])
        return compare(engine, answer["version"], self._reference, answer["models"][0], TOLERANCES["f32"])

    def _run_merged(self, folder: Path) -> dict[str, Any]:
        folder.mkdir()
        if uniform_obstacles(self._base.decoder):
            raise ExportError("adapters of models whose layers differ are proven merged only: say --merge")
        write_directory(merged(self._adapter, self._base, dtype="float32"), self._base.path, folder)
        return run_engine("transformers", [folder], self._prompts)["models"][0]

    def _base_for(self, engine: str, folder: Path) -> Path:
        """The base as the engine loads it."""
        if ENGINES[engine].layout == "huggingface":
            return self._base.path
        plan = make_plan(ExportConfig(model=self._base.path, engines=(engine,), out=folder), self._base)
        (part,) = plan.parts
        part.directory.mkdir(parents=True)
        write_part(part, self._base, part.directory, lambda line: None)
        return part.model_path
