# SPDX-License-Identifier: Apache-2.0
"""How fast an engine runs a model on this machine, and with which settings it does so best.

Every measurement is kept in a file. A search starts from the best settings of the model that is nearest in size among
those measured before (same engine, same CPUs), and `search` learns from all of them.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .convert import WEIGHT_FILES
from .engines import ENGINES
from .environments import engines_root
from .errors import ExportUsageError
from .own_code import own_code
from .proof import Prompts, run_engine
from .search import Run, Settings, search

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    model: Path
    """What the engine loads: a directory, or a GGUF file."""
    engine: str
    length: int = 128
    """Tokens of a prompt."""
    batch: int = 1
    """Prompts at a time; llama.cpp takes one after the other here."""
    new_tokens: int = 32
    threads: int | None = None
    """With so many and all else as usual. None: the best settings are searched for."""

    def __post_init__(self) -> None:
        wrong = [name for name in ("length", "batch", "new_tokens") if getattr(self, name) < 1]
        if wrong:
            raise ExportUsageError(f"{', '.join(wrong)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of an engine."""

    engine: str
    version: str
    model_bytes: int
    cpus: int
    length: int
    batch: int
    threads: int
    settings: dict[str, Any]
    """The others, by the driver's names."""
    load_s: float
    prefill_tok_s: float
    decode_tok_s: float


def space(engine: str, cpus: int) -> dict[str, tuple[Any, ...]]:
    """The settings of an engine that change its speed, and the values that are tried."""
    threads = tuple(sorted({min(1 << power, cpus) for power in range(cpus.bit_length() + 1)}))
    if engine == "llama.cpp":
        return {"threads": threads, "cache": ("f32", "f16", "f16 flash", "q8_0 flash"), "ubatch": (64, 256, 512)}
    if engine == "openvino":
        return {"threads": threads, "dtype": ("float32", "bfloat16"), "cache": ("f32", "f16", "u8")}
    if engine == "onnxruntime":
        return {"threads": threads}
    return {"threads": threads, "dtype": ("float32", "bfloat16")}


def usual(engine: str, cpus: int) -> dict[str, Any]:
    """Where a search starts that knows nothing: all CPUs, and what computes in float32."""
    largest = ("threads", "ubatch")
    return {name: values[-1] if name in largest else values[0] for name, values in space(engine, cpus).items()}


def bench(config: BenchConfig, progress: Callable[[str], None]) -> list[Measured]:
    """Measure; the best comes first.

    Raises:
        ExportError: EngineMissingError if the engine is not installed, ProofError if it does not run the model,
            ExportUsageError if the model brings code that is not refound's own.
    """
    cpus, size_bytes = len(os.sched_getaffinity(0)), model_bytes(config.model)
    trust = own_code(config.model)
    prompts = Prompts(ids=plain_prompts(config.batch, config.length), text=())
    found: list[Measured] = []

    def measure(settings: Settings) -> float:
        progress(f"{config.engine} with {told(settings)}")
        others = {name: value for name, value in settings.items() if name != "threads"}
        answer = run_engine(
            config.engine,
            [config.model],
            prompts,
            trust=trust,
            new_tokens=config.new_tokens,
            threads=settings["threads"],
            settings=others,
        )
        (one,) = answer["models"]
        measured = Measured(
            engine=config.engine,
            version=answer["version"],
            model_bytes=size_bytes,
            cpus=cpus,
            length=config.length,
            batch=config.batch,
            threads=settings["threads"],
            settings=others,
            load_s=one["load_s"],
            prefill_tok_s=one["prefill_tok_s"],
            decode_tok_s=one["decode_tok_s"],
        )
        append_history(measured)
        found.append(measured)
        return speed(measured, config)

    if config.threads is not None:
        measure(usual(config.engine, cpus) | {"threads": config.threads})
        return found
    history = known_runs(read_history(), config, cpus, size_bytes)
    near = [run for run in history if run.weight == max(run.weight for run in history)]
    start = max(near, key=lambda run: run.speed).settings if near else usual(config.engine, cpus)
    for _ in search(space(config.engine, cpus), start, measure, history=history):
        pass
    return sorted(found, key=lambda one: -speed(one, config))


def speed(measured: Measured, config: BenchConfig) -> float:
    """Prompts of the asked kind a second."""
    return 1 / (config.length / measured.prefill_tok_s + config.new_tokens / measured.decode_tok_s)


def known_runs(history: list[dict[str, Any]], config: BenchConfig, cpus: int, size_bytes: int) -> list[Run]:
    """Earlier runs of this engine on as many CPUs; the further a model is in size, the less they count."""
    names = space(config.engine, cpus)
    runs = []
    for one in history:
        settings = {"threads": one["threads"], **(one.get("settings") or {})}
        if one["engine"] == config.engine and one["cpus"] == cpus and settings.keys() == names.keys():
            distance = abs(math.log(one["model_bytes"] / size_bytes))
            measured = Measured(**{name: one[name] for name in Measured.__dataclass_fields__})
            runs.append(Run(settings=settings, speed=speed(measured, config), weight=0.5 / (1 + distance)))
    return runs


def told(settings: Settings) -> str:
    """Settings as words."""
    words = [f"{settings['threads']} thread{'s' if settings['threads'] > 1 else ''}"]
    return ", ".join([*words, *(f"{name} {value}" for name, value in settings.items() if name != "threads")])


def model_bytes(path: Path) -> int:
    """The size of the weights: what decoding has to read for each token."""
    known = ("*.safetensors", *WEIGHT_FILES.values())
    files = [path] if path.is_file() else [file for name in known for file in path.glob(name)]
    total = sum(file.stat().st_size for file in files)
    if not total:
        raise ExportUsageError(
            f"{path} is neither a GGUF file nor a directory with safetensors files, or as an engine has it"
        )
    return total


def history_file() -> Path:
    return engines_root().parent / "bench.jsonl"


def read_history() -> list[dict[str, Any]]:
    """What was measured before; a line that cannot be read is left out."""
    try:
        lines = history_file().read_text().splitlines()
    except OSError:
        return []
    wanted = set(Measured.__dataclass_fields__)
    found = []
    for line in lines:
        try:
            one = json.loads(line)
        except ValueError:
            continue  # cut short by a kill
        if isinstance(one, dict) and wanted <= one.keys():
            found.append(one)
    return found


def append_history(measured: Measured) -> None:
    history_file().parent.mkdir(parents=True, exist_ok=True)
    with history_file().open("a") as file:
        file.write(json.dumps(asdict(measured)) + "\n")


def to_text(found: list[Measured]) -> str:
    best = found[0]
    lines = [f"{ENGINES[best.engine].title} {best.version}, prompts of {best.length} tokens, {best.batch} at a time"]
    lines += [
        f"  {told({'threads': one.threads, **one.settings})}: prefill {one.prefill_tok_s:.0f} tok/s, "
        f"decode {one.decode_tok_s:.1f} tok/s, loads in {one.load_s:.1f} s"
        for one in found
    ]
    return "\n".join(lines)


def plain_prompts(batch: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Prompts of small ids, which every vocabulary has."""
    return tuple(tuple(2 + (31 * row + 7 * step) % 200 for step in range(length)) for row in range(batch))
