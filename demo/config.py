# SPDX-License-Identifier: Apache-2.0
"""What the demo may be told."""

from dataclasses import dataclass
from pathlib import Path

from ..ckpt.faults import Fault, FaultRangeError, check_schedule, parse_fault

FULL_STEPS, TINY_STEPS = 12, 30


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What `refound demo` may be told. One rank a node."""

    tiny: bool = False
    """A Llama of a million random parameters instead of SmolLM2-135M."""
    faults: tuple[str, ...] = ()
    """As in `node=1 step=7 kill`. None: a worker after a third of the steps, a node after two thirds."""
    out: Path = Path("runs/demo")
    """Records, logs and report go here."""
    json: bool = False
    """Leave stdout to the caller's JSON: no closing table."""
    seed: int = 0
    """Of data order and noise."""
    steps: int | None = None
    """None: 12, or 30 with `tiny`."""
    nodes: int = 3

    @property
    def target_steps(self) -> int:
        return self.steps or (TINY_STEPS if self.tiny else FULL_STEPS)

    def schedule(self) -> tuple[Fault, ...]:
        """The faults, checked against the job.

        Raises:
            FaultSyntaxError: for one that cannot be read.
            FaultRangeError: for one that this job cannot meet.
        """
        steps = self.target_steps
        texts = self.faults
        if not texts:
            if steps < 3:
                raise FaultRangeError(f"{steps} steps have no room for a killed worker and a lost node; the least is 3")
            texts = (f"rank=1 step={steps // 3} kill", f"node=2 step={2 * steps // 3} kill")
        faults = tuple(parse_fault(text) for text in texts)
        check_schedule(faults, nodes=self.nodes, ranks=self.nodes, steps=steps)
        return faults
