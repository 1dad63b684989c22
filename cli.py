# SPDX-License-Identifier: Apache-2.0
"""The command line and nothing else: what is typed, what is printed, the exit code. Models have `cli_models.py`.

What is heavy is imported inside the command that needs it: `--help`, `doctor` and `status` start fast.
"""

import contextlib
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__
from .ckpt.errors import SnapshotError
from .cli_heads import heads
from .cli_models import bench, distill, export, search
from .cli_moe import carve, pregate, trace
from .cli_serving import plan_serving, simulate_serving
from .cli_tune import adapter, tune
from .exits import DAMAGE, FAILED, USAGE, Commands, UsageError
from .plan_settings import SETTINGS, Setting

_EPILOG = """\b
Exit codes:
  0   done
  1   failed
  2   wrong usage or bad configuration
  3   a check ran and found damage or a mismatch
  75  stopped after a safe save; run the same command again to continue
"""


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="refound", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Training that survives its machines.

    \b
    Examples:
      refound doctor                                is this machine fit, and what to change if not
      refound demo --tiny                           train through a killed worker and a lost node, in a minute
      refound demo --fault 'node=1 step=7 kill'     the same with a fault of your own
      refound status --watch                        what the snapshot processes hold right now
      refound verify                                is it still what was put there
      refound plan --nodes 64 --params 70B          what protection costs a job and what it saves
      refound search recipes/smollm2.toml --toy     the best smaller model for a budget, in three minutes
      refound tune recipes/lora-smollm2.toml        an adapter, and how it is served
      refound distill CHILD --teacher MODEL …       what a child forgot, learned again from its teacher
      refound heads MODEL --kind medusa             what guesses a model's next tokens, and the speed-up
      refound carve MODEL --shared 512 --active 4   a mixture of experts that stock engines serve
      refound export MODEL --to vllm,llama.cpp      what stock engines load, proven equal to MODEL

    \b
    To protect your own script, call refound.protect() in it and launch it with:
      torchrun --rdzv-backend=refound --rdzv-endpoint=HOST:29400 --rdzv-id=JOB … train.py
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(USAGE)


def _check_faults(context: click.Context, parameter: click.Parameter, faults: tuple[str, ...]) -> tuple[str, ...]:
    from .ckpt.faults import parse_fault

    for fault in faults:
        try:
            parse_fault(fault)
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from error
    return faults


@main.command(short_help="Train a real model twice, once through faults, and compare the bits.")
@click.option("--tiny", is_flag=True, help="A small model instead of SmolLM2-135M: under a minute.")
@click.option(
    "--fault",
    "faults",
    multiple=True,
    callback=_check_faults,
    metavar="'node=1 step=7 kill'",
    help="A fault of your own; give it again for more. They replace the built-in schedule.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Where the report, the logs and the checkpoints go.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Training steps.  [default: set by the demo]")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the data order and the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def demo(tiny: bool, faults: tuple[str, ...], out: Path, steps: int | None, seed: int, as_json: bool) -> None:
    """Train a real model twice, once through faults, and compare the bits.

    Then the trained model is read out of the job's memory, exported, and continued by every engine that is installed.

    \b
    Examples:
      refound demo                                            SmolLM2-135M over 3 nodes, about 5 minutes
      refound demo --tiny                                     a small model, under a minute
      refound demo --tiny --fault 'node=1 step=7 kill'        lose node 1 at step 7

    Exit code 3 if weights, optimizer state or any loss differ between the two runs, or an engine says something else.
    """
    from .ckpt.faults import FaultRangeError
    from .demo.errors import DemoError
    from .demo.run import DemoConfig, run_demo
    from .demo_serving import Served

    config = DemoConfig(tiny=tiny, faults=faults, out=out, json=as_json, seed=seed, steps=steps)
    served = Served(config)
    try:
        result = run_demo(config, served.take)
    except FaultRangeError as error:
        raise click.BadParameter(str(error), param_hint="'--fault'") from error
    except DemoError as error:
        raise click.ClickException(str(error)) from error
    served.run(lambda line: click.echo(line, err=True))
    click.echo(json.dumps(result.to_json() | {"served": served.to_json()}) if as_json else served.to_text())
    if not (result.bit_identical and served.alike):
        sys.exit(DAMAGE)


