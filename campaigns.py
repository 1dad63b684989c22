# SPDX-License-Identifier: Apache-2.0
"""`refound chaos`: the two campaigns, what they print, and their exit codes."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

from .exits import DAMAGE, FAILED


def run_job_tier(runs: int, seed: int, out: Path, as_json: bool, *, most: int, full: bool, dry_run: bool) -> None:
    """Trainings under torchrun, each to end with the undisturbed run's bits. Exits if one does not."""
    from .demo.chaos import ChaosConfig, run_campaign
    from .demo.errors import DemoError

    config = ChaosConfig(runs=runs, seed=seed, most=most, full=full, out=out)
    click.echo(f"{runs} runs, seeds {seed} to {seed + runs - 1}", err=True)
    if dry_run:
        for schedule in config.plan():
            click.echo(schedule.command())
        return
    try:
        campaign = run_campaign(config)
    except DemoError as error:
        raise click.ClickException(str(error)) from error
    click.echo(campaign.summary(), err=as_json)
    if as_json:
        click.echo(json.dumps(campaign.to_json()))
    if campaign.identical < runs:
        sys.exit(FAILED if campaign.failed else DAMAGE)


def run_smp_tier(runs: int, seed: int, out: Path, as_json: bool, **more: Any) -> None:
    """Schedules over snapshot processes alone. Exits if one ends badly."""
    from .chaos.campaign import SmpCampaign, run
    from .chaos.schedule import parse_schedule
    from .chaos.verdict import Verdict, summary

    try:
        given = (parse_schedule(more["reproduce"]),) if more["reproduce"] else ()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--reproduce'") from error
    chosen = more["chosen"] or ""
    campaign = SmpCampaign(
        runs=runs,
        seed=seed,
        chosen=chosen,
        given=given,
        first=more["first"],
        beside=more["beside"],
        for_s=more["for_s"],
        out=out,
    )
    plan = campaign.plan()
    what = f"set {chosen}, from {more['first']}" if chosen else f"seeds {seed} to {seed + runs - 1}"
    click.echo(f"{len(plan)} runs, {'given' if given else what}", err=True)
    if more["dry_run"]:
        for number, schedule in plan:
            click.echo(Verdict(schedule=schedule, number=number).command())
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))  # by way of what has to be taken down
    verdicts = run(campaign, lambda verdict: click.echo(verdict.line(), err=True))
    counts = summary(verdicts)
    if as_json:
        click.echo(json.dumps({**counts, "runs": [verdict.to_json() for verdict in verdicts]}))
    else:
        click.echo(", ".join(f"{count} {outcome}" for outcome, count in counts["outcomes"].items()))
    if bad := [verdict for verdict in verdicts if not verdict.is_good]:
        sys.exit(DAMAGE if any(verdict.outcome == "wrong" for verdict in bad) else FAILED)
