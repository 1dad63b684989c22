# SPDX-License-Identifier: Apache-2.0
"""The commands of mixtures of experts: what is typed, what is printed, the exit code.

What is heavy is imported inside the command that needs it, as in `cli.py`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .exits import UsageError

if TYPE_CHECKING:
    from .distill.config import Training
    from .nas.moe.config import CarveConfig
    from .nas.moe.routing import TraceConfig


@click.command(short_help="Make a mixture of experts of a dense model.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where to.  [default: MODEL-moe]")
@click.option("--experts", default=16, show_default=True, help="Experts of a layer.")
@click.option("--active", default=4, show_default=True, help="Of these, so many for each token.")
@click.option("--shared", default=0, show_default=True, help="Channels that every token takes beside them.")
@click.option("--copies", default=1, show_default=True, help="For --split upcycle: experts that hold each channel.")
@click.option(
    "--split",
    default="coactivation",
    show_default=True,
    help="Channels by coactivation, domains (a text each), gradient, random; upcycle.",
)
@click.option("--layout", default="", help="mixtral, qwen2_moe or qwen3_moe.  [default: what fits]")
@click.option("--dense-layers", default="", metavar="N[,N…]", help="Layers that stay dense.")
@click.option("--text", "sources", multiple=True, help="A source or file; again for more, each a domain.")
@click.option("--tokens", default=16384, show_default=True, help="Of text, to decide splits and gates by.")
@click.option("--length", default=256, show_default=True, help="Tokens of a window.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Training: tokens, length, batch, lr, …")
@click.option("--seed", default=0, show_default=True, help="Of every draw.")
@click.option("--refit/--no-refit", default=True, help="Fit down projections to what the gates leave active.")
@click.option("--trace", "trace_out", type=click.Path(dir_okay=False, path_type=Path), help="Write a trace here too.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep what is computed on the way.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--dry-run", is_flag=True, help="Print the plan, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def carve(model: Path, out: Path | None, trace_out: Path | None, dry_run: bool, as_json: bool, **typed: Any) -> None:
    """Split every FFN of MODEL (a directory, or smollm2-135m) into experts, give each layer a gate, and train both.

    With all experts active the result computes what MODEL does. Serve it with refound export.

    \b
    Examples:
      refound carve MODEL --dry-run                                       parameters, bytes, jobs
      refound carve MODEL --experts 8 --active 8 --split random           the same function, as Mixtral
      refound carve MODEL --shared 512 --active 4 --set tokens=100000     half of each FFN, trained
      refound carve MODEL --split domains --text bible --text python-source --experts 8
      refound carve MODEL --split upcycle --copies 4 --experts 8 --active 2

    Killed, the same command goes on from what is done, to the same bytes. Exit code 3 if the layout cannot hold the
    model. Methods and limits: docs/carve.md.
    """
    config = _carve_config(model, out or Path(f"{model.name}-moe"), **typed)
    from .nas.moe.carve import plan_carve, run_carve

    if dry_run:
        plan = plan_carve(config)
        click.echo(json.dumps(plan.to_json(), indent=2) if as_json else plan.to_text())
        return
    tracing = _tracing(config, trace_out)
    found = run_carve(config, lambda line: click.echo(line, err=True))
    if tracing is not None:
        _trace(tracing)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else found.to_text())


def _carve_config(
    model: Path,
    out: Path,
    *,
    settings: tuple[str, ...],
    dense_layers: str,
    refit: bool,
    sources: tuple[str, ...],
    **plain: Any,
) -> "CarveConfig":
    """plain: what is typed as the configuration has it."""
    training = _training(settings, tokens=0)  # none, unless it is asked for
    from .distill.packages import require
    from .nas.moe.config import CarveConfig

    require("transformers", "tokenizers", "safetensors")
    from .nas.teacher import teacher_directory

    return CarveConfig(
        model=teacher_directory(str(model)),
        out=out,
        dense_layers=_numbers(dense_layers),
        sources=sources or CarveConfig.sources,
        refit=CarveConfig.refit if refit else (),
        training=training,
        **plain,
    )


def _training(settings: tuple[str, ...], *, tokens: int) -> "Training":
    """tokens: unless they are among the settings."""
    from dataclasses import replace

    from .distill.config import read_training

    training = read_training(settings)
    said = any(setting.partition("=")[0].strip() == "tokens" for setting in settings)
    return training if said else replace(training, tokens=tokens)


def _tracing(config: "CarveConfig", out: Path | None) -> "TraceConfig | None":
    """The trace that a carving is to end with, checked before it begins. None: none is wanted, or it is there."""
    from .nas.moe.routing import TraceConfig, check_ahead, is_traced

    if out is None:
        return None
    tracing = TraceConfig(model=config.out, out=out, sources=config.sources, tokens=4096, overwrite=config.overwrite)
    if not config.overwrite and is_traced(tracing):
        return None
    check_ahead(tracing, config.model)
    return tracing


def _numbers(told: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in told.split(",") if number.strip())
    except ValueError as error:
        raise UsageError(f"--dense-layers {told!r} is no list of layers, as in 0,29") from error


def _trace(config: "TraceConfig") -> dict[str, int | str]:
    from .nas.moe.routing import run_trace

    found = run_trace(config, lambda line: click.echo(line, err=True))
    return {
        "schema": 1,
        "path": str(config.out),
        "model": found.model,
        "layers": found.layers,
        "tokens": len(found.tokens),
        "sequences": found.sequences,
        "experts": found.experts,
        "top_k": found.top_k,
    }


@click.command(short_help="Write which experts a model takes, for every token of a text.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to.  [default: MODEL.trace.safetensors]"
)
@click.option(
    "--text", "sources", multiple=True, help="A source or file; again for more.  [default: Python's own docs]"
)
@click.option("--tokens", default=16384, show_default=True, help="How many to trace.")
@click.option("--length", default=256, show_default=True, help="Tokens of a sequence.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def trace(
    model: Path, out: Path | None, sources: tuple[str, ...], tokens: int, length: int, overwrite: bool, as_json: bool
) -> None:
    """Write the routing trace of MODEL, a directory with experts (Mixtral, Qwen2-MoE, Qwen3-MoE).

    The file is what plans for serving are made from: placement, caching, batches. Its text is the part of each source
    that carving does not see.

    \b
    Example:
      refound trace MODEL-moe --text bible --tokens 32768
    """
    from .distill.packages import require

    require("transformers", "tokenizers", "safetensors")
    from .nas.moe.routing import TraceConfig

    told = _trace(
        TraceConfig(
            model=model,
            out=out or Path(f"{model.name}.trace.safetensors"),
            sources=sources or TraceConfig.sources,
            tokens=tokens,
            length=length,
            overwrite=overwrite,
        )
    )
    click.echo(
        json.dumps(told, indent=2) if as_json else f"{told['path']}: {told['tokens']} tokens, {told['layers']} layers"
    )


@click.command(short_help="Train a model that knows every layer's experts before layer one.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--dense", required=True, type=click.Path(path_type=Path), help="The dense model that it was carved from."
)
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where to.")
@click.option(
    "--text", "sources", multiple=True, help="A source or file; again for more.  [default: Python's own docs]"
)
@click.option("--tokens", default=65536, show_default=True, help="Of text, that it learns from.")
@click.option("--length", default=256, show_default=True, help="Tokens of a window.")
@click.option("--rounds", default=2, show_default=True, help="Turns of pre-gating model and experts.")
@click.option("--steps", default=300, show_default=True, help="Of the pre-gating model, a round.")
@click.option("--size", default=96, show_default=True, help="Of its embedding.")
@click.option("--blocks", default=2, show_default=True, help="Of its transformer.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Experts, a round: tokens, batch, lr, …")
@click.option("--seed", default=0, show_default=True, help="Of every draw.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def pregate(
    model: Path,
    dense: Path,
    out: Path,
    sources: tuple[str, ...],
    tokens: int,
    length: int,
    rounds: int,
    steps: int,
    size: int,
    blocks: int,
    settings: tuple[str, ...],
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train a small causal model on token ids that gives every layer's experts, by turns with the experts of MODEL.

    OUT is MODEL with experts that expect it, and OUT.pregate beside it the sidecar: weights, and what they are of.

    \b
    Example:
      refound pregate MODEL-moe --dense MODEL --out pregated --set tokens=16384

    Killed, the same command goes on from what is done, to the same bytes.
    """
    training = _training(settings, tokens=16384)
    from .distill.packages import require
    from .nas.moe.pregating_config import PreGateConfig

    require("transformers", "tokenizers", "safetensors")
    from .nas.moe.pregating import run_pregating
    from .nas.teacher import teacher_directory

    config = PreGateConfig(
        model=model,
        dense=teacher_directory(str(dense)),
        out=out,
        sources=sources or PreGateConfig.sources,
        tokens=tokens,
        length=length,
        rounds=rounds,
        steps=steps,
        size=size,
        blocks=blocks,
        training=training,
        seed=seed,
        overwrite=overwrite,
    )
    found = run_pregating(config, lambda line: click.echo(line, err=True))
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else found.to_text())