@main.command(short_help="A campaign of faults: nothing may be lost that is promised, nothing false restored.")
@click.option(
    "--tier",
    type=click.Choice(["job", "smp"]),
    default="job",
    show_default=True,
    help="job: the small demo under torchrun, half a minute a run. smp: snapshot processes alone, a second a run.",
)
@click.option("--runs", type=click.IntRange(min=1), help="How many schedules.  [default: 10; of --reproduce 1]")
@click.option("--seed", type=int, help="Of the first schedule; the others follow.  [default: drawn, and printed]")
@click.option("--only", type=click.IntRange(min=0), help="Only this number: of the set, or counted from the seed.")
@click.option(
    "--most", type=click.IntRange(1, 8), default=4, show_default=True, help="Faults in one run at most (job)."
)
@click.option("--full", is_flag=True, help="SmolLM2-135M instead of the small model (job).")
@click.option(
    "--set",
    "chosen",
    type=click.Choice(["single", "disk", "recovery", "pairs"]),
    help="Every schedule of a kind instead of random ones (smp).",
)
@click.option("--first", type=click.IntRange(min=0), default=0, help="Skip so many of the set (smp).")
@click.option("--beside", type=click.IntRange(1, 64), default=2, show_default=True, help="Schedules at a time (smp).")
@click.option("--for-s", type=float, default=math.inf, help="Begin no schedule after so many seconds (smp).")
@click.option("--reproduce", metavar="SCHEDULE", help="Run this one, as a campaign has printed it (smp).")
@click.option("--dry-run", is_flag=True, help="Only print the schedules, as commands that run them one by one.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/chaos"),
    show_default=True,
    help="Where the records and the logs go.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def chaos(
    tier: str, runs: int | None, seed: int | None, only: int | None, out: Path, as_json: bool, **more: Any
) -> None:
    """Run fault schedules; nothing that is promised may be lost, and nothing false restored.

    \b
    Examples:
      refound chaos                                    ten trainings, each to end with the undisturbed run's bits
      refound chaos --runs 100 --seed 7                a hundred; the same seed draws the same ones
      refound chaos --tier smp --runs 1000             a thousand over snapshot processes alone
      refound chaos --tier smp --set single --runs 999 every fault at every point of a snapshot's life
      refound chaos --dry-run                          what would fall

    Exit code 3 if bits differ in any run, 1 if a run failed, hung or lost what it need not have.
    """
    drawn = random.SystemRandom().randrange(1_000_000) if seed is None else seed
    runs = runs or (1 if more["reproduce"] else 10)
    if only is not None:
        runs, drawn, more["first"] = 1, drawn + (0 if more["chosen"] else only), only if more["chosen"] else 0
    from . import campaigns

    if tier == "smp":
        campaigns.run_smp_tier(runs, drawn, out, as_json, **more)
    else:
        campaigns.run_job_tier(runs, drawn, out, as_json, most=more["most"], full=more["full"], dry_run=more["dry_run"])


@main.command(short_help="Is this machine fit, and what to do if not.")
@click.option(
    "--checkpoint-dir",
    type=click.Path(path_type=Path),
    help="Also try the directory where the job's checkpoints will go.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object on stdout.")
def doctor(checkpoint_dir: Path | None, as_json: bool) -> None:
    """Look at this machine: what works, what does not, and what to do about it.

    \b
    Examples:
      refound doctor
      refound doctor --checkpoint-dir /scratch/my-job
      refound doctor --json

    Exit code 1 if something that refound needs is missing.
    """
    from . import doctor as examination

    findings = examination.examine(checkpoint_dir)
    click.echo(json.dumps(examination.to_json(findings), indent=2) if as_json else examination.to_text(findings))
    if examination.failed(findings):
        sys.exit(FAILED)


