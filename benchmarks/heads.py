# SPDX-License-Identifier: Apache-2.0
"""What decodes SmolLM2-135M faster with the same tokens: Medusa, a draft, its own layers, a look at what came before.

    python benchmarks/heads.py [--json] [--tiny] [--out DIR] [--tokens N] [--prompts N] [--set kind.key=value]

Medusa heads, a draft model and exits are trained first (medusa and draft on what the model itself says). Then every
decoder continues the same held-out prompts at batch 1, by turns in one run: beginnings out of Python's documentation
and library, and texts that are given whole and begun once more, where prompt lookup is at home. The tokens of each must
be those of plain decoding, and plain decoding's those of passes of transformers over the whole text. Prompts are of a
part of the text that nothing was trained, measured or chosen on; so are the windows on which the thresholds of exits
are held against their risk. Speed-ups are over plain decoding by the same code; transformers' own generate is printed
beside it. With --out a run that was cut off goes on.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _figures import figure, tell

KINDS = ("medusa", "draft", "exit")
SOURCES = ("python-docs", "python-source")
AIM = 1.5
CONTINUING, COPYING = "continuing", "copying"
TRAINED = ("Medusa", "draft model", "draft model, sure", "dynamic tree", "self-speculative")
FRESH = "score"
"""The part of the text that `refound heads` does not read."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder)
        rows = figures(options, out)
    tell(rows, as_json=options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--tiny", action="store_true", help="a random model, to see that it runs")
    parser.add_argument("--out", type=Path, help="keep everything here, and go on from what is there")
    parser.add_argument("--tokens", type=int, default=32768, help="that each is trained on")
    parser.add_argument("--prompts", type=int, default=6, help="of each kind of text")
    parser.add_argument("--new-tokens", type=int, default=96, help="after each prompt")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="as in medusa.lr=1e-3")
    return parser.parse_args(arguments)


def figures(options: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    from refound.adapters.heads.cached import CachedModel
    from refound.distill.models import load, open_blocks
    from refound.distill.smollm2 import smollm2_directory

    base = tiny_model(out) if options.tiny else smollm2_directory()
    trained = {kind: trained_kind(kind, base, options, out) for kind in KINDS}
    source = open_blocks(base)
    model = CachedModel(load(source))
    drafters = drafters_of(source, model, trained)
    rows = []
    for text, prompts in prompts_of(source, options).items():
        rows += timed(text, model, source, prompts, drafters, trained, options)
    counted = {f"{CONTINUING}, {name}: speed-up" for name in TRAINED}
    best = max(row["value"] for row in rows if row["name"] in counted)
    name = f"{CONTINUING}, best of what was trained: speed-up"
    rows.append(figure(name, best, "x", f">= {AIM:g}", best >= AIM))
    for kind in KINDS:
        rows += training_figures(kind, trained[kind])
    return rows + risk_figures(trained["exit"], source, model.model)


def tiny_model(out: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "export"))
    from models import decoder, write_model  # pyright: ignore[reportMissingImports]

    folder = out / "tiny-model"
    return folder if (folder / "config.json").is_file() else write_model(folder, decoder(layers=4))


