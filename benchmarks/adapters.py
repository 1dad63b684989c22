# SPDX-License-Identifier: Apache-2.0
"""Adapters on SmolLM2-135M: what each method learns, what it becomes, and what weighted losses are worth.

    python benchmarks/adapters.py [--json] [--tiny] [--only methods|served|losses] [--steps N] [--out DIR]

methods: each is trained for some steps on real text; the held-out loss before and after; and where it can be merged,
folded or sliced, the largest difference of a logit between that and what was trained, in float32, beside what shuffling
the channels of the served model's FFNs does, which changes nothing but the order of sums: its own rounding.
served: LoRAs beside their base in each engine, tokens equal to those of both merged; an engine that is not here misses
the bar.
losses: pairs of right and wrong Python, the wrong ones made by exchanging one operator of the right one; with each
switch of the weighted losses, how often the tuned model gives the right one the higher likelihood, on held-out pairs;
and the loss of the samples that each transform makes, with a model that was tuned with it and one that was not. A run
with --out that was cut off goes on.
"""

import argparse
import contextlib
import io
import json
import random
import re
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _figures import Figure, figure, tell

ROUNDING = 10
"""Times the difference that shuffling channels makes."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rows: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        options.base = tiny_base(Path(folder)) if options.tiny else "smollm2-135m"
        for name, take in (("methods", method_figures), ("served", served_figures), ("losses", loss_figures)):
            if options.only in (None, name):
                rows += take(options, (options.out or Path(folder)) / name)
    tell(rows, as_json=options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--tiny", action="store_true", help="a random model, to see that it runs")
    parser.add_argument("--only", choices=["methods", "served", "losses"], help="a part")
    parser.add_argument("--steps", type=int, default=0, help="of training, for each (default: 6, and 10 for losses)")
    parser.add_argument("--out", type=Path, help="keep what is trained here, and go on from what is there")
    return parser.parse_args(arguments)


def tiny_base(folder: Path) -> str:
    """The random model of the tests of the export, with a tokenizer of its own."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "export"))
    from models import decoder, write_model  # pyright: ignore[reportMissingImports]

    return str(write_model(folder / "model", decoder(layers=2, head_dim=16)))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def recipe_of(options: argparse.Namespace, method: Any, out: Path, **changes: Any) -> Any:
    from refound.adapters.recipe import Data, Train, TuneRecipe

    tiny = options.tiny
    data = Data(sources=("python-docs",), length=16 if tiny else 32, windows=40, held_out=8)
    train = Train(batch=4, steps=options.steps or 6, lr=changes.pop("lr", 1e-3), save_every=1000)
    return TuneRecipe(base=options.base, out=str(out), method=method, data=data, train=train, **changes)


# --- methods -------------------------------------------------------------------------------------------------------


def methods() -> dict[str, tuple[Any, float]]:
    """Each with the learning rate that its kind wants."""
    from refound.adapters.bottleneck import Parallel, Series
    from refound.adapters.peft_methods import Dora, Lora, Prefix, RsLora, Vera
    from refound.adapters.prune import PrunedLora

    return {
        "LoRA": (Lora(rank=8, alpha=16, dropout=0.0), 1e-3),
        "rsLoRA": (RsLora(rank=8, alpha=8, dropout=0.0), 1e-3),
        "DoRA": (Dora(rank=8, alpha=16, dropout=0.0), 1e-3),
        "VeRA": (Vera(rank=64), 1e-2),
        "prefix": (Prefix(tokens=10), 3e-2),
        "series, ReLU": (Series(width=64), 1e-3),
        "series, linear": (Series(width=64, activation="linear"), 1e-3),
        "parallel, gated": (Parallel(width=64), 1e-3),
        "pruned LoRA, 25% of the FFNs": (PrunedLora(rank=8, alpha=16, dropout=0.0, ffn=0.25), 1e-3),
    }


