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
from ...distill.errors import DamagedFileError
from ...distill.loop import eos_of
from ...distill.models import DeciLMForCausalLM
from ...distill.proven import read_proven, write_proven
from ...distill.texts import Part, open_tokenizer, pack
from ...export.directory import ModelDirectory
from .settings import HeadsConfig

_CHUNK = 32
"""Windows that are written at a time."""
Progress = Callable[[str], None]


def windows_of(
    config: HeadsConfig,
    source: ModelDirectory,
    model: DeciLMForCausalLM,
    part: Part,
    count: int,
    folder: Path,
    progress: Progress,
) -> torch.Tensor:
    """`count` windows (count, length) of int64: of the sources, or of the model's own text after their beginnings.

    folder: where chunks of own text are kept.

    Raises:
        TextError: there is too little text.
    """
    settings = config.settings
    tokenizer, eos = open_tokenizer(source.path), eos_of(source)
    length = settings.prompt if settings.own else settings.length
    read = pack(config.sources, part, tokenizer=tokenizer, eos=eos, count=count, length=length)
    prompts = torch.from_numpy(read)
    if not settings.own or not count:
        return prompts
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    chunks, fingerprint = prompts.split(_CHUNK), source.fingerprint()
    names = [
        digest([fingerprint, settings.temperature, settings.length, config.seed, chunk.tolist()]) for chunk in chunks
    ]
    files = [folder / f"own-{name}.safetensors" for name in names]
    for number, (chunk, name, file) in enumerate(zip(chunks, names, files, strict=True)):
        if number % world == rank and not _is_whole(file):
            said = _continued(model, chunk, settings.length, settings.temperature, int(name[:8], 16), eos)
            write_proven(file, {"windows": said}, {})
            progress(f"own text for {part}: {min((number + 1) * _CHUNK, count)} of {count} windows")
    if world > 1:
        dist.barrier()
    return torch.cat([read_proven(file)[0]["windows"] for file in files])


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