def trained_kind(kind: Any, base: Path, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The record of what was trained, and where it is."""
    from refound.adapters.heads.run import run_heads
    from refound.adapters.heads.settings import HeadsConfig, read_settings

    given = [one.split(".", 1)[1] for one in options.settings if one.startswith(f"{kind}.")]
    usual = {"tokens": options.tokens, "measured": 0}
    if options.tiny:
        usual |= {"tokens": 512, "length": 32, "batch": 4, "prompt": 8, "held_out": 8}
        usual |= {"layers": 2} if kind == "draft" else {}
    settings = read_settings(kind, [*(f"{key}={value}" for key, value in usual.items()), *given])
    config = HeadsConfig(model=base, kind=kind, out=out / kind, settings=settings, sources=SOURCES, texts=out / "texts")
    began = time.perf_counter()
    found = run_heads(config, lambda line: say(f"{kind}: {line}"))
    assert found is not None
    return {"path": found.path, "seconds": time.perf_counter() - began, **found.record["heads"]}


def drafters_of(source: Any, model: Any, trained: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from refound.adapters.heads.cached import CachedModel
    from refound.adapters.heads.decode_draft import DynamicTreeDraft, ModelDraft
    from refound.adapters.heads.decode_lookup import LookupDraft
    from refound.adapters.heads.decode_medusa import MedusaDraft
    from refound.adapters.heads.decode_self import SelfDraft
    from refound.adapters.heads.exit_run import open_exits
    from refound.adapters.heads.medusa_run import open_medusa
    from refound.distill.models import load, open_blocks

    heads, shape = open_medusa(trained["medusa"]["path"], source)
    small = CachedModel(load(open_blocks(trained["draft"]["path"])))
    part, _ = open_exits(trained["exit"]["path"], source, model.model)
    layer = trained["exit"]["exit_layer"]
    exit_ = part.exits[part.layers.index(layer)]
    return {
        "Medusa": MedusaDraft(heads, shape),
        "draft model": ModelDraft(small, length=trained["draft"]["settings"]["guesses"]),
        "draft model, sure": ModelDraft(small, length=4, confidence=0.4),
        "dynamic tree": DynamicTreeDraft(small, budget=8, depth=3, threshold=0.15),
        "self-speculative": SelfDraft(layer, length=trained["exit"]["guesses"], head=exit_),
        "prompt lookup": LookupDraft(),
    }


def prompts_of(source: Any, options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Held-out beginnings, to be continued; and texts that are begun once more after they were given whole."""
    from refound.distill.loop import eos_of
    from refound.distill.texts import open_tokenizer, pack

    length = 24 if options.tiny else 96
    windows = pack(
        SOURCES,
        FRESH,
        tokenizer=open_tokenizer(source.path),
        eos=eos_of(source),
        count=2 * options.prompts,
        length=2 * length,
    )
    continued, copied = windows[: options.prompts], windows[options.prompts :]
    return {
        CONTINUING: [row[:length].tolist() for row in continued],
        COPYING: [[*row.tolist(), *row[: length // 4].tolist()] for row in copied],
    }


def timed(
    text: str,
    model: Any,
    source: Any,
    prompts: list[list[int]],
    drafters: dict[str, Any],
    trained: dict[str, dict[str, Any]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    from refound.adapters.heads.measure import PLAIN, by_turns
    from refound.distill.loop import eos_of

    new = 16 if options.tiny else options.new_tokens
    found = by_turns(
        model, prompts, drafters, new_tokens=new, eos=[eos_of(source)], progress=lambda x: say(f"{text}: {x}")
    )
    predicted = {
        "Medusa": trained["medusa"]["predicted"]["medusa"],
        "draft model": trained["draft"]["predicted"]["draft"],
        "self-speculative": trained["exit"]["predicted"]["exit"],
    }
    rows = [figure(f"{text}, {PLAIN}: decode", found[PLAIN].tokens_a_second, "tokens/s")]
    theirs = transformers_speed(model, prompts, new)
    rows.append(figure(f"{text}, transformers' generate: decode", theirs, "tokens/s"))
    whole = all(said_by_whole_passes(model, prompt, new, [eos_of(source)]) for prompt in prompts)
    rows.append(figure(f"{text}, {PLAIN}: tokens of passes over the whole text", float(whole), "", "1", whole))
    for name in drafters:
        speed = found[name]
        rows.append(figure(f"{text}, {name}: decode", speed.tokens_a_second, "tokens/s"))
        rows.append(figure(f"{text}, {name}: tokens a pass", speed.tokens_a_pass, ""))
        if name in predicted and text == CONTINUING:
            told = predicted[name]
            rows.append(figure(f"{text}, {name}: tokens a pass, predicted", told["tokens_a_pass"], ""))
            rows.append(figure(f"{text}, {name}: speed-up, by prediction", told["speedup"], "x"))
        rows.append(figure(f"{text}, {name}: speed-up", speed.speedup, "x"))
        rows.append(figure(f"{text}, {name}: tokens of plain decoding", float(speed.equal), "", "1", speed.equal))
    return rows


def said_by_whole_passes(model: Any, prompt: list[int], new: int, eos: list[int]) -> bool:
    """Whether transformers' own pass over the whole text, without a cache, says what plain decoding did."""
    import torch
    from refound.adapters.heads.decode import decode_plain, pick

    found = decode_plain(model, prompt, new_tokens=new, eos=eos).tokens
    with torch.inference_mode():
        logits = model.model(input_ids=torch.tensor([[*prompt, *found]])).logits[0, len(prompt) - 1 : -1]
    return tuple(pick(logits).tolist()) == found


def transformers_speed(model: Any, prompts: list[list[int]], new: int) -> float:
    """Tokens a second after the prompt, by its generate on the same module."""
    import torch

    def seconds(prompt: list[int], count: int) -> float:
        ids = torch.tensor([prompt])
        began = time.perf_counter()
        model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return time.perf_counter() - began

    few = prompts[:3]
    seconds(few[0], 2)
    took = sum(seconds(prompt, new) - seconds(prompt, 1) for prompt in few)
    return len(few) * (new - 1) / took if took > 0 else 0.0


def training_figures(kind: str, told: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [figure(f"{kind}: training, own text and measuring", told["seconds"], "s")]
    if kind == "medusa":
        rows.append(figure("medusa: nodes of the tree", told["nodes"], ""))
        rows += [figure(f"medusa: head {head} right", shares[0], "") for head, shares in enumerate(told["accuracy"])]
    elif kind == "draft":
        rows.append(figure("draft: says the model's token", told["agreement"], ""))
    else:
        for layer, one in told["agreement"].items():
            rows.append(figure(f"exit after {layer} layers: the model's token", one["trained"], ""))
            rows.append(figure(f"exit after {layer} layers, untrained: the model's token", one["bare"], ""))
        for name, one in told["thresholds"].items():
            rows.append(figure(f"exit, {name}: share of places where it acts", one["acts"], ""))
            rows.append(figure(f"exit, {name}: mistakes where it was chosen", one["risk"], ""))
    return rows


def risk_figures(told: dict[str, Any], source: Any, model: Any) -> list[dict[str, Any]]:
    """Thresholds on windows that did not choose them."""
    import torch
    from refound.adapters.heads.exit_run import open_exits
    from refound.adapters.heads.exits import evaluate, leaving, stopping
    from refound.distill.loop import eos_of
    from refound.distill.texts import open_tokenizer, pack

    settings = told["settings"]
    if settings["own"]:
        say("exit: its thresholds are for the model's own text, and are not held against real text")
        return []
    part, thresholds = open_exits(told["path"], source, model)
    tokenizer, length = open_tokenizer(source.path), settings["length"]
    count = min(settings["held_out"], 96)  # Python's documentation has no more for this part
    windows = pack(SOURCES, FRESH, tokenizer=tokenizer, eos=eos_of(source), count=count, length=length)
    seen = evaluate(part, model, torch.from_numpy(windows))
    outcomes = {"leave": leaving(seen, 0), "stop": stopping(seen, settings["useful"], 0)}
    rows, limit = [], settings["risk"]
    for name, value in thresholds.items():
        risk = outcomes[name](value)[1].double().mean().item()
        rows.append(figure(f"exit, {name}: mistakes on fresh text", risk, "", f"<= {limit:g}", risk <= limit))
    return rows


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
