# SPDX-License-Identifier: Apache-2.0
"""Train through random fault schedules, run after run; each must end with the bits of its undisturbed twin.

    python tests/chaos/campaign.py [--runs 10] [--seed N] [--most 4] [--full] [--dry-run] [--json] [--out runs/chaos]

Every run is `refound demo` with a schedule drawn from the run's own seed: workers, agents, snapshot processes and whole
nodes are killed, up to 400 ms after a step has ended, so that copy, parity exchange, commit and recovery are all met.
A run that fails prints the one line that repeats it. Exit code 3 if bits differ, 1 if a run failed or hung.
"""

import argparse
import json
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refound.ckpt.faults import Fault, random_schedule
from refound.demo.config import FULL_STEPS, TINY_STEPS

FAILED, DAMAGE = 1, 3
NODES = 3
HANGS_AFTER_S = 1800.0
_GRACE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run to be: its seed says all about it."""

    seed: int
    full: bool
    faults: tuple[Fault, ...]

    @classmethod
    def draw(cls, seed: int, *, full: bool, most: int) -> "Run":
        """The run of a seed: 1 to `most` faults at different steps."""
        steps = FULL_STEPS if full else TINY_STEPS
        count = random.Random(f"count {seed}").randint(1, most)
        return cls(seed=seed, full=full, faults=random_schedule(seed, NODES, NODES, steps, count))

    def command(self) -> list[str]:
        """What repeats it, after `refound`."""
        words = ["demo", *([] if self.full else ["--tiny"]), f"--seed={self.seed}"]
        return words + [word for fault in self.faults for word in ("--fault", str(fault))]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a run ended."""

    outcome: str
    """"identical", "differs", "failed" or "hung"."""
    seconds: float
    recovered_from: tuple[str, ...] = ()
    steps_lost: int = 0
    why: str = ""

    @property
    def exit_code(self) -> int:
        return {"identical": 0, "differs": DAMAGE}.get(self.outcome, FAILED)


def judge(code: int | None, stdout: str, stderr: str, seconds: float) -> Verdict:
    """Read the end of a `refound demo --json`. code: None if it had to be stopped."""
    if code is None:
        return Verdict(outcome="hung", seconds=seconds, why=_last_line(stderr))
    if code not in (0, DAMAGE):
        return Verdict(outcome="failed", seconds=seconds, why=_last_line(stderr))
    told: dict[str, Any] = json.loads(stdout)
    left = sum(run["left_behind"] for run in told["runs"].values())
    outcome, why = "identical", ""
    if code == DAMAGE or told["bit_identical"] is not True:
        outcome, why = "differs", "; ".join(told["differences"])
    elif left:
        outcome, why = "failed", f"{left} processes were left behind"
    return Verdict(
        outcome=outcome,
        seconds=seconds,
        recovered_from=tuple(fault["recovered_from"] or "not needed" for fault in told["faults"]),
        steps_lost=sum(fault["steps_lost"] for fault in told["faults"]),
        why=why,
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def execute(run: Run, out: Path) -> Verdict:
    """Run it to its end, or stop it when it hangs."""
    command = [sys.executable, "-m", "refound", *run.command(), "--json", f"--out={out / f'seed-{run.seed}'}"]
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        code = None
        try:
            stdout, stderr = process.communicate(timeout=HANGS_AFTER_S)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it clears its nodes away
            try:
                stdout, stderr = process.communicate(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.communicate()
            raise
    return judge(code, stdout, stderr, time.monotonic() - began)


def tell(run: Run, verdict: Verdict, number: int, runs: int) -> None:
    """One line for a run, and what repeats it if it did not go well."""
    sources = Counter(verdict.recovered_from)
    recovered = ", ".join(f"{count} x {source}" for source, count in sorted(sources.items()))
    faults = "; ".join(map(str, run.faults))
    line = f"{number}/{runs}  seed {run.seed}  {verdict.outcome} in {verdict.seconds:.0f} s  [{faults}]"
    print(f"{line}  {recovered}, {verdict.steps_lost} steps lost" if recovered else line, file=sys.stderr, flush=True)
    if verdict.outcome != "identical":
        print(f"  {verdict.why}\n  again: refound {shlex.join(run.command())}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--seed", type=int, help="of the first run, the others follow (default: drawn, and printed)")
    parser.add_argument("--most", type=int, default=4, help="faults in one run at most (default: 4)")
    parser.add_argument("--full", action="store_true", help="SmolLM2-135M instead of the small model")
    parser.add_argument("--dry-run", action="store_true", help="only print the schedules")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="records and logs (default: runs/chaos)")
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.most < 1:
        parser.error("--runs and --most must be at least 1")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1_000_000)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    runs = [Run.draw(options.seed + i, full=options.full, most=options.most) for i in range(options.runs)]
    print(f"{len(runs)} runs, seeds {runs[0].seed} to {runs[-1].seed}", file=sys.stderr, flush=True)
    if options.dry_run:
        for run in runs:
            print(f"refound {shlex.join(run.command())}")
        return 0
    verdicts: list[Verdict] = []
    for number, run in enumerate(runs, 1):
        verdicts.append(execute(run, options.out))
        tell(run, verdicts[-1], number, len(runs))
    good = sum(verdict.outcome == "identical" for verdict in verdicts)
    faults = sum(len(run.faults) for run in runs)
    print(f"{good} of {len(runs)} runs ended bit-identical, through {faults} faults", file=sys.stderr)
    if options.json:
        rows = [
            {"seed": run.seed, "faults": [str(f) for f in run.faults], **asdict(verdict)}
            for run, verdict in zip(runs, verdicts, strict=True)
        ]
        print(json.dumps({"identical": good, "runs": rows}))
    return max(verdict.exit_code for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
