# SPDX-License-Identifier: Apache-2.0
"""What a snapshot every step costs: step time with over without, the stall, and the copy beside memcpy.

    python benchmarks/snapshot.py [--json] [--tiny] [--modes ddp fsdp2] [--rounds 4] [--accumulate 4] [--length 256]

Three nodes (torchrun agents on loopback, one worker each) train SmolLM2-135M with a (2, 1) code. Blocks of steps with
and without snapshots alternate within one run. The first step of a block is not counted, so that every counted step
with snapshots also bears the copy, the parity exchange and the commit of the one before it, and none without does.
The ratio is the median over rounds of a block's mean with over its neighbours' mean without.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

MAX_WAIT_S = 3600.0
NODES = 3
COPY_ROUNDS = 7


def worker(options: argparse.Namespace) -> None:
    """One rank: alternate blocks, and write down what they took."""
    import refound
    import torch
    import torch.distributed as dist
    from refound.demo.model import model_directory, sharded_model

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    directory = model_directory(tiny=options.tiny)
    if options.mode == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh

        model = sharded_model(directory, init_device_mesh("cpu", (NODES,)))
        vocabulary = model.config.vocab_size
    else:
        module = whole_model(directory)
        vocabulary = module.config.vocab_size
        model = torch.nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    job = refound.protect(model=model, optimizer=optimizer)
    torch.manual_seed(rank)

    def step(snapshot: bool) -> tuple[float, float]:
        """Seconds of one step, and the stall (ms) of the snapshot that the step before it began."""
        started = time.perf_counter()
        for _ in range(options.accumulate):
            tokens = torch.randint(vocabulary, (options.batch, options.length))
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        stall_ms = job.stall_ms
        if snapshot:
            job.end_step()
        dist.barrier()
        return time.perf_counter() - started, stall_ms

    step(True), step(True)  # memory is allocated and first touched here
    blocks: list[dict[str, Any]] = []
    for number in range(2 * options.rounds + 1):
        snapshots = number % 2 == 1
        step(snapshots)
        timed = [step(snapshots) for _ in range(options.block)]
        blocks.append({"snapshots": snapshots, "step_s": [s for s, _ in timed], "stall_ms": [t for _, t in timed]})
        if rank == 0:
            print(f"{options.mode}: block {number + 1} of {2 * options.rounds + 1}", file=sys.stderr, flush=True)
    dist.barrier()
    job.close()
    if rank == 0:
        result = {"blocks": blocks, "copy": copy_beside_memcpy(model, optimizer)}
        Path(options.worker).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()


def whole_model(directory: Path) -> Any:
    """The model of `directory` in float32, unsharded."""
    import torch
    from safetensors.torch import load_file
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    config = LlamaConfig.from_pretrained(directory)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)  # the tied head is not in the file
    return model


def copy_beside_memcpy(model: Any, optimizer: Any) -> dict[str, float]:
    """GB/s of filling a shard (checksums included) and of memcpy of as many bytes, by turns, on an idle node."""
    import numpy as np
    import torch
    from refound.ckpt.collect import Collector
    from refound.ckpt.copier import Copier, SlotMemory
    from refound.ckpt.shard import make_plan
    from refound.ckpt.slots import Segment

    state = Collector({"model": model, "optimizer": optimizer}, rank=0).collect()
    plan = make_plan(state, 0, 1 << 16)
    segment = Segment("benchmark", plan.size_bytes)
    slot, copier = SlotMemory(segment.fd, plan.size_bytes), Copier(torch.device("cpu"))
    source, target = np.ones(plan.size_bytes, np.uint8), np.ones(plan.size_bytes, np.uint8)
    fill_s, memcpy_s = [], []
    for turn in range(COPY_ROUNDS + 1):
        started = time.thread_time()
        copier.fill(plan, state.leaves, b"", slot, None)
        between = time.thread_time()
        np.copyto(target, source)
        ended = time.thread_time()
        if turn:  # the first touches the pages
            fill_s.append(between - started)
            memcpy_s.append(ended - between)
    ratio = median(m / f for m, f in zip(memcpy_s, fill_s, strict=True))
    size_gb = plan.size_bytes / 1e9
    return {
        "size_gb": size_gb,
        "fill_gb_s": size_gb / median(fill_s),
        "memcpy_gb_s": size_gb / median(memcpy_s),
        "ratio": ratio,
    }


def run(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train on three nodes in `mode` and return what rank 0 wrote down."""
    from refound.demo.cluster import Cluster

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        script = [__file__, f"--worker={result}", f"--mode={mode}", f"--rounds={options.rounds}"]
        script += [f"--batch={options.batch}", f"--length={options.length}", f"--block={options.block}"]
        script += [f"--accumulate={options.accumulate}"]
        script += ["--tiny"] if options.tiny else []
        with Cluster(job=f"bench-{mode}", nodes=NODES, script=script, logs=Path(folder)) as cluster:
            cluster.start()
            deadline = time.monotonic() + MAX_WAIT_S
            while cluster.running() and time.monotonic() < deadline:
                cluster.tick()
                time.sleep(0.5)
        if not result.exists():
            sys.exit((Path(folder) / "node0.log").read_text()[-4000:])
        return json.loads(result.read_text())


def figures(mode: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of one mode."""
    from _figures import figure  # a worker's path lacks this folder (PYTHONSAFEPATH)

    blocks = measured["blocks"]
    ratios, stalls_ms, fractions = [], [], []
    for number in range(1, len(blocks), 2):
        without = mean(blocks[number - 1]["step_s"] + blocks[number + 1]["step_s"])
        ratios.append(mean(blocks[number]["step_s"]) / without)
        stalls_ms += blocks[number]["stall_ms"]
        fractions += [stall / 1000 / without for stall in blocks[number]["stall_ms"]]
    plain_s = median(s for block in blocks if not block["snapshots"] for s in block["step_s"])
    copy = measured["copy"]
    return [
        figure(f"{mode} step with / without snapshots", median(ratios), "x", "<= 1.05", median(ratios) <= 1.05),
        figure(f"{mode} stall / step", median(fractions), "x", "<= 0.01", median(fractions) <= 0.01),
        figure(f"{mode} stall", median(stalls_ms), "ms"),
        figure(f"{mode} step without snapshots", plain_s, "s"),
        figure(f"{mode} shard of rank 0", copy["size_gb"], "GB"),
        figure(f"{mode} copy with checksums / memcpy", copy["ratio"], "x"),
        figure(f"{mode} copy with checksums", copy["fill_gb_s"], "GB/s"),
        figure(f"{mode} memcpy", copy["memcpy_gb_s"], "GB/s"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--tiny", action="store_true", help="a model of a million parameters, to see that it runs")
    parser.add_argument("--modes", nargs="+", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"])
    parser.add_argument("--rounds", type=int, default=4, help="blocks with snapshots")
    parser.add_argument("--block", type=int, default=2, help="counted steps of a block")
    parser.add_argument("--batch", type=int, default=1, help="sequences a rank and backward pass")
    parser.add_argument("--accumulate", type=int, default=4, help="backward passes a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options)
        return

    rows = [row for mode in options.modes for row in figures(mode, run(mode, options))]
    from _figures import tell

    tell(rows, as_json=options.json)


if __name__ == "__main__":
    main()
