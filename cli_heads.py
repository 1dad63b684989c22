# SPDX-License-Identifier: Apache-2.0
"""`refound heads`: what is typed, what is printed, the exit code."""

import json
from pathlib import Path

import click


@click.command(short_help="Train what guesses a model's next tokens, and time it.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--kind", required=True, help="medusa: heads. draft: a small model. exit: from the model's own layers.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Where to.  [default: MODEL-KIND]")
@click.option(
    "--text", "sources", multiple=True, help="A source or file; again for more.  [default: Python's own docs]"
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="tokens, length, batch, lr, own, …")
@click.option("--seed", default=0, show_default=True, help="Of the order of the text.")
@click.option("--texts", type=click.Path(file_okay=False, path_type=Path), help="Keep what MODEL says itself here.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@click.option("--dry-run", is_flag=True, help="Print steps, parameters and bytes, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object on stdout.")
def heads(
    model: Path,
    kind: str,
    out: Path | None,
    sources: tuple[str, ...],
    settings: tuple[str, ...],
    seed: int,
    texts: Path | None,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train heads, a draft or exits for MODEL (a Llama's directory), on what MODEL itself says after real text.

    They guess tokens that MODEL then checks in one pass, so greedy text stays MODEL's own and comes in fewer passes.
    Printed are tokens a pass and speed-up, predicted and measured on this machine.

    \b
    Examples:
      refound heads MODEL --kind medusa
      refound heads MODEL --kind medusa --set heads=4 --set joint=true --out runs/medusa2
      refound heads MODEL --kind draft --set layers=4 --text bible
      refound heads MODEL --kind exit --set layers=8,12 --set risk=0.02
      torchrun --nproc-per-node 2 -m refound heads MODEL --kind medusa
      refound export MODEL-medusa --to vllm

    Killed, the same command goes on from the last state, with the bits of the undisturbed run. The settings:
    docs/heads.md.
    """
    from .adapters.heads.settings import HeadsConfig, read_settings
    from .distill.packages import require

    wanted = read_settings(kind, settings)
    config = HeadsConfig(
        model=model,
        kind=kind,  # type: ignore[arg-type]  # read_settings knows it
        out=out or model.absolute().with_name(f"{model.absolute().name}-{kind}"),
        settings=wanted,
        sources=sources or HeadsConfig.sources,
        seed=seed,
        texts=texts,
        overwrite=overwrite,
    )
    require("transformers", "tokenizers", "safetensors")
    from .adapters.heads.run import plan_heads, run_heads

    if dry_run:
        plan = plan_heads(config)
        click.echo(json.dumps(plan.to_json(), indent=2) if as_json else plan.to_text())
        return
    outcome = run_heads(config, lambda line: click.echo(line, err=True))
    if outcome is not None:
        click.echo(json.dumps(outcome.to_json(), indent=2) if as_json else str(outcome))
