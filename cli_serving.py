# SPDX-License-Identifier: Apache-2.0
"""The commands that plan how a mixture of experts is served: what is typed, what is printed, the exit code.

What is heavy is imported inside the command that needs it, as in `cli.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .exits import UsageError

if TYPE_CHECKING:
    import numpy as np

    from .nas.serving.plans import Settings, Subject

_TRACE = click.argument("trace", type=click.Path(path_type=Path))
_DEVICES = click.option(
    "--devices", required=True, type=click.Path(path_type=Path), help="GPUs, nodes, bandwidths and memory, as TOML."
)
_MODEL = click.option(
    "--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="The directory the trace is of."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")


def _settings(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Tokens a step."),
            click.option(
                "--active", type=click.IntRange(min=1), default=32, show_default=True, help="Sequences open at a time."
            ),
            click.option(
                "--patience", type=click.IntRange(min=1), default=8, show_default=True, help="Steps that one may wait."
            ),
            click.option(
                "--look-ahead",
                type=click.IntRange(min=0),
                default=64,
                show_default=True,
                help="Tokens whose experts a pre-gating router knows beforehand.",
            ),
            click.option(
                "--slots", type=click.IntRange(min=1), help="Experts a layer in a cache.  [default: by memory]"
            ),
            click.option("--unbalanced", is_flag=True, help="Place for fewest hops, however busy one device gets."),
            click.option("--seed", type=int, default=0, show_default=True, help="Of the placement's starts."),
        )
    ):
        command = option(command)
    return command


@click.command("plan-serving", short_help="Plan how a mixture of experts is served, from a trace of its routing.")
@_TRACE
@_DEVICES
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where the plans go.")
@_MODEL
@click.option(
    "--permute", type=click.Path(file_okay=False, path_type=Path), help="Also write MODEL so that engines realize it."
)
@click.option(
    "--map", "maps", multiple=True, metavar="ENGINE", help="Also write the placement for sglang, vllm-ascend."
)
@click.option("--bits", type=click.FloatRange(min=0, min_open=True), help="Also bits of experts, so many on average.")
@click.option(
    "--text", "sources", multiple=True, help="A source or file to measure bits on.  [default: Python's own docs]"
)
@_settings
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@_JSON
def plan_serving(
    trace: Path,
    devices: Path,
    out: Path,
    model: Path | None,
    permute: Path | None,
    maps: tuple[str, ...],
    bits: float | None,
    sources: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make plans on the first half of TRACE and judge them on the rest: placement of experts, groups of token ids and
    experts, caches, batches, and a predictor of routing paths.

    \b
    Examples:
      refound plan-serving trace.safetensors --devices devices.toml --out plans --model MODEL
      refound plan-serving trace.safetensors --devices devices.toml --out plans --model MODEL --permute MODEL-placed
      refound plan-serving trace.safetensors --devices devices.toml --out plans --model MODEL --map sglang
      refound plan-serving trace.safetensors --devices devices.toml --out plans --model MODEL --bits 4.5

    --permute numbers the experts anew, so that any engine that shares them out in order places them as planned; the
    model computes the same. The devices and the plans: docs/serving-plans.md. Exit code 3 if the trace is damaged or of
    another model, or the devices cannot hold its experts.
    """
    from .nas.serving import report
    from .nas.serving.plan_files import write_plans
    from .nas.serving.plans import make_plans, with_bits

    if (permute or bits or maps) and not model:
        raise UsageError("--permute, --bits and --map read the model, so --model must name it")
    _require()
    subject = _subject(trace, devices, model)
    # before the work, so that nobody learns at its end that it was in vain
    _require_places(out, permute, overwrite=overwrite)
    _require_maps(subject, maps)
    text = _text_for_bits(subject, model, bits, sources) if bits and model else None
    plans = make_plans(subject, _settings_of(options), _say)
    if text and bits and model:
        _say("measuring what rounding does to each expert")
        plans = with_bits(plans, subject, model, text, bits)
    files = write_plans(plans, out, maps=_maps(subject, maps, plans.placement), overwrite=overwrite)
    told = report.to_json(subject, plans)
    if permute and model:
        _permute(model, permute, subject, plans.placement, overwrite=overwrite)
        told["permuted"] = str(permute)
    told["files"] = [str(file) for file in files]
    lines = [report.plans_text(told), *report.served_text(plans)]
    click.echo(json.dumps(told, indent=2) if as_json else "\n".join(lines))
    _say(f"{out}: {', '.join(file.name for file in files)}")


