# SPDX-License-Identifier: Apache-2.0
"""Text that a model says itself, after the beginnings of real text: what its heads and drafts have to foresee.

It is made in chunks, each a file that proves itself, so that a killed run goes on; several ranks share the chunks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...distill.config import digest
from ...distill.errors import CacheWriteError, DamagedFileError
from ...distill.loop import eos_of
from ...distill.models import DeciLMForCausalLM
from ...distill.proven import read_proven, write_proven
from ...distill.texts import Part, open_tokenizer, pack
from ...export.directory import ModelDirectory
from .settings import HeadsConfig

_CHUNK = 32
"""Windows that are written at a time."""
Progress = Callable[[str], None]


def read_text(config: HeadsConfig, source: ModelDirectory, part: Part) -> torch.Tensor:
    """Of the sources: the windows (count, length) of int64 themselves, or the beginnings (count, prompt) of own text.

    Raises:
        TextError: there is too little text.
    """
    settings = config.settings
    return torch.from_numpy(
        pack(
            config.sources,
            part,
            tokenizer=open_tokenizer(source.path),
            eos=eos_of(source),
            count=settings.steps * settings.batch if part == "train" else settings.held_out,
            length=settings.prompt if settings.own else settings.length,
        )
    )


def windows_of(
    config: HeadsConfig,
    source: ModelDirectory,
    model: DeciLMForCausalLM,
    part: Part,
    prompts: torch.Tensor,
    folder: Path,
    progress: Progress,
) -> torch.Tensor:
    """Windows (count, length) of int64: what `read_text` has read, or the model's own text after those beginnings.

    folder: where chunks of own text are kept.

    Raises:
        CacheWriteError: it cannot be written.
    """
    settings, count = config.settings, len(prompts)
    if not settings.own or not count:
        return prompts
    eos = eos_of(source)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    chunks, fingerprint = prompts.split(_CHUNK), source.fingerprint()
    names = [
        digest([fingerprint, settings.temperature, settings.length, config.seed, chunk.tolist()]) for chunk in chunks
    ]
    files = [folder / f"own-{name}.safetensors" for name in names]
    for number, (chunk, name, file) in enumerate(zip(chunks, names, files, strict=True)):
        if number % world == rank and not _is_whole(file):
            said = _continued(model, chunk, settings.length, settings.temperature, int(name[:8], 16), eos)
            _keep(file, said)
            progress(f"own text for {part}: {min((number + 1) * _CHUNK, count)} of {count} windows")
    if world > 1:
        dist.barrier()
    return torch.cat([read_proven(file)[0]["windows"] for file in files])


def _keep(file: Path, windows: torch.Tensor) -> None:
    try:
        write_proven(file, {"windows": windows}, {})
    except OSError as error:
        raise CacheWriteError(
            f"cannot write {file}: {error.strerror}. What the model has said so far is kept; make room, or name "
            "another place with --texts, and run the same command again to go on"
        ) from error


def _is_whole(file: Path) -> bool:
    try:
        read_proven(file)
    except (DamagedFileError, OSError):
        return False
    return True


def _continued(
    model: DeciLMForCausalLM, prompts: torch.Tensor, length: int, temperature: float, seed: int, eos: int
) -> torch.Tensor:
    """`prompts` (n, tokens) continued to `length`; the end token is never said, so that windows are full."""
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole: Any = model  # generate() is not typed for models of one's own
        return whole.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=length - prompts.shape[1],
            suppress_tokens=[eos],
            eos_token_id=None,
            pad_token_id=eos,
            **sampling,
        ).long()
