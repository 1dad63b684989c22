# SPDX-License-Identifier: Apache-2.0
"""The proof of an export: the engine itself loads it, and its greedy tokens are held against the source's.

The reference is transformers in float32 on the source. A token may differ only where the source itself hesitates: where
its best two logits are closer than the tolerance. From there on the two texts are different texts, and the rest of
that prompt is not compared.
"""

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from .directory import ModelDirectory
from .environments import DRIVERS, driver_name, engine_python
from .errors import EngineMissingError, ExportError, ProofError
from .forms import configuration, copy_remote, directory_needs_code, forms_of
from .plan import Part

NEW_TOKENS = 64
PROMPT_TOKENS = 12
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is a city that",
    "Once upon a time, in a village at the foot of a mountain, there lived an old",
    "To make bread you need flour, water, salt and yeast. First, put the flour into",
    "The difference between a list and a tuple in Python is that a list can be",
    "Water boils at one hundred degrees and freezes at zero degrees, which means that in",
    "Dear Sir or Madam, I am writing to you because of the bicycle that I bought",
    "In the year 1969 two men walked on the moon for the first time, and the",
    "If a train leaves at noon and travels at eighty kilometres an hour, then after two",
)
_TEXT_WINDOWS, _WINDOW_TOKENS = 4, 128
_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an exported model may be from its source, in logits and log-probabilities."""

    margin: float
    logprob: float


TOLERANCES = {
    "source": Tolerance(margin=2e-3, logprob=1e-2),
    "f32": Tolerance(margin=2e-3, logprob=1e-2),
    "f16": Tolerance(margin=0.1, logprob=0.1),
    "bf16": Tolerance(margin=0.5, logprob=0.5),
    "q8_0": Tolerance(margin=1.0, logprob=1.0),
    "int8": Tolerance(margin=1.0, logprob=1.0),
    "int4": Tolerance(margin=6.0, logprob=6.0),
    "q6_k": Tolerance(margin=2.0, logprob=2.0),
    "q5_k": Tolerance(margin=3.0, logprob=3.0),
    "q4_k": Tolerance(margin=4.0, logprob=4.0),
}
"""By the weights' format. Types that round get what rounding costs; the figure itself is in the record."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What the engines are asked."""

    ids: tuple[tuple[int, ...], ...]
    text: tuple[tuple[int, ...], ...]
    """Windows for the perplexity; empty without a tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one engine did with one export."""

    engine: str
    version: str
    prompts: int
    tokens_each: int
    equal_tokens: int
    """Greedy tokens that are the source's, counted to the first that differs in each prompt."""
    equal_prompts: int
    holds: bool
    worst_margin: float
    """The largest lead that the source gave to a token that came out otherwise. 0: none did."""
    logprob_difference: float | None
    logit_difference: float | None
    perplexity: float | None
    source_perplexity: float | None
    load_s: float
    prefill_tok_s: float
    decode_tok_s: float

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __str__(self) -> str:
        total = self.prompts * self.tokens_each
        logits = f", largest logit difference {self.logit_difference:.2g}" if self.logit_difference is not None else ""
        logprob = self.logprob_difference
        logprobs = f", largest log-probability difference {logprob:.2g}" if logprob is not None else ""
        return f"{self.engine} {self.version}: {self.equal_tokens} of {total} greedy tokens equal{logits}{logprobs}"