def method_figures(options: argparse.Namespace, out: Path) -> Iterator[Figure]:
    from refound.adapters.tune import tune

    for name, (method, lr) in methods().items():
        folder = out / name.replace(" ", "-").replace(",", "").replace("%", "")
        recipe = recipe_of(options, method, folder, lr=lr)
        found = tune(recipe, lambda line: None)
        say(f"{name}: {found.before:.4f} to {found.after:.4f}")
        yield figure(f"{name}: trained parameters", found.trained, "")
        fell = found.after < found.before
        shrinks = name.startswith("pruned")
        yield figure(f"{name}: held-out loss before", found.before, "nats")
        yield figure(
            f"{name}: after {found.steps} steps",
            found.after,
            "nats",
            None if shrinks else "< before",
            None if shrinks else fell,
        )
        yield from exactness(name, folder, recipe.base)


def exactness(name: str, folder: Path, base_name: str) -> Iterator[Figure]:
    """How far what is served is from what was trained, in float32."""
    import torch
    from refound.adapters.base import open_base, reshaped
    from refound.adapters.errors import NotServableError
    from refound.adapters.saved import open_tuned
    from refound.distill.models import build

    base = open_base(base_name)
    attached = open_tuned(folder, base)
    ids = torch.arange(96).reshape(2, 48) * 7 % 380
    with torch.no_grad():
        wanted = attached.model(input_ids=ids).logits
        try:
            recast = attached.recast()
        except NotServableError as error:
            say(f"{name}: {error}")
            return
        assert base.source is not None
        decoder = base.source.decoder
        weights = {key: tensor.float() for key, tensor in base.source.weights(list(decoder.tensors()))}
        weights |= {key: tensor.float() for key, tensor in recast.weights.items()}
        decoder = reshaped(decoder, recast)
        served = build(decoder, weights, dtype=torch.float32)(input_ids=ids).logits
        other = build(decoder, shuffled(weights), dtype=torch.float32)(input_ids=ids).logits
    off, noise, largest = (float(found.abs().max()) for found in (served - wanted, other - served, wanted))
    holds = off <= ROUNDING * max(noise, torch.finfo(torch.float32).eps * largest)
    yield figure(
        f"{name}: {recast.how}, largest logit difference", off * 1e6, "1e-6", f"<= {ROUNDING} x shuffled", holds
    )
    yield figure(f"{name}: the same with channels shuffled", noise * 1e6, "1e-6")
    yield figure(f"{name}: largest logit", largest, "")


def shuffled(weights: dict[str, Any]) -> dict[str, Any]:
    """The same function with the channels of each FFN in another order."""
    import torch

    generator, found = torch.Generator().manual_seed(0), dict(weights)
    for name in [name for name in weights if name.endswith("mlp.down_proj.weight")]:
        order = torch.randperm(weights[name].shape[1], generator=generator)
        found[name] = weights[name][:, order].contiguous()
        for other in ("gate_proj", "up_proj"):
            key = name.replace("down_proj", other)
            found[key] = weights[key][order]
    return found


# --- engines -------------------------------------------------------------------------------------------------------


def served_figures(options: argparse.Namespace, out: Path) -> Iterator[Figure]:
    """Two LoRAs, one after the other, in each engine: a row each. An engine that is not here, or refuses, misses it."""
    from refound.adapters.peft_methods import Lora
    from refound.adapters.tune import tune

    for name, rank, lr in (("first", 8, 3e-3), ("second", 4, 1e-2)):
        recipe = recipe_of(options, Lora(rank=rank, alpha=2 * rank, dropout=0.0), out / name, lr=lr)
        tune(recipe, lambda line: None)
        for engine in ("transformers", "vllm", "llama.cpp"):
            share = served_share(engine, out / name, options.base, out / f"export-{name}")
            row = f"the {name} LoRA beside its base in {engine}: tokens equal to those of both merged"
            yield figure(row, 100 * share, "%", "100", share == 1)


