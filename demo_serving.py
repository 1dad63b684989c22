# SPDX-License-Identifier: Apache-2.0
"""How the demo ends: the trained model leaves the memory of its job, is exported, and every engine here continues it.

Each engine gets the same prompt, and its greedy tokens are held against those of transformers.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from .ckpt.errors import SnapshotError
from .ckpt.source import open_source
from .demo.config import DemoConfig
from .demo.model import model_directory
from .export.directory import read_decoder
from .export.engines import ENGINES
from .export.environments import engine_python
from .export.fit import check_fit
from .export.install import RECIPES
from .export.plan import ExportConfig
from .export.proof import TOLERANCES, Figures, Prompts, compare, run_engine
from .export.run import export_model
from .export.trained import write_directory
from .sources import open_trained

PROMPT = "In the beginning God created the heaven and the earth. And the earth was"
NEW_TOKENS = 24
_COMMIT = timedelta(minutes=1)


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What an engine said."""

    figures: Figures
    text: str


class Served:
    """The demo's model on its way from the job's memory into the engines."""

    def __init__(self, config: DemoConfig) -> None:
        self._config = config
        self._folder = config.out.absolute() / "model"
        self._told = ""
        self.found: list[Continuation] = []

    @property
    def alike(self) -> bool:
        """Every engine gave the tokens of transformers."""
        return all(one.figures.holds for one in self.found)

    def take(self, job: str) -> None:
        """Write the model as it is in the job's memory after its last step.

        Raises:
            SnapshotError: if that step is not committed in time.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        like = model_directory(tiny=self._config.tiny)
        _wait_for_commit(job, self._config.target_steps)
        with open_trained(job, like) as trained:
            write_directory(trained, like, self._folder)
            self._told = trained.told
        if self._config.tiny:
            _write_byte_tokenizer(self._folder / "tokenizer.json")

    def run(self, progress: Callable[[str], None]) -> None:
        """Export what was taken for the engines that are here, and let each continue the prompt.

        Raises:
            ExportError: if the export fails or an engine does not run it.
        """
        from tokenizers import Tokenizer

        decoder = read_decoder(self._folder)
        engines = tuple(name for name in ENGINES if engine_python(name) and not _refused(decoder, name))
        out = self._config.out.absolute() / "export"
        config = ExportConfig(
            model=self._folder,
            engines=engines,
            out=out,
            verify=False,
            overwrite=True,
            origin=self._told,
        )
        parts = {name: done.part for done in export_model(config, progress) for name in done.part.engines}
        tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        prompts = Prompts(ids=(tuple(tokenizer.encode(PROMPT, add_special_tokens=False).ids),), text=())
        reference: dict[str, Any] = {}
        for name in engines:
            progress(f"{ENGINES[name].title} continues a prompt")
            answer = run_engine(name, [parts[name].model_path], prompts, new_tokens=NEW_TOKENS)
            (found,) = answer["models"]
            reference = reference or found
            figures = compare(name, answer["version"], reference, found, TOLERANCES["f32"])
            self.found.append(Continuation(figures=figures, text=tokenizer.decode(found["tokens"][0])))

    def to_json(self) -> dict[str, Any]:
        """What `refound demo --json` prints of it."""
        return {
            "model": str(self._folder),
            "made_of": self._told,
            "prompt": PROMPT,
            "engines": [{"text": one.text, **one.figures.to_json()} for one in self.found],
        }

    def to_text(self) -> str:
        """The model's words, and whether all engines have the same."""
        first, *others = self.found
        lines = [
            f"served: {self._told} -> {self._config.out / 'export'}",
            f"  {PROMPT!r}",
            f"  {first.figures.engine} {first.figures.version} goes on: {first.text!r}",
        ]
        for one in others:
            engine = f"{one.figures.engine} {one.figures.version}"
            alike = one.figures.equal_tokens == NEW_TOKENS
            words = f"the same {NEW_TOKENS} tokens" if alike else f"{one.figures.equal_tokens} of {NEW_TOKENS} tokens"
            lines.append(f"  {engine}: {words}" + ("" if alike else f", then {one.text!r}"))
        absent = [name for name in RECIPES if engine_python(name) is None]
        if absent:
            lines.append(f'  more engines: make engines ENGINES="{" ".join(absent)}"')
        return "\n".join(lines)


def _write_byte_tokenizer(file: Path) -> None:
    """Of the tiny model, whose tokens are bytes: engines serve none without a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's letter for each byte: its own where that can be printed, and the next one from 256 on where it cannot
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))


def _refused(decoder: Any, engine: str) -> bool:
    return any(finding.exact is None for finding in check_fit(decoder, engine))


def _wait_for_commit(job: str, step: int) -> None:
    """A snapshot is committed a moment after its step has ended."""
    deadline = time.monotonic() + _COMMIT.total_seconds()
    while True:
        with open_source(job) as opened:
            if opened.facts["step"] >= step:
                return
        if time.monotonic() > deadline:
            raise SnapshotError(f"step {step} of job {job!r} was not committed within {_COMMIT}")
        time.sleep(0.1)
