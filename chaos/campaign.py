# SPDX-License-Identifier: Apache-2.0
"""Running many schedules, a few beside each other, each in processes and a folder of its own."""

import itertools
import math
import os
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..ckpt.errors import SnapshotError
from .draw import SETS, random_schedule
from .house import House
from .network import Namespaces, can_make_namespaces
from .referee import HungError, Referee, WrongError
from .schedule import Schedule
from .template import Template
from .verdict import Verdict

_NAMESPACES = 9
"""Enough for four nodes, and one in the place of each that three faults take away, and to spare."""
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class SmpCampaign:
    """What to run: random schedules from a seed on, a whole set, or given ones; `first` and `runs` choose a slice."""

    runs: int
    seed: int = 0
    chosen: str = ""
    """A name of `SETS`; empty: random ones."""
    given: tuple[Schedule, ...] = ()
    first: int = 0
    beside: int = 1
    """Schedules at a time."""
    for_s: float = math.inf
    """No schedule is begun after so many seconds."""
    out: Path = Path("runs/chaos")

    def plan(self) -> list[tuple[int, Schedule]]:
        """Number and schedule. A random schedule's number is its seed."""
        if self.given:
            return list(enumerate(self.given * self.runs))
        if self.chosen:
            return list(enumerate(SETS[self.chosen]()))[self.first : self.first + self.runs]
        numbers = range(self.seed + self.first, self.seed + self.first + self.runs)
        return [(number, random_schedule(number)) for number in numbers]


def run(campaign: SmpCampaign, told: Callable[[Verdict], None]) -> list[Verdict]:
    """Run all of it; `told` hears of each as it ends. What a bad one left behind is kept in `campaign.out`.

    Raises SnapshotError if the campaign itself cannot run.
    """
    campaign.out.mkdir(parents=True, exist_ok=True)
    plan, lock, verdicts = campaign.plan(), threading.Lock(), list[Verdict]()
    with _own_directory(), Template() as template, ThreadPoolExecutor(campaign.beside) as pool:
        shares = [plan[i :: campaign.beside] for i in range(campaign.beside)]

        def note(verdict: Verdict) -> None:
            with lock:
                verdicts.append(verdict)
                told(verdict)

        stopped = threading.Event()
        futures = [pool.submit(_run_share, share, template, campaign, note, stopped) for share in shares]
        try:
            for future in futures:
                future.result()
        finally:
            stopped.set()  # whatever ended this one, the others end after the schedule that they are at
    return sorted(verdicts, key=lambda verdict: verdict.number)


def _run_share(
    share: Sequence[tuple[int, Schedule]],
    template: Template,
    campaign: SmpCampaign,
    note: Callable[[Verdict], None],
    stopped: threading.Event,
) -> None:
    began_s = time.monotonic()
    with ExitStack() as stack:
        net = stack.enter_context(Namespaces(_NAMESPACES, next(_numbers))) if can_make_namespaces() else None
        for number, schedule in share:
            if stopped.is_set() or time.monotonic() - began_s > campaign.for_s:
                return
            note(run_one(schedule, template, net, campaign.out, number))


def run_one(schedule: Schedule, template: Template, net: Namespaces | None, out: Path, number: int = 0) -> Verdict:
    """One schedule. What its processes said is kept in `out` if it did not end well."""
    verdict = Verdict(schedule=schedule, number=number)
    job = f"campaign-{os.getpid()}-{next(_numbers)}"
    scratch, began_s = Path(tempfile.mkdtemp(prefix="refound-campaign-")) / job, time.monotonic()
    try:
        with House(schedule, job, scratch, template, net) as house:
            try:
                Referee(schedule, house, verdict).run()
            except HungError:
                house.tell_where()
                raise
        verdict.outcome = _outcome(verdict)
    except WrongError as error:
        verdict.outcome, verdict.why = error.args
    except HungError as error:
        verdict.outcome, verdict.why = "hung", str(error)
    except (SnapshotError, OSError) as error:
        verdict.outcome, verdict.why = "failed", f"{type(error).__name__}: {error}"
        (scratch / "campaign.txt").write_text(traceback.format_exc())
    verdict.seconds = time.monotonic() - began_s
    if verdict.is_good and (said := _unforeseen(scratch)):
        verdict.outcome, verdict.why = "failed", said
    if not verdict.is_good:
        shutil.copytree(scratch, out / job, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.rmtree(scratch.parent, ignore_errors=True)
    return verdict


def _outcome(verdict: Verdict) -> str:
    if not verdict.fallen:
        return "unmet"
    return "refused" if any(restart.gave_up for restart in verdict.restarts) else "recovered"


def _unforeseen(scratch: Path) -> str:
    """The first error in the logs that no code of the snapshot process was prepared for; empty if there is none."""
    for log in sorted(scratch.glob("*.log")):
        text = log.read_text(errors="replace")
        if "Traceback" in text:
            return f"{log.name}: {text[text.index('Traceback') :].strip()[-600:]}"
    return ""


@contextmanager
def _own_directory() -> Iterator[None]:
    """Sockets of a campaign's jobs do not mix with those of anybody's real ones."""
    before, folder = os.environ.get("REFOUND_DIR"), tempfile.mkdtemp(prefix="refound-chaos-")
    os.environ["REFOUND_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["REFOUND_DIR"]
        else:
            os.environ["REFOUND_DIR"] = before
        shutil.rmtree(folder, ignore_errors=True)
