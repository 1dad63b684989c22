# SPDX-License-Identifier: Apache-2.0
"""How fast an engine runs a model on this machine, and with how many threads it does so best.

The search climbs from the number of threads that was best for the nearest model measured before (by parameters, same
engine, same CPUs): it measures that and its neighbours, and goes on while a neighbour is better. Every measurement is
kept in a file, so the next search starts from it and the same one is not measured again.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .configs import uniform_obstacles
from .directory import read_decoder
from .engines import ENGINES
from .errors import ExportUsageError
from .proof import Prompts, engines_root, run_engine

SCHEMA = 1


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
    """None: searched for."""

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
    load_s: float
    prefill_tok_s: float
    decode_tok_s: float


def bench(config: BenchConfig, progress: Callable[[str], None]) -> list[Measured]:
    """Measure; the best comes first.

    Raises:
        ExportError: EngineMissingError if the engine is not installed, ProofError if it does not run the model.
    """
    history = read_history()
    cpus, size_bytes = len(os.sched_getaffinity(0)), model_bytes(config.model)
    trust = _needs_code(config.model)

    def measure(threads: int) -> Measured:
        progress(f"{config.engine} with {threads} thread{'s' if threads > 1 else ''}")
        prompts = Prompts(ids=_prompts(config.batch, config.length), text=())
        answer = run_engine(
            config.engine,
            [config.model],
            prompts,
            trust=(config.model,) if trust else (),
            new_tokens=config.new_tokens,
            threads=threads,
        )
        (found,) = answer["models"]
        measured = Measured(
            engine=config.engine,
            version=answer["version"],
            model_bytes=size_bytes,
            cpus=cpus,
            length=config.length,
            batch=config.batch,
            threads=threads,
            load_s=found["load_s"],
            prefill_tok_s=found["prefill_tok_s"],
            decode_tok_s=found["decode_tok_s"],
        )
        append_history(measured)
        return measured

    if config.threads is not None:
        return [measure(config.threads)]
    start = likely_threads(history, config.engine, cpus, size_bytes)
    return sorted(climb(start, cpus, measure), key=lambda one: -one.decode_tok_s)


def climb(start: int, most: int, measure: Callable[[int], Measured]) -> Iterator[Measured]:
    """Measure `start` and go to the better neighbour (half, double, at most `most`) until none is better."""
    tried: dict[int, Measured] = {}
    here = min(max(start, 1), most)
    while True:
        for threads in sorted({here, max(here // 2, 1), min(here * 2, most)}):
            if threads not in tried:
                tried[threads] = measure(threads)
                yield tried[threads]
        best = max(tried, key=lambda threads: tried[threads].decode_tok_s)
        if best == here:
            return
        here = best


def likely_threads(history: list[dict[str, Any]], engine: str, cpus: int, size_bytes: int) -> int:
    """The best number of threads of the measured model that is nearest in size; all CPUs if there is none."""
    same = [one for one in history if one.get("engine") == engine and one.get("cpus") == cpus]
    if not same:
        return cpus

    def distance(one: dict[str, Any]) -> float:
        return abs(math.log(one["model_bytes"] / size_bytes))

    nearest = min(map(distance, same))
    return max((one for one in same if distance(one) == nearest), key=lambda one: one["decode_tok_s"])["threads"]


def model_bytes(path: Path) -> int:
    """The size of the weights: what decoding has to read for each token."""
    files = [path] if path.is_file() else [*path.glob("*.safetensors")]
    total = sum(file.stat().st_size for file in files)
    if not total:
        raise ExportUsageError(f"{path} is neither a GGUF file nor a directory with safetensors files")
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
        f"  {one.threads} threads: prefill {one.prefill_tok_s:.0f} tok/s, decode {one.decode_tok_s:.1f} tok/s, "
        f"loads in {one.load_s:.1f} s"
        for one in found
    ]
    return "\n".join(lines)


def _prompts(batch: int, length: int) -> tuple[tuple[int, ...], ...]:
    # small ids, which every vocabulary has
    return tuple(tuple(2 + (31 * row + 7 * step) % 200 for step in range(length)) for row in range(batch))


def _needs_code(path: Path) -> bool:
    return path.is_dir() and bool(uniform_obstacles(read_decoder(path)))