def served_share(engine: str, lora: Path, base_name: str, out: Path) -> float:
    """Of the tokens, those that are equal; 0 if nothing is served."""
    from refound.adapters.base import open_base
    from refound.export.adapter import read_adapter
    from refound.export.adapter_export import export_adapter
    from refound.export.errors import ExportError
    from refound.export.plan import ExportConfig

    base = open_base(base_name).source
    assert base is not None
    config = ExportConfig(model=lora, engines=(engine,), out=out / engine, overwrite=True, verify=True)
    try:
        done = export_adapter(config, read_adapter(lora, base), base, say)
    except ExportError as error:
        say(f"{engine}: {error}")
        return 0.0
    proofs = [proof for part in done.exported for proof in part.record["proof"] if proof["engine"] == engine]
    asked = sum(proof["prompts"] * proof["tokens_each"] for proof in proofs)
    return sum(proof["equal_tokens"] for proof in proofs) / asked if asked else 0.0


# --- weighted losses -----------------------------------------------------------------------------------------------

_SWAPS = {"+": "-", "-": "+", "<": ">", ">": "<", "==": "!=", "!=": "==", "<=": ">=", ">=": "<=", "*": "+"}


def pairs(count: int, *, longest: int) -> list[dict[str, Any]]:
    """Pieces of the standard library, and the same with one operator exchanged. longest: characters of an answer."""
    from refound.distill.texts import documents

    draw, found = random.Random(0), []
    for source in documents("python-source"):
        lines = source.splitlines(keepends=True)
        for start in range(0, len(lines) - 6, 6):
            prompt, right = "".join(lines[start : start + 3]), "".join(lines[start + 3 : start + 6])
            if 20 < len(right) < longest and 10 < len(prompt) < longest and (wrong := swapped(right, draw)):
                names = sorted(set(re.findall(r"[a-z_]{3,}", right)))
                thinking = f"Names that are needed: {', '.join(names)}."
                found.append({"prompt": prompt, "completion": right, "wrong": wrong, "thinking": thinking})
    draw.shuffle(found)
    return found[:count]


def swapped(text: str, draw: random.Random) -> str | None:
    """The text with one of its operators exchanged; None if it has none."""
    places = []
    with contextlib.suppress(tokenize.TokenError, SyntaxError):  # a part of a text; what was found before counts
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.OP and token.string in _SWAPS and token.start[1]:
                places.append((token.start, token.string))
    if not places:
        return None
    (row, column), old = draw.choice(places)
    lines = text.splitlines(keepends=True)
    lines[row - 1] = lines[row - 1][:column] + _SWAPS[old] + lines[row - 1][column + len(old) :]
    return "".join(lines)


def loss_figures(options: argparse.Namespace, out: Path) -> Iterator[Figure]:
    from refound.adapters.fait import Fait
    from refound.adapters.recipe import LossSettings
    from refound.adapters.transforms import Elastic, Lemma, SelfEvaluation, Transforms

    out.mkdir(parents=True, exist_ok=True)
    lines = pairs(40 if options.tiny else 240, longest=60 if options.tiny else 160)
    test, learned = lines[::4], [line for index, line in enumerate(lines) if index % 4]
    files = {"pairs": learned, "answers": answers(learned)}
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fait = Fait(enabled=True)
    ones = replace(fait, line=0.0, token=0.0, char=0.0)
    weighted = {
        "plain cross entropy": None,
        "FAIT, weights of one": ones,
        "FAIT, fixed weights": replace(fait, dynamic=False),
        "FAIT, tokens only": replace(fait, line=0.0, char=0.0),
        "FAIT": fait,
    }
    found: dict[str, tuple[float, float]] = {}
    for name, table in weighted.items():
        changes = {"loss": LossSettings(fait=table)} if table else {}
        tuned = tune_on(options, out / "pairs.jsonl", out / name.replace(" ", "-"), **changes)
        found[name] = preference(tuned, test)
        say(f"{name}: {found[name]}")
        yield figure(f"{name}: right one preferred, of {len(test)} held out", 100 * found[name][0], "%")
        yield figure(f"{name}: mean margin of the log-likelihoods", found[name][1], "nats")
    same = found["FAIT, weights of one"] == found["plain cross entropy"]
    yield figure("weights of one end where plain cross entropy does", float(same), "", "1, bit for bit", same)
    transforms = {
        "LEMMA": ("pairs", Transforms(lemma=Lemma(enabled=True))),
        "cut thinking": ("pairs", Transforms(elastic=Elastic(enabled=True, budgets=(8, 32)))),
        "self-evaluation": ("answers", Transforms(self_evaluation=SelfEvaluation(enabled=True, yes="Y", no="N"))),
    }
    for name, (file, table) in transforms.items():
        tuned = tune_on(options, out / f"{file}.jsonl", out / name.replace(" ", "-"), transform=table)
        held_out = answers(test) if file == "answers" else test
        for switch, model in (("off", out / "plain-cross-entropy"), ("on", tuned)):
            yield figure(f"{name} {switch}: held-out loss of its samples", sample_loss(model, held_out, table), "nats")