def make_prompts(source: ModelDirectory) -> Prompts:
    """Real prompts in the model's own tokens, all of one length; without a tokenizer, spread-out ids."""
    file = source.path / "tokenizer.json"
    size = source.decoder.vocab_size
    if not file.is_file():
        steps = range(PROMPT_TOKENS)
        ids = tuple(tuple((7919 * (31 * row + step) + 17) % size for step in steps) for row in range(len(PROMPTS)))
        return Prompts(ids=ids, text=())
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    found = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in PROMPTS]
    length = min(PROMPT_TOKENS, *(len(ids) for ids in found))
    # English that is on every machine: the help texts of Python's own documentation
    text = tokenizer.encode("\n".join(topics.values())[:8000], add_special_tokens=False).ids
    window = min(_WINDOW_TOKENS, source.decoder.max_positions, len(text) // _TEXT_WINDOWS)
    windows = tuple(tuple(text[i * window : (i + 1) * window]) for i in range(_TEXT_WINDOWS))
    return Prompts(ids=tuple(tuple(ids[:length]) for ids in found), text=windows)


def run_engine(
    engine: str,
    models: list[Path],
    prompts: Prompts,
    *,
    trust: tuple[Path, ...] = (),
    new_tokens: int = NEW_TOKENS,
    threads: int | None = None,
    adapters: Sequence[Path | None] = (),
    together: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the engine's driver answers for these models (see `drivers`), in their order.

    adapters: one that is loaded beside each model, or None. Empty: none at all.
    together: the models are one, loaded once with all adapters beside it; there is an answer for each adapter.
    settings: of the engine, as its driver names them (see `bench`). None: those that compute in float32.

    Raises:
        EngineMissingError: if it is not installed here.
        ProofError: if it does not load or run a model; the message ends with its own last words.
    """
    python = engine_python(engine)
    if python is None:
        raise EngineMissingError(f"{engine} is not installed here: python -m refound.export.install {engine}")
    request = {
        "models": [str(model.absolute()) for model in models],
        "prompts": [list(ids) for ids in prompts.ids],
        "text": [list(ids) for ids in prompts.text],
        "new_tokens": new_tokens,
        "threads": threads or default_threads(),
        "trust": [str(path.absolute()) for path in trust],
        "adapters": [path and str(path.absolute()) for path in adapters] or [None] * len(models),
        "together": together,
        "settings": dict(settings or {}),
    }
    with tempfile.TemporaryDirectory(prefix="refound-proof-") as folder:
        answer = Path(folder, "answer.json")
        command = [str(python), "-P", str(DRIVERS / driver_name(engine)), str(answer)]
        done = _ask(engine, command, json.dumps(request), folder)
        if done.returncode != 0 or not answer.is_file():
            last = "\n  ".join(done.stderr.strip().splitlines()[-6:])
            raise ProofError(f"{engine} did not run {models[-1]} (exit code {done.returncode}):\n  {last}")
        return json.loads(answer.read_text())


def _ask(engine: str, command: list[str], request: str, folder: str) -> subprocess.CompletedProcess[str]:
    # Modelling code that transformers copies goes with the folder, and nothing is looked for on the network.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(folder, "modules"))}
    try:
        return subprocess.run(
            command,
            input=request,
            text=True,
            capture_output=True,
            check=False,
            cwd=folder,
            env=environment,
            timeout=_TIMEOUT.total_seconds(),
        )
    except subprocess.TimeoutExpired as error:
        raise ProofError(f"{engine} did not answer within {_TIMEOUT}") from error


def default_threads() -> int:
    """As OMP_NUM_THREADS says, or one for each CPU that may be used."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdigit() and int(told) > 0 else len(os.sched_getaffinity(0))


class Proof:
    """Holds exports against one source. The reference is computed once for all engines but transformers."""

    def __init__(
        self, source: ModelDirectory, progress: Callable[[str], None], *, new_tokens: int = NEW_TOKENS
    ) -> None:
        self.source, self.progress, self.new_tokens = source, progress, new_tokens
        self.prompts = make_prompts(source)
        self.reference: dict[str, Any] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="refound-reference-")

    def close(self) -> None:
        self._folder.cleanup()

    def check(self, part: Part, path: Path, engine: str) -> Figures:
        """Run the export at `path` in `engine`, and compare.

        Raises:
            EngineMissingError, ProofError: see `run_engine`. What differs is in the figures, not raised.
        """
        self.progress(f"proving the {part.layout} export in {engine}")
        # Code beside a model runs only where it is ours: the source's own never does.
        own = (path,) if part.layout == "huggingface" and part.form != "uniform" else ()
        if part.rounding and engine != "transformers":
            # 4 bits leave few of the source's tokens: another engine is held against the same rounded weights
            rounded = self._run("transformers", [path], trust=own)["models"][0]
            answer = self._run(engine, [path], trust=own)
            return compare(engine, answer["version"], rounded, answer["models"][0], TOLERANCES["bf16"])
        if engine == "transformers":
            reference = self._reference_path()
            answer = self._run(engine, [reference, path], trust=(*own, *self._trusted(reference)))
            self.reference, found = answer["models"]
        else:
            if self.reference is None:
                reference = self._reference_path()
                answer = self._run("transformers", [reference], trust=self._trusted(reference))
                self.reference = answer["models"][0]
            answer = self._run(engine, [path], trust=own)
            (found,) = answer["models"]
        assert self.reference is not None
        return compare(engine, answer["version"], self.reference, found, TOLERANCES[part.weights])

    def _run(self, engine: str, models: list[Path], trust: tuple[Path, ...]) -> dict[str, Any]:
        return run_engine(engine, models, self.prompts, trust=trust, new_tokens=self.new_tokens)

    def _trusted(self, reference: Path) -> tuple[Path, ...]:
        return () if reference == self.source.path else (reference,)

    def _reference_path(self) -> Path:
        """The source. If it needs code, a directory of links to its weights beside ours: its own is never run."""
        if not directory_needs_code(self.source.path):
            return self.source.path
        folder = Path(self._folder.name, "reference")
        if not folder.exists():
            folder.mkdir()
            form = forms_of(self.source.decoder)[0]
            (folder / "config.json").write_text(json.dumps(configuration(self.source.decoder, form)))
            copy_remote(folder, form)
            for file in (*self.source.files, self.source.path / "model.safetensors.index.json"):
                if file.is_file():
                    (folder / file.name).symlink_to(file.absolute())
        return folder


def compare(
    engine: str, version: str, reference: dict[str, Any], found: dict[str, Any], tolerance: Tolerance
) -> Figures:
    """Hold one engine's tokens against the reference's, to the first that differs in each prompt."""
    equal, whole, worst_margin = 0, 0, 0.0
    differences: list[float] = []
    for row, (wanted, got) in enumerate(zip(reference["tokens"], found["tokens"], strict=True)):
        if len(wanted) != len(got):
            raise ExportError(f"{engine} gave {len(got)} tokens where {len(wanted)} were asked for")
        same = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), len(wanted))
        equal, whole = equal + same, whole + (same == len(wanted))
        if same < len(wanted):
            worst_margin = max(worst_margin, reference["margins"][row][same])
        pairs = zip(reference["logprobs"][row][:same], found["logprobs"][row][:same], strict=True)
        differences += [abs(a - b) for a, b in pairs if b is not None]
    worst = max(differences, default=None)
    # a NaN is within no tolerance
    holds = worst_margin <= tolerance.margin and (worst is None or worst <= tolerance.logprob)
    logits = found.get("logit_difference")
    return Figures(
        engine=engine,
        version=version,
        prompts=len(found["tokens"]),
        tokens_each=len(found["tokens"][0]),
        equal_tokens=equal,
        equal_prompts=whole,
        holds=holds and (logits is None or math.isfinite(logits)),
        worst_margin=worst_margin,
        logprob_difference=worst,
        logit_difference=logits,
        perplexity=found.get("perplexity"),
        source_perplexity=reference.get("perplexity") if found.get("perplexity") else None,
        load_s=found["load_s"],
        prefill_tok_s=found["prefill_tok_s"],
        decode_tok_s=found["decode_tok_s"],
    )
