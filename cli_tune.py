# SPDX-License-Identifier: Apache-2.0
"""`refound tune` and `refound adapter`: what is typed, what is printed, the exit code."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from .adapters.base import Base
    from .export.adapter import Adapter


@click.command(short_help="Train an adapter on a model, and say how it is served.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Change a setting; again for more.")
@click.option("--toy", is_flag=True, help="The small run in the recipe's [toy] table.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--dry-run", is_flag=True, help="Check base, data and method, print what would be trained, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def tune(recipe: Path, settings: tuple[str, ...], toy: bool, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    """Train what RECIPE describes on its base, into the recipe's `out`.

    \b
    Examples:
      refound tune recipes/lora-smollm2.toml --dry-run
      refound tune recipes/lora-smollm2.toml --toy
      refound tune recipes/lora-smollm2.toml --set method.rank=8 --set out=runs/rank8
      refound export runs/rank8 --to vllm,llama.cpp

    Killed at any moment, the same command goes on from the last state, with the bits of the undisturbed run. The
    methods and settings: docs/tune.md. Exit code 2 for a recipe or data that cannot be, with all mistakes at once.
    """
    from .distill.packages import require

    require("transformers", "tokenizers", "safetensors", "peft")
    from .adapters.recipe import read_tune
    from .adapters.tune import plan_tune, run_tune

    wanted = read_tune(recipe, settings, toy=toy)
    if dry_run:
        plan = plan_tune(wanted)
        click.echo(json.dumps({"schema": 1, **plan.to_json()}, indent=2) if as_json else plan.to_text())
        return
    found = run_tune(wanted, lambda line: click.echo(line, err=True), overwrite=overwrite)
    if found is not None:
        click.echo(json.dumps({"schema": 1, **found.to_json()}, indent=2) if as_json else found.to_text())


@click.group(short_help="Give a LoRA another rank, or merge it into an INT8 or INT4 base.")
def adapter() -> None:
    """What becomes of a LoRA after it is trained, beside `refound export`."""


@adapter.command(short_help="Write the nearest LoRA of a smaller rank.")
@click.argument("source", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.option("--rank", required=True, type=click.IntRange(min=1), help="The largest that it may have.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where to.")
@click.option("--like", type=click.Path(path_type=Path), help="Its base.  [default: the one that it names]")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def compress(source: Path, rank: int, out: Path, like: Path | None, overwrite: bool, as_json: bool) -> None:
    """Write ADAPTER with at most RANK, by singular value decomposition, and print what is lost.

    \b
    Examples:
      refound adapter compress runs/tune --rank 8 --out runs/rank8
    """
    from .adapters.base import open_base
    from .adapters.places import keep_inputs
    from .adapters.ranks import compress as run
    from .export.adapter import base_of

    base = open_base(like or base_of(source))
    keep_inputs(out, {"the adapter": source, "its base": base.path})
    found = run(
        _lora(source, base), rank, {"path": str(base.path), "sha256": base.fingerprint()}, out, overwrite=overwrite
    )
    told = {"schema": 1, "out": str(out), "error": found.error, "errors": dict(found.errors)}
    click.echo(json.dumps(told, indent=2) if as_json else f"{found}\n{out}")


@adapter.command(short_help="Merge a LoRA into an INT8 or INT4 base, and print what rounding takes of it.")
@click.argument("source", metavar="ADAPTER", type=click.Path(path_type=Path))
@click.option("--into", required=True, type=click.Path(path_type=Path), help="What `refound export --quantize` wrote.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where to.")
@click.option("--like", type=click.Path(path_type=Path), help="Its base.  [default: the one that it names]")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def merge(source: Path, into: Path, out: Path, like: Path | None, overwrite: bool, as_json: bool) -> None:
    """Merge ADAPTER into the rounded weights of its base.

    \b
    Examples:
      refound export MODEL --to vllm --quantize int4
      refound adapter merge runs/tune --into MODEL-export/huggingface --out runs/merged-int4
    """
    from .adapters.base import open_base
    from .adapters.places import keep_inputs
    from .adapters.quantized import check_rounded_from, merge_quantized, rounding_in
    from .adapters.ranks import pairs_of
    from .export.adapter import base_of

    base = open_base(like or base_of(source))
    keep_inputs(out, {"the adapter": source, "--into": into, "its base": base.path})
    lora = _lora(source, base)
    rounding_in(into)
    check_rounded_from(into, base)
    found = merge_quantized(into, pairs_of(lora), out, overwrite=overwrite)
    told = {"schema": 1, "out": str(out), **found.to_json()}
    click.echo(json.dumps(told, indent=2) if as_json else f"{found}\n{out}")


def _lora(source: Path, base: "Base") -> "Adapter":
    """Raises ExportError: see `export.adapter.read_adapter`; AdapterError for a base that `export` does not know."""
    from .adapters.errors import UnknownBlocksError
    from .export.adapter import read_adapter

    if base.source is None:
        raise UnknownBlocksError(f"{base.path} is of a family that is not exported here: {base.model_type}")
    found = read_adapter(source, base.source)
    found.check_numbers()
    return found