def answers(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Right and wrong ones by turns, with whether another would be better."""
    return [
        {
            "prompt": line["prompt"],
            "completion": line["wrong" if index % 2 else "completion"],
            "another": bool(index % 2),
        }
        for index, line in enumerate(lines)
    ]


def tune_on(options: argparse.Namespace, file: Path, out: Path, **changes: Any) -> Path:
    from refound.adapters.peft_methods import Lora
    from refound.adapters.recipe import Data
    from refound.adapters.tune import tune

    recipe = recipe_of(options, Lora(rank=8, alpha=16, dropout=0.0), out, **changes)
    steps = options.steps or (4 if options.tiny else 10)
    data = Data(sources=(str(file),), length=240, held_out=8)
    tune(replace(recipe, data=data, train=replace(recipe.train, steps=steps)), lambda line: None)
    return out


def sample_loss(tuned: Path, lines: Sequence[dict[str, Any]], transforms: Any) -> float:
    """The mean loss of what `transforms` adds to the plain samples."""
    import torch
    from refound.adapters.base import open_base
    from refound.adapters.data import Record, batches
    from refound.adapters.losses import token_loss
    from refound.adapters.saved import base_named, open_tuned
    from refound.adapters.transforms import Maker
    from refound.distill.loop import eos_of
    from refound.distill.texts import open_tokenizer

    base = open_base(base_named(tuned))
    assert base.source is not None
    eos = eos_of(base.source)
    model: Any = open_tuned(tuned, base).model
    maker = Maker(open_tokenizer(base.path), transforms, eos=eos, length=240, template="{prompt}", pairs=False)
    records = [Record(where=str(index), **line) for index, line in enumerate(lines)]
    samples = maker.samples(records)
    if not transforms.elastic.enabled:
        samples = samples[1::2]  # plain ones and added ones by turns
    with torch.no_grad():
        found = [token_loss(model, batch).item() for batch in batches(samples, 1, fill=eos)]
    return sum(found) / len(found)


def preference(tuned: Path, test: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(share of the pairs in which the right one is likelier, mean difference of the log-likelihoods)"""
    import torch
    from refound.adapters.base import open_base
    from refound.adapters.fait import log_probabilities
    from refound.adapters.saved import base_named, open_tuned
    from refound.distill.texts import open_tokenizer

    base = open_base(base_named(tuned))
    model: Any = open_tuned(tuned, base).model
    tokenizer = open_tokenizer(base.path)
    margins = []
    for line in test:
        sums = []
        for answer in ("completion", "wrong"):
            prompt = tokenizer.encode(line["prompt"], add_special_tokens=False).ids
            ids = torch.tensor([[*prompt, *tokenizer.encode(line[answer], add_special_tokens=False).ids]])
            with torch.no_grad():
                sums.append(float(log_probabilities(model(input_ids=ids).logits, ids)[0, len(prompt) :].sum()))
        margins.append(sums[0] - sums[1])
    return sum(margin > 0 for margin in margins) / len(margins), sum(margins) / len(margins)


if __name__ == "__main__":
    main()
