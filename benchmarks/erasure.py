# SPDX-License-Identifier: Apache-2.0
"""Encode and decode bandwidth of each backend, beside memcpy, a direct ISA-L call and zfec, in one run.

    python benchmarks/erasure.py [--json] [--shard-mib 32] [--rounds 7] [--codes 4,2 10,4] [--only isal]

All contenders work on the same shards in an order drawn anew each round; shards start at random lines, as
one lucky or unlucky layout can be worth a factor of two. GB/s are 1e9 bytes of *data* (k shards) a second of
this thread's CPU time, so that a busy machine changes little; a ratio is the median of the rounds' ratios.
Decoding is the worst case: m data shards lost, all parities used. zfec (pip install zfec), torch and
CUDA are measured where they are at hand.
"""

import argparse
import ctypes
import importlib.util
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _figures import figure, tell
from refound.erasure import Code, apply, backend, checksum, crc, isal, portable
from refound.erasure.backends import Kernel
from refound.erasure.field import Matrix
from refound.erasure.linear import apply_with

CODES = ((2, 1), (4, 1), (4, 2), (8, 2), (10, 4))
LINE_BYTES = 64

Shards = list[np.ndarray]


@dataclass
class Job:
    """One matrix product: what the contenders are asked to do."""

    code: Code
    matrix: Matrix
    ins: Shards
    outs: Shards
    have: list[int]
    decode: bool


@dataclass
class Samples:
    """Seconds of each contender, a figure a round."""

    data_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def gb_per_s(self, name: str) -> float:
        return self.data_bytes / median(self.seconds[name]) / 1e9

    def ratio(self, name: str, to: str) -> float:
        """How many times as fast as another: the median over rounds."""
        return median(b / a for a, b in zip(self.seconds[name], self.seconds[to], strict=True))


def jobs(code: Code, shard_bytes: int, rng: np.random.Generator) -> list[Job]:
    """Encoding, and decoding the first m data shards (all of them if m > k) from the rest."""
    lost = min(code.k, code.m)
    data, parity, rebuilt = (_shards(count, shard_bytes, rng) for count in (code.k, code.m, lost))
    for shard in data:
        shard[:] = rng.integers(0, 256, shard_bytes, dtype=np.uint8)
    apply(code.parity_matrix, data, parity)
    have = list(range(lost, lost + code.k))
    survivors = [(data + parity)[index] for index in have]
    return [
        Job(code, code.parity_matrix, data, parity, list(range(code.k)), decode=False),
        Job(code, code.rebuild_matrix(have, range(lost)), survivors, rebuilt, have, decode=True),
    ]


