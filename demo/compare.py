# SPDX-License-Identifier: Apache-2.0
"""Are two runs the same, bit for bit? Every loss, gradient norm, final weight and optimizer tensor is compared."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import StepRecord, read_digests, read_steps

MAX_DIFFERENCES = 20


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared, and each thing that differs, in words (the first `MAX_DIFFERENCES` of them)."""

    losses: int
    losses_again: int
    """Losses of steps that were run a second time, after a restart: compared with the same reference."""
    tensors: int
    differences: tuple[str, ...]

    @property
    def identical(self) -> bool:
        return not self.differences


def compare_runs(reference: Path, other: Path, *, steps: int) -> Comparison:
    """Compares two runs of `steps` steps by what they left in their directories.

    Raises:
        RecordError: if a run left no whole record of itself.
    """
    first, second = read_steps(reference), read_steps(other)
    expected, found = read_digests(reference), read_digests(other)
    differences = [*_steps(first, second, steps), *_digests(expected, found, steps)]
    shown = differences[:MAX_DIFFERENCES]
    if len(differences) > len(shown):
        shown.append(f"and {len(differences) - len(shown)} more")
    return Comparison(
        losses=len({record.step for record in second}),
        losses_again=len(second) - len({record.step for record in second}),
        tensors=sum(len(entry["digests"]) for entry in found.values()),
        differences=tuple(shown),
    )


def _steps(reference: Sequence[StepRecord], other: Sequence[StepRecord], steps: int) -> Iterator[str]:
    expected: dict[int, StepRecord] = {}
    for name, records in (("reference", reference), ("other", other)):
        if missing := sorted(set(range(1, steps + 1)) - {record.step for record in records}):
            yield f"the {name} run has no record of step {', '.join(map(str, missing))}"
    for record in (*reference, *other):
        before = expected.setdefault(record.step, record)
        if record.loss_hex != before.loss_hex:
            yield f"step {record.step}: loss {record.loss!r}, not {before.loss!r}"
        if record.grad_norm_hex != before.grad_norm_hex:
            yield f"step {record.step}: gradient norm {record.grad_norm!r}, not {before.grad_norm!r}"


def _digests(
    reference: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]], steps: int
) -> Iterator[str]:
    if reference.keys() != other.keys():
        yield f"ranks {sorted(other)} at the end, not {sorted(reference)}"
    for rank in sorted(reference.keys() & other.keys()):
        for name, entry in (("reference", reference[rank]), ("other", other[rank])):
            if entry["step"] != steps:
                yield f"rank {rank}: the {name} run ended at step {entry['step']}, not {steps}"
        expected, found = reference[rank]["digests"], other[rank]["digests"]
        for tensor in sorted(expected.keys() | found.keys()):
            if tensor not in found or tensor not in expected:
                yield f"rank {rank}: {tensor} is in one run only"
            elif expected[tensor] != found[tensor]:
                yield f"rank {rank}: {tensor} differs"
