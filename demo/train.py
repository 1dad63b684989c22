# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a language model on text with FSDP2, and survives what the demo does to it.

    torchrun --nnodes=3 --nproc-per-node=1 --max-restarts=20 --rdzv-backend=refound --rdzv-endpoint=HOST:PORT \
        -m refound.demo.train --out runs/first --steps 12

Everything that refound asks of a training script is in `train`, and marked: `protect` (in your own script
`refound.protect`), `job.step`, `job.end_step()` and `job.close()`.
"""

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn import functional

from .. import protect
from ..distill.corpus import Position, corpus_directory
from .bare import Bare
from .digest import training_digests, write_digests
from .model import model_directory, sharded_model
from .records import StartRecord, StepRecord, append_record, digest_file, starts_file, steps_file

NOISE = 0.05  # share of input tokens replaced by random ones: a resumed run is the same only if its RNG is


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Trains to `options.steps`, from wherever the last incarnation of this job got to."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(options.seed * 1000 + rank)
    directory = model_directory(tiny=options.tiny)
    text = corpus_directory(directory, tiny=options.tiny)

    model = sharded_model(directory, init_device_mesh(device.type, (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=4)
    position = Position(text, length=options.length, batch=options.batch, seed=options.seed)

    # The first line of refound: from here on the state is protected, and what a restart lost is already back.
    guard = Bare if options.unprotected else protect
    job = guard(model=model, optimizer=optimizer, scheduler=scheduler, data=position)
    append_record(starts_file(options.out), StartRecord.of(job, rank, world))

    while job.step < options.steps:
        began = time.monotonic()
        tokens = torch.from_numpy(position.next_batch(rank, world)).to(device)
        logits = model(input_ids=noisy(tokens[:, :-1], model.config.vocab_size), use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        job.end_step()  # the second: this step is complete, its snapshot may begin

        mean_loss, norm = mean_over_ranks(loss.detach()), norm.full_tensor()  # type: ignore[attr-defined]
        if rank == 0:
            seconds = time.monotonic() - began
            entry = StepRecord.of(job, loss=mean_loss, grad_norm=norm.item(), step_s=seconds)
            append_record(steps_file(options.out), entry)

    digests = training_digests(model, optimizer, scheduler, position)
    write_digests(digest_file(options.out, rank), step=job.step, rank=rank, world=world, digests=digests)
    if rank == 0 and options.until:
        wait_for(options.until)
    dist.barrier()
    job.close()  # the third: all is done, and the snapshots may go


def wait_for(file: Path) -> None:
    """Keep the job, and with it its last snapshot, until whoever wants to read that has made `file`."""
    while not file.exists():
        time.sleep(0.05)


def noisy(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """`tokens` with a share of `NOISE` replaced by random ones, from the CPU's RNG."""
    hit = (torch.rand(tokens.shape) < NOISE).to(tokens.device)
    other = torch.randint(vocabulary, tokens.shape).to(tokens.device)
    return torch.where(hit, other, tokens)


def mean_over_ranks(loss: torch.Tensor) -> float:
    """The mean of a scalar over all ranks."""
    total = loss.clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of this script; lengths and batches that are not given depend on the model."""
    parser = argparse.ArgumentParser(prog="refound.demo.train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for steps, starts and digests")
    parser.add_argument("--steps", type=int, required=True, help="train up to this step")
    parser.add_argument("--tiny", action="store_true", help="a random model of a million parameters")
    parser.add_argument("--seed", type=int, default=0, help="of data order and noise")
    parser.add_argument("--length", type=int, help="tokens a sequence")
    parser.add_argument("--batch", type=int, help="sequences a rank and step")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator, if there is one)")
    parser.add_argument("--until", type=Path, help="end only when this file is there")
    parser.add_argument("--unprotected", action="store_true", help="without refound, for comparison")
    options = parser.parse_args(arguments)
    defaults = {"length": 64, "batch": 4, "lr": 1e-3} if options.tiny else {"length": 128, "batch": 1, "lr": 5e-5}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def device_of(name: str | None) -> torch.device:
    """The device called `name`, or this machine's accelerator, or the CPU; made current for this worker."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(name) if name else accelerator or torch.device("cpu")
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    return device


@record
def main() -> None:
    """Entry point of a worker under torchrun."""
    options = parse(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    device = device_of(options.device)
    dist.init_process_group(dist.get_default_backend_for_device(device), timeout=timedelta(minutes=2))
    train(options, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the process group, and crash in an interpreter that is shutting down