def _shards(count: int, size: int, rng: np.random.Generator) -> Shards:
    """Shards that start at random lines of their pages, touched once so that no page is fresh."""
    shards = []
    for _ in range(count):
        whole = np.zeros(size + 4096, dtype=np.uint8)
        whole[:] = 1
        start = -whole.ctypes.data % LINE_BYTES + int(rng.integers(0, 4096 // LINE_BYTES)) * LINE_BYTES
        shards.append(whole[start % 4096 : start % 4096 + size])
    return shards


def contenders(job: Job, rng: np.random.Generator) -> dict[str, Callable[[], Any]]:
    """Everything that can do the job here, by name, and memcpy of its inputs as the bound."""
    found: dict[str, Callable[[], Any]] = {"memcpy": _memcpy(job.ins, rng)}
    try:
        library = isal.load()
    except isal.LibraryError as error:
        print(f"no ISA-L: {error}", file=sys.stderr)
    else:
        found["direct ISA-L"] = _direct(library, job)
        found["isal"] = lambda: apply_with(library.apply, job.matrix, job.ins, job.outs)
    kernel: Kernel = portable.apply
    found["portable"] = lambda: apply_with(kernel, job.matrix, job.ins, job.outs)
    if importlib.util.find_spec("torch"):
        found["eager torch"] = _eager(job)
    if importlib.util.find_spec("zfec"):
        found["zfec"] = _zfec(job)
    return found


def _memcpy(sources: Shards, rng: np.random.Generator) -> Callable[[], None]:
    targets = _shards(len(sources), sources[0].size, rng)
    pairs = [(target.ctypes.data, source.ctypes.data) for target, source in zip(targets, sources, strict=True)]

    def run(kept: Shards = targets) -> None:
        for target, source in pairs:
            ctypes.memmove(target, source, kept[0].size)

    return run


def _direct(library: isal.Library, job: Job) -> Callable[[], None]:
    """The bare C call on pointers made beforehand: what no wrapper can beat."""
    dll, (rows, columns) = library._dll, job.matrix.shape
    tables = ctypes.create_string_buffer(isal.TABLE_BYTES * rows * columns)
    dll.ec_init_tables(columns, rows, job.matrix.tobytes(), tables)
    sources = (ctypes.c_void_p * columns)(*[shard.ctypes.data for shard in job.ins])
    targets = (ctypes.c_void_p * rows)(*[shard.ctypes.data for shard in job.outs])
    size = job.outs[0].size
    return lambda: dll.ec_encode_data(size, columns, rows, tables, sources, targets)


def _eager(job: Job) -> Callable[[], None]:
    import torch
    from refound.erasure import eager

    torch.set_num_threads(1)
    ins, outs = [torch.from_numpy(a) for a in job.ins], [torch.from_numpy(a) for a in job.outs]
    return lambda: eager.apply(job.matrix, ins, outs)


def _zfec(job: Job) -> Callable[[], Any]:
    """zfec's own code and API; its result is fresh memory, as for any of its callers."""
    import zfec

    k, n = job.code.k, job.code.k + job.code.m
    blocks = tuple(shard.tobytes() for shard in job.ins)
    if not job.decode:
        encoder, wanted = zfec.Encoder(k, n), tuple(range(k, n))
        return lambda: encoder.encode(blocks, wanted)
    decoder, numbers = zfec.Decoder(k, n), tuple(job.have)
    return lambda: decoder.decode(blocks, numbers)


def measure(
    named: dict[str, Callable[[], Any]],
    data_bytes: int,
    rounds: int,
    seed: int,
    clock: Callable[[], float] = time.thread_time,
) -> Samples:
    samples = Samples(data_bytes, {name: [] for name in named})
    rng = np.random.default_rng(seed)
    for run in named.values():
        run()
    for _ in range(rounds):
        for name in rng.permutation(list(named)):
            start = clock()
            named[str(name)]()
            samples.seconds[str(name)].append(clock() - start)
    return samples


def device_figures(job: Job, label: str, rounds: int) -> list[dict[str, Any]]:
    """The same job on a GPU, if there is one, beside a copy of its inputs there: wall clock, queue drained."""
    if not importlib.util.find_spec("torch"):
        return []
    import torch
    from refound.erasure import tensors

    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda", torch.cuda.current_device())
    name = f"cuda {tensors.device_backend(device).name}"
    ins, outs = ([torch.from_numpy(a).to(device) for a in arrays] for arrays in (job.ins, job.outs))
    copies = [torch.empty_like(tensor) for tensor in ins]

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    named = {
        "cuda copy": lambda: [copy.copy_(tensor) for copy, tensor in zip(copies, ins, strict=True)],
        name: lambda: tensors.apply_tensors(job.matrix, ins, outs),
    }
    samples = measure(named, job.code.k * job.ins[0].size, rounds, seed=5, clock=clock)
    ratio = samples.ratio(name, "cuda copy")
    bar = ">= 0.8" if name == "cuda triton" else ""
    return [
        *[figure(f"{label} {each}", samples.gb_per_s(each), "GB/s") for each in named],
        figure(f"{label} {name} / cuda copy", ratio, "x", bar, ratio >= 0.8 if bar else None),
    ]


def code_figures(code: Code, kind: str, samples: Samples) -> list[dict[str, Any]]:
    label = f"{kind} ({code.k},{code.m})"
    figures = []
    for name in samples.seconds:
        bar = 4.0 if name == "portable" and (code.k, code.m) == (4, 2) else None
        value = samples.gb_per_s(name)
        figures.append(
            figure(f"{label} {name}", value, "GB/s", f">= {bar}" if bar else "", value >= bar if bar else None)
        )
    for name in samples.seconds:
        for other in ("direct ISA-L", "memcpy", "zfec"):
            if name == other or other not in samples.seconds or name in ("memcpy", "direct ISA-L", "zfec"):
                continue
            bar = {"direct ISA-L": 0.95, "memcpy": 1.0}.get(other)
            if name != "isal" or (code.k, code.m) != (4, 2) or not has_gfni():
                bar = None
            value = samples.ratio(name, other)
            holds = value >= bar if bar else None
            figures.append(figure(f"{label} {name} / {other}", value, "x", f">= {bar}" if bar else "", holds))
    return figures


def checksum_figures(shard_bytes: int, rounds: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    (source, target) = _shards(2, shard_bytes, rng)
    named = {
        "memcpy": lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, source.size),
        backend().checksum_name: lambda: checksum(source),
        "CRC32C (numpy)": lambda: crc.crc32c(source),
        "zlib.crc32": lambda: zlib.crc32(source),
    }
    samples = measure(named, shard_bytes, rounds, seed=3)
    bucket = source[: 1 << 20]
    start = time.thread_time()
    for _ in range(100):
        checksum(bucket)
    return [
        *[figure(f"checksum {name}", samples.gb_per_s(name), "GB/s") for name in named],
        figure("checksum of a 1 MiB bucket", (time.thread_time() - start) / 100 * 1e6, "us"),
    ]


def has_gfni() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and " gfni" in info.read_text()


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [name for name in ("avx2", "avx512f", "gfni", "asimd", "sve", "sve2") if name in flags],
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "backend": backend().name,
        "library": Path(backend().library or "").name or None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--shard-mib", type=float, default=32, help="size of a shard in MiB (32)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of (7)")
    parser.add_argument("--codes", nargs="+", default=[f"{k},{m}" for k, m in CODES], metavar="K,M")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders only, and memcpy")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(20)
    size = int(options.shard_mib * (1 << 20))
    figures: list[dict[str, Any]] = []
    before = machine()
    for text in options.codes:
        code = Code(*map(int, text.split(",")))
        for job in jobs(code, size, rng):
            kind = "decode" if job.decode else "encode"
            print(f"{kind} ({code.k},{code.m}) …", file=sys.stderr, flush=True)
            named = contenders(job, rng)
            if options.only:
                named = {name: run for name, run in named.items() if name in (*options.only, "memcpy")}
            figures += code_figures(code, kind, measure(named, code.k * size, options.rounds, seed=code.k))
            figures += device_figures(job, f"{kind} ({code.k},{code.m})", options.rounds)
    figures += checksum_figures(size, options.rounds, rng)
    tell(figures, as_json=options.json, machine=before)


if __name__ == "__main__":
    main()
