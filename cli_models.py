# SPDX-License-Identifier: Apache-2.0
"""The commands that recast a model: what is typed, what is printed, the exit code.

What is heavy is imported inside the command that needs it, as in `cli.py`.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .exits import DAMAGE, UsageError

if TYPE_CHECKING:
    from .export.adapter_export import AdaptersDone
    from .export.plan import ExportConfig
    from .export.report import Done, Planned


@click.command(short_help="Write a model for serving engines, and prove that it computes the same.")
@click.argument("source", metavar="MODEL|CHECKPOINT|JOB|ADAPTER")
@click.option("--like", type=click.Path(path_type=Path), help="For weights from training, or an adapter: its base.")
@click.option("--merge", is_flag=True, help="Write an adapter's base with the adapter in its weights.")
@click.option("--to", "engines", required=True, metavar="ENGINE[,ENGINE…]", help="transformers, vllm, llama.cpp, …")
@click.option("--check", is_flag=True, help="Only say what fits these engines, a sentence a layer; reads config.json.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where to.  [default: …-export]")
@click.option("--family", default="", help="Write experts in this layout, where exact: mixtral, qwen2_moe, qwen3_moe.")
@click.option("--plain", is_flag=True, help="Write layers that differ as alike ones: larger, but no code to trust.")
@click.option(
    "--quantize", default="none", show_default=True, help="f32, bf16, f16; int8, int4; GGUF: q8_0, q6_k, q5_k, q4_k."
)
@click.option("--verify/--no-verify", default=None, help="With all engines, or none.  [default: those installed]")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--dry-run", is_flag=True, help="Print files, bytes and engine fit, and write nothing.")
@click.option("--no-tokenizer", is_flag=True, help="Export a model that has none; prompts are token ids then.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def export(
    source: str,
    like: Path | None,
    engines: str,
    check: bool,
    merge: bool,
    out: Path | None,
    family: str,
    plain: bool,
    quantize: str,
    verify: bool | None,
    overwrite: bool,
    dry_run: bool,
    no_tokenizer: bool,
    as_json: bool,
) -> None:
    """Write a model as each engine loads it, run it there, and compare greedy tokens.

    MODEL: a Hugging Face directory. CHECKPOINT: one of refound, of DCP (FSDP2) or of DeepSpeed ZeRO, or a directory of
    them. JOB: the newest snapshot in the memory of a job that trains on this machine. What comes from training is
    weights only; configuration and tokenizer are those of --like, or of a config.json that lies with the checkpoint.
    ADAPTER: a PEFT directory with LoRA, to be served beside the base that --like names, or merged into it; or heads of
    refound heads.

    \b
    Examples:
      refound export MODEL --to vllm,llama.cpp                   two directories in MODEL-export/
      refound export MODEL --to llama.cpp --quantize q8_0        GGUF with 8 bits a weight
      refound export MODEL --to vllm,llama.cpp --check           what fits, and what would be written instead
      refound export MODEL --to transformers --dry-run           files and bytes
      refound export my-job --like MODEL --to vllm               from memory, while it trains
      refound export ADAPTER --like MODEL --to vllm,llama.cpp    beside MODEL; with --merge as a model

    Exit code 3 if an engine cannot represent the model, if its files are damaged, or if the export does not compute
    what the source does; nothing is kept then. Run again after a kill, it keeps the parts that are done.
    """
    from . import sources
    from .adapters.heads.record import has_heads
    from .export import report
    from .export.engines import find_engines
    from .export.plan import ExportConfig

    names = find_engines(engines)
    if has_heads(Path(source)):
        if check or dry_run:
            raise UsageError("--check and --dry-run are for models; heads are copied in a moment, and small")
        _export_heads(source, like, names, out, family, overwrite=overwrite, as_json=as_json)
        return
    if check:
        fit = report.check(sources.configuration_of(source, like), names)
        click.echo(json.dumps(fit.to_json(), indent=2) if as_json else fit.to_text())
        sys.exit(0 if fit.fits else DAMAGE)
    config = ExportConfig(
        model=Path(source),
        engines=names,
        out=out or sources.default_out(source),
        family=family,
        plain=plain,
        quantize=quantize,
        verify=verify,
        overwrite=overwrite,
        tokenizer=not no_tokenizer,
    )
    found = _exported(config, source, like, merge=merge, dry_run=dry_run)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else found.to_text())


def _export_heads(
    source: str,
    like: Path | None,
    names: tuple[str, ...],
    out: Path | None,
    family: str,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    from . import sources
    from .adapters.heads.export import export_heads

    to = out or sources.default_out(source)
    written = export_heads(Path(source), like, names, to, family=family, overwrite=overwrite)
    click.echo(json.dumps(written.to_json(), indent=2) if as_json else written.to_text())


def _exported(
    config: "ExportConfig", source: str, like: Path | None, *, merge: bool, dry_run: bool
) -> "Planned | Done | AdaptersDone":
    """What the export did, or with `dry_run` would do."""
    from . import sources
    from .export import report
    from .export.adapter_export import export_adapter

    adapter = sources.beside_base(source, like, merge=merge)
    if adapter and dry_run:
        raise UsageError("--dry-run is for models; an adapter that is exported on its own is copied as it is")
    if adapter:
        return export_adapter(config, *adapter, lambda line: click.echo(line, err=True))
    if dry_run:
        with sources.planned(source, like) as directory:
            return report.plan(config, directory)
    with sources.model_directory(source, like, config.out) as made:
        told = replace(config, model=made.model, origin=made.told)
        return report.export(told, lambda line: click.echo(line, err=True))


@click.command(short_help="Measure an engine on a model, and find its best settings.")
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--engine", default="transformers", show_default=True, help="One that runs here: see docs/engines.md.")
@click.option("--length", default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--batch", default=1, show_default=True, help="Prompts at a time.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens to decode for each.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="With so many, and all else as usual.  [default: searched for]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def bench(
    model: Path, engine: str, length: int, batch: int, new_tokens: int, threads: int | None, as_json: bool
) -> None:
    """Measure prefill and decode of MODEL (a directory, or a GGUF file) in an engine on this machine.

    Threads, and the engine's own settings (type of the cache, of numbers, size of a batch, as it has them) are
    searched for, guided by all earlier runs, which are kept. Types below float32 round; refound export says how much.

    \b
    Examples:
      refound bench MODEL-export/gguf/model-f32.gguf --engine llama.cpp
      refound bench MODEL --engine vllm --batch 8 --length 512
    """
    from dataclasses import asdict

    from .export import bench as measuring
    from .export.engines import find_engines

    (name,) = find_engines(engine)
    config = measuring.BenchConfig(
        model=model, engine=name, length=length, batch=batch, new_tokens=new_tokens, threads=threads
    )
    found = measuring.bench(config, lambda line: click.echo(line, err=True))
    told = {"schema": measuring.SCHEMA, "measured": [asdict(one) for one in found]}
    click.echo(json.dumps(told, indent=2) if as_json else measuring.to_text(found))


@click.command(short_help="Find the best smaller model for a budget, and prove it.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Change a setting; again for more.")
@click.option("--toy", is_flag=True, help="The small search in the recipe's [toy] table.")
@click.option("--dry-run", is_flag=True, help="Print jobs, hours and bytes, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def search(recipe: Path, settings: tuple[str, ...], toy: bool, dry_run: bool, as_json: bool) -> None:
    """Search for children of a teacher: which attention and FFN each layer keeps, within the budget in RECIPE.

    \b
    Examples:
      refound search recipes/smollm2.toml --dry-run
      refound search recipes/smollm2.toml --toy
      refound search recipes/smollm2.toml --set budget.parameters=60% --set out=runs/sixty
      torchrun --nproc-per-node 4 -m refound search recipes/smollm2.toml

    Killed at any moment, the same command goes on: what is done is kept. Children, search.json and report.html go into
    the recipe's `out`. The settings: docs/search.md. Exit code 3 if no child meets the budget; the message says which
    limit is why, and the nearest budget that can be met. 75 if a result could not be written.
    """
    from .distill.packages import require
    from .nas.recipe import read_recipe

    wanted = read_recipe(recipe, settings, toy=toy)
    require("scipy", "transformers", "tokenizers", "safetensors")
    from .nas.search import plan_search, run_search

    if dry_run:
        plan = plan_search(wanted)
        click.echo(json.dumps(plan.to_json(), indent=2) if as_json else plan.to_text())
        return
    found = run_search(wanted, lambda line: click.echo(line, err=True))
    if found is None:
        return  # another rank tells it
    from .nas import report

    told, pictures = report.write_report(found)
    click.echo(json.dumps(report.to_json(found), indent=2) if as_json else report.to_text(found))
    click.echo(f"{told}\n{pictures}", err=True)


@click.command(short_help="Train a child to think like its teacher again.")
@click.argument("child", type=click.Path(path_type=Path))
@click.option("--teacher", required=True, type=click.Path(path_type=Path), help="The model directory it came from.")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where to.")
@click.option(
    "--text", "sources", multiple=True, help="A source or file; again for more.  [default: Python's own docs]"
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="tokens, length, batch, lr, kl, cosine, …")
@click.option("--seed", default=0, show_default=True, help="Of the order of the text.")
@click.option("--logits", type=click.Path(file_okay=False, path_type=Path), help="Keep the teacher's logits here.")
@click.option(
    "--parallel",
    default="ddp",
    show_default=True,
    metavar="ddp|fsdp2",
    help="Under torchrun: whole models on each rank, or in shards.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def distill(
    child: Path,
    teacher: Path,
    out: Path,
    sources: tuple[str, ...],
    settings: tuple[str, ...],
    seed: int,
    logits: Path | None,
    parallel: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Distil TEACHER into CHILD: divergence of the logits and cosine of all hidden states, over text seen once.

    \b
    Examples:
      refound distill runs/search/children/1 --teacher MODEL --out better --set tokens=200000
      refound distill CHILD --teacher MODEL --out better --text bible --text notes.txt --set divergence=jsd

    Killed, the same command goes on from the last state, with the bits of the undisturbed run. The settings:
    docs/search.md. Several ranks: torchrun --standalone --logs-specs=refound --nproc-per-node=2 -m refound distill …
    """
    from .distill.config import DistillConfig, read_training
    from .distill.packages import require

    require("transformers", "tokenizers", "safetensors")
    config = DistillConfig(
        child=child,
        teacher=teacher,
        out=out,
        sources=sources or DistillConfig.sources,
        training=read_training(settings),
        seed=seed,
        logits=logits,
        overwrite=overwrite,
        parallel=parallel,
    )
    from .distill.loop import run_distillation

    outcome = run_distillation(config, lambda line: click.echo(line, err=True))
    if outcome is not None:
        click.echo(json.dumps({"schema": 1, **outcome.to_json()}) if as_json else str(outcome))