@click.command("simulate-serving", short_help="Replay a routing trace on devices, with and without each plan.")
@_TRACE
@_DEVICES
@click.option(
    "--plans", type=click.Path(file_okay=False, path_type=Path), help="From plan-serving.  [default: made now]"
)
@_MODEL
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Batches to replay at most.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with plots.")
@_settings
@click.option("--overwrite", is_flag=True, help="Replace the page that is there.")
@_JSON
@click.pass_context
def simulate_serving(
    context: click.Context,
    trace: Path,
    devices: Path,
    plans: Path | None,
    model: Path | None,
    steps: int,
    html: Path | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Replay TRACE event by event: latency, hit rate and hops between devices, as engines do it, with each plan alone,
    and with all.

    \b
    Examples:
      refound simulate-serving trace.safetensors --devices devices.toml --model MODEL
      refound simulate-serving trace.safetensors --devices devices.toml --plans plans --html report.html

    Only sequences that the plans were not made on are replayed; of another trace of the same model those that have no
    text of it. What is simulated and what is not: docs/serving-plans.md. Exit code 3 if the trace is damaged or of
    another model than --model or the plans, or if the devices cannot hold its experts.
    """
    from .export.atomic import write_file
    from .nas.serving import report
    from .nas.serving.plan_files import read_plans
    from .nas.serving.plans import judged_part, make_plans
    from .nas.serving.scenarios import compare

    if plans:
        _refuse_settings(context, options)
    _require()
    _require_places(html, overwrite=overwrite)
    subject = _subject(trace, devices, model)
    settings = _settings_of(options)
    found = read_plans(plans, subject) if plans else make_plans(subject, settings, _say)
    part = judged_part(subject, found)
    told = report.to_json(subject, found, compare(subject, part, found, steps, _say))
    if html:
        write_file(html, report.page(told).encode())
        _say(str(html))
    text = f"{report.plans_text(told)}\n\n{report.scenarios_text(told)}"
    click.echo(json.dumps(told, indent=2) if as_json else text)


def _refuse_settings(context: click.Context, options: dict[str, Any]) -> None:
    """Plans that were made have their settings in them."""
    typed = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if typed:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise UsageError(f"{names}: the plans in --plans were made with their own; give it to refound plan-serving")


def _require_maps(subject: "Subject", maps: tuple[str, ...]) -> None:
    from .nas.serving.maps import require_map

    for engine in maps:
        require_map(engine, experts=subject.trace.experts, **_map_words(subject))


def _maps(subject: "Subject", maps: tuple[str, ...], device_of: "np.ndarray") -> dict[str, Any]:
    """The engines' files by their names."""
    from .nas.serving.maps import expert_map

    return {f"{engine}.json": expert_map(engine, device_of, **_map_words(subject)) for engine in maps}


def _map_words(subject: "Subject") -> dict[str, Any]:
    sizes = subject.sizes
    return {
        "devices": subject.devices.count,
        "family": sizes.family,
        "layers": sizes.moe_layers,
        "model_layers": sizes.model_layers,
    }


def _require() -> None:
    from .distill.packages import require

    require("scipy", "safetensors")


def _subject(trace: Path, devices: Path, model: Path | None) -> "Subject":
    from .nas.serving.devices import read_devices
    from .nas.serving.plans import open_subject

    return open_subject(trace, read_devices(devices), model)


def _settings_of(options: dict[str, Any]) -> "Settings":
    from .nas.serving.batching import Batching
    from .nas.serving.plans import Settings

    how = Batching(batch=options["batch"], active=options["active"], patience=options["patience"])
    return Settings(
        batching=how,
        look_ahead=options["look_ahead"],
        slots=options["slots"] or 0,
        seed=options["seed"],
        unbalanced=options["unbalanced"],
    )


def _require_places(*places: Path | None, overwrite: bool) -> None:
    from .export.atomic import require_absent

    for place in places:
        if place:
            require_absent(place, overwrite=overwrite)


def _permute(model: Path, out: Path, subject: "Subject", device_of: Any, *, overwrite: bool) -> None:
    from .export.directory import open_directory
    from .nas.serving.permute import order_of, permute_experts

    source = open_directory(model, tokenizer=False)
    order = order_of(device_of)
    record = {
        "permuted_from": subject.trace.model,
        "trace": subject.sha256,
        "devices": subject.devices.count,
        "order": order.tolist(),
    }
    left_out = permute_experts(source, order, out, record=record, overwrite=overwrite, progress=_say)
    if left_out:
        _say(f"not copied, since what they say of experts may not hold any more: {', '.join(left_out)}")
    _say(f"{out} computes what {model} does; serve it with expert parallelism over {subject.devices.count} devices")


def _text_for_bits(
    subject: "Subject", model: Path, bits: float, sources: tuple[str, ...]
) -> "tuple[np.ndarray, np.ndarray]":
    from .nas.serving.bits import WIDTHS, require_bits

    require_bits(bits, (*WIDTHS, subject.sizes.source_bits), subject.sizes.parameters)
    return _text(model, sources or ("python-docs",))


def _text(model: Path, sources: tuple[str, ...]) -> "tuple[np.ndarray, np.ndarray]":
    """Windows of 128 tokens: 16 to plan on, 16 held out."""
    from .distill.loop import eos_of
    from .distill.packages import require
    from .distill.texts import open_tokenizer, pack
    from .export.directory import open_directory

    require("transformers", "tokenizers")
    source = open_directory(model)
    tokenizer, eos = open_tokenizer(model), eos_of(source)
    train, test = (
        pack(sources, part, tokenizer=tokenizer, eos=eos, count=16, length=128) for part in ("train", "test")
    )
    return train, test


def _say(line: str) -> None:
    click.echo(line, err=True)