def _plan_option(setting: Setting) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As text: the plan tells all mistakes at once."""
    told = setting.default or setting.derived
    return click.option(
        f"--{setting.flag}",
        setting.field,
        metavar=setting.unit.upper() or "NUMBER",
        help=setting.help + (f"  [default: {told}]" if told else ""),
    )


def _plan_options(command: Callable[..., None]) -> Callable[..., None]:
    for setting in reversed(SETTINGS):
        command = _plan_option(setting)(command)
    return command


@main.command(short_help="What protection would cost a job and what it would save.")
@_plan_options
@click.option("--check", is_flag=True, help="Hold the survival formulas against random draws.")
@click.option(
    "--simulate",
    "simulated",
    type=click.Choice(["job", "llama3"]),
    help="Put the job, or the published run of Llama 3 405B, through random interruptions.",
)
@click.option("--runs", type=click.IntRange(2, 10_000), default=50, show_default=True, help="Simulated runs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object on stdout.")
def plan(check: bool, simulated: str | None, runs: int, seed: int, as_json: bool, **options: str | None) -> None:
    """Compute what each code costs a job and what it saves, and recommend one. Starts and measures nothing.

    \b
    Examples:
      refound plan --nodes 64 --params 70B --mtbf-hours 30 --step-s 4
      refound plan --nodes 2048 --gpus-per-node 8 --params 70e9 --mtbf-hours 8 --check
      refound plan --simulate llama3

    Units may be written out: 70B, 3.2TB, 100Gbit/s, 90min, 25%, inf. What is left out is assumed, and the assumption
    printed. Formulas, and what they leave out: docs/plan.md. Exit code 3 if --check finds that they disagree with what
    is drawn.
    """
    from .ckpt.failures import RECORDS
    from .plan import make_report, to_json, to_text
    from .plan_settings import read

    request = read(options, RECORDS.get(simulated or ""))
    report = make_report(request, check=check, simulated=simulated is not None, runs=runs, seed=seed)
    click.echo(json.dumps(to_json(report)) if as_json else to_text(report))
    if not report.agrees:
        sys.exit(DAMAGE)


@main.command(short_help="What the snapshot processes here can restore.")
@click.option("--watch", is_flag=True, help="Again and again, until Ctrl-C.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two looks with --watch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, one object a line.")
def status(watch: bool, interval_s: float, as_json: bool) -> None:
    """Show the snapshot processes on this machine and what they can restore.

    \b
    Examples:
      refound status
      refound status --watch
      refound status --json
    """
    from .ckpt.client import find_nodes
    from .status import to_json, to_text

    # Ctrl-C is how a watch ends, not how it fails.
    with contextlib.suppress(KeyboardInterrupt) if watch else contextlib.nullcontext():
        while True:
            nodes = find_nodes()
            if watch and not as_json and sys.stdout.isatty():
                click.clear()
            click.echo(json.dumps(to_json(nodes)) if as_json else to_text(nodes))
            if not watch:
                return
            time.sleep(interval_s)


@main.command(short_help="Check every byte of snapshots in memory and of checkpoints.")
@click.argument("target", required=False, metavar="[PATH | JOB]")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object on stdout.")
def verify(target: str | None, as_json: bool) -> None:
    """Check every bucket against the checksum that was taken as it was copied.

    PATH: a checkpoint, or a directory of checkpoints. JOB: its snapshots in this machine's memory, while it trains.
    Without either: all memory of all your jobs here. Nothing is changed.

    \b
    Examples:
      refound verify
      refound verify my-job
      refound verify /scratch/my-job/step-000000001000-g000001

    Exit code 0 if all is sound, 3 if damage is found.
    """
    from .integrity import to_json, to_text
    from .integrity import verify as check

    verdicts = check(target)
    click.echo(json.dumps(to_json(verdicts)) if as_json else to_text(verdicts))
    if not all(verdict.is_sound for verdict in verdicts):
        sys.exit(DAMAGE)


@main.command(short_help="Rebuild a damaged checkpoint from its parity.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON object on stdout.")
def repair(path: Path, as_json: bool) -> None:
    """Rebuild what is damaged of the checkpoint at PATH from its parity, and check all of it again.

    New files are made and proven beside the damaged ones before any of them is replaced. A checkpoint that restarts
    had set aside counts again afterwards.

    \b
    Example:
      refound repair /scratch/my-job/step-000000001000-g000001

    Exit code 3 if parity does not cover the damage; nothing is changed then.
    """
    from .ckpt.examine import find_checkpoints
    from .ckpt.repair import repair as mend
    from .integrity import repair_json, repair_text

    checkpoints = find_checkpoints(path)
    if checkpoints != [path]:
        names = ", ".join(checkpoint.name for checkpoint in checkpoints)
        raise UsageError(f"{path} holds several checkpoints; name one of {names}. See: refound verify {path}")
    try:
        done = mend(path)
    except OSError as error:
        where = error.filename or path
        raise click.ClickException(
            f"{where} could not be written: {error.strerror}; nothing is lost, try again"
        ) from error
    click.echo(json.dumps(repair_json(done)) if as_json else repair_text(done))


@main.command(short_help="Write a snapshot or checkpoint as safetensors or as a DCP checkpoint.")
@click.argument("source", metavar="PATH|JOB")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["safetensors", "dcp"]), required=True, help="What to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier conversion at DEST.")
@click.option(
    "--largest-file-mb",
    type=click.IntRange(min=1),
    default=5000,
    show_default=True,
    help="Split larger safetensors files, with an index, as Hugging Face does.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object on stdout.")
def convert(source: str, dest: Path, kind: str, overwrite: bool, largest_file_mb: int, as_json: bool) -> None:
    """Write a checkpoint, or the newest snapshot of a running job, as plain files at DEST.

    Tensors that were sharded (FSDP2, tensor parallelism) become whole ones. safetensors: model.safetensors, one file
    for each other protected object, refound.json for what is no tensor. dcp: what torch's dcp.load reads.

    \b
    Examples:
      refound convert /scratch/my-job/step-000000001000-g000001 out --to safetensors
      refound convert my-job out --to dcp            from memory, while the job trains

    Every byte is checked first; exit code 3 if something is damaged beyond its parity.
    """
    from .ckpt.convert import convert as write
    from .ckpt.source import open_source

    try:
        with open_source(source) as opened:
            names = write(opened, dest, kind, overwrite=overwrite, largest_bytes=largest_file_mb * 1_000_000)
            step = opened.facts["step"]
    except OSError as error:
        if isinstance(error, SnapshotError):
            raise
        where = error.filename or dest
        raise click.ClickException(
            f"{where} could not be written: {error.strerror}; nothing is left at {dest}"
        ) from error
    if as_json:
        click.echo(json.dumps({"schema": 1, "step": step, "path": str(dest), "to": kind, "files": names}))
    else:
        click.echo(f"step {step} written to {dest}: {', '.join(names)}")


@main.command(short_help="Free the memory of a job that will not come back.")
@click.argument("job")
@click.option("--force", is_flag=True, help="Even while its torchrun is alive: the job loses its snapshots.")
def stop(job: str, force: bool) -> None:
    """Tell the snapshot processes of JOB on this machine to free their memory and go away.

    They go by themselves when the job ends well, and when its lease runs out after it did not.

    \b
    Example:
      refound stop my-job
    """
    from .ckpt.client import find_nodes, stop_job

    nodes = find_nodes()
    alive = [node for node in nodes if node["job"] == job and node["agent_pid"] is not None]
    if alive and not force:
        pids = ", ".join(str(node["agent_pid"]) for node in alive)
        raise click.ClickException(
            f"job {job!r} is running (torchrun pid {pids}) and would lose its snapshots. "
            f"End torchrun first, or say so: refound stop {job} --force"
        )
    told = stop_job(job)
    if told == 0:
        others = sorted({node["job"] for node in nodes})
        known = f"here are: {', '.join(others)}" if others else "here is none at all"
        raise click.ClickException(f"no snapshot process of job {job!r} on this machine; {known}. See: refound status")
    click.echo(f"{told} snapshot process{'es' if told != 1 else ''} of job {job!r} told to stop")


for command in (export, bench, search, distill, tune, adapter, heads):
    main.add_command(command)
for command in (carve, pregate, trace, plan_serving, simulate_serving):
    main.add_command(command)
