# SPDX-License-Identifier: Apache-2.0
"""Dense to mixture of experts, on SmolLM2-135M: identities, splits beside one another, pre-gating, decode speed.

    python benchmarks/moe.py [--json] [--tiny] [--tokens N] [--calibration N] [--out DIR] [--only STAGE]

Identities: all of 8 experts active, written in each layout, run by transformers in float32 beside the dense model; the
largest logit difference on held-out text, and its largest logit for scale. Then exported for llama.cpp and vLLM, where
they are installed (`make engines`) and take the layout, and run there in float32: greedy tokens that are the dense
model's in transformers, and the largest difference of their log-probabilities.

Splits: half of each FFN active, trained on the same tokens by the same loop, then KL(dense || carved) on the same
held-out windows. Ours takes 8 of 16 experts of 96 channels. `random` differs from it in the split alone: its gates are
distilled and its down projections refitted, too. CMoE (2502.04416) is reproduced here from its paper, with a third of
the channels shared and 4 of 16 experts of 64: shared and clustered by the marks of the most active channels, one round
of balanced k-means by an n x n assignment, the bilinear router of each cluster's representative channel, weights
1 + s α with α trained from 0. Its router is no linear gate, so no stock engine serves it; ours is measured as served.

Pre-gating: trained by turns with the experts of ours; its agreement with the layer-wise oracle on held-out tokens.
A run with --out that was cut off goes on.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _figures import figure, tell


@dataclass(frozen=True)
class Sizes:
    """What is run, by how much text."""

    calibration: int
    tokens: int
    length: int
    batch: int
    lr: float
    experts: int
    active: int
    cmoe_active: int
    cmoe_shared: int
    held_out: int
    marks: int
    """Channels that CMoE marks for each token."""
    identity: int
    pregate_tokens: int
    pregate_steps: int


FULL = Sizes(8192, 8192, 256, 2, 2e-4, 16, 8, 4, 512, 8, 10, 8, 24576, 200)
TINY = Sizes(1024, 1024, 32, 4, 1e-3, 8, 4, 2, 32, 8, 6, 8, 1024, 20)
STAGES = ("identities", "ours", "random split", "CMoE", "pre-gating", "speed")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    sizes = TINY if options.tiny else FULL
    sizes = replace(sizes, **{k: v for k in ("calibration", "tokens") if (v := getattr(options, k)) is not None})
    with tempfile.TemporaryDirectory(prefix="refound-moe-") as folder:
        out = options.out or Path(folder)
        dense = tiny_model(out / "tiny") if options.tiny else smollm2()
        stages: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "identities": lambda: identity_figures(dense, sizes, out),
            "ours": lambda: carved_figures("ours", "coactivation", dense, sizes, out),
            "random split": lambda: carved_figures("random split", "random", dense, sizes, out),
            "CMoE": lambda: cmoe_figures(dense, sizes, out),
            "pre-gating": lambda: pregate_figures(dense, sizes, out),
            "speed": lambda: speed_figures(dense, out / "ours"),
        }
        rows = [row for name in options.only or STAGES for row in kept(out / f"{name}.json", stages[name])]
        rows += ratios(rows)
    tell(rows, as_json=options.json)


def kept(file: Path, stage: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The figures of a stage, which are not taken twice in one --out."""
    if not file.is_file():
        say(f"--- {file.stem}")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = stage()
        file.write_text(json.dumps(rows))
    return json.loads(file.read_text())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--tiny", action="store_true", help="a small random model, to see that it runs")
    parser.add_argument("--tokens", type=int, help="to train each on")
    parser.add_argument("--calibration", type=int, help="tokens to decide splits and gates by")
    parser.add_argument("--only", action="append", choices=STAGES, help="this stage; again for more")
    parser.add_argument("--out", type=Path, help="keep everything here, and go on from what is there")
    return parser.parse_args(arguments)


def smollm2() -> Path:
    from refound.distill.smollm2 import smollm2_directory

    return smollm2_directory()


def tiny_model(folder: Path) -> Path:
    """The random model of the tests of the export, with a tokenizer of its own."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "export"))
    from models import decoder, write_model  # pyright: ignore[reportMissingImports]

    return write_model(folder, decoder(layers=3))


def config(dense: Path, sizes: Sizes, out: Path, **changes: Any) -> Any:
    from refound.distill.config import Training
    from refound.nas.moe.config import CarveConfig

    training = Training(
        tokens=sizes.tokens, length=sizes.length, batch=sizes.batch, lr=sizes.lr, quality_every=sizes.tokens
    )
    base = CarveConfig(
        model=dense,
        out=out,
        experts=sizes.experts,
        active=sizes.active,
        tokens=sizes.calibration,
        length=sizes.length,
        training=training,
        held_out=sizes.held_out,
    )
    return replace(base, **changes)


# --- identities ----------------------------------------------------------------------------------------------------


def identity_figures(dense: Path, sizes: Sizes, out: Path) -> list[dict[str, Any]]:
    from refound.distill.config import Training
    from refound.export.directory import open_directory
    from refound.nas.moe.calibration import windows_of
    from refound.nas.moe.carve import run_carve

    rows, wanted, ids, reference = [], None, None, None
    for layout in ("mixtral", "qwen2_moe", "qwen3_moe"):
        own = config(
            dense,
            sizes,
            out / f"identity-{layout}",
            experts=sizes.identity,
            active=sizes.identity,
            split="random",
            layout=layout,
            training=Training(tokens=0),
        )
        if ids is None or wanted is None:
            ids = windows_of(open_directory(dense), own, "test", 2)
            wanted = logits_of(dense, ids)
            rows.append(figure("largest logit of the dense model", wanted.abs().max().item(), ""))
            reference = greedy("transformers", dense, dense)
        carved = run_carve(own, say).path
        off = (logits_of(carved, ids) - wanted).abs().max() / wanted.abs().max()
        parts = 1e6 * off.item()
        name = f"all experts in {layout}: largest logit difference"
        rows.append(figure(name, parts, "millionths of the largest", "<= 20", parts <= 20))
        rows += [row for engine in ("llama.cpp", "vllm") for row in served_figures(engine, dense, carved, reference)]
    return rows


def greedy(engine: str, dense: Path, served: Path) -> Any:
    """(the engine's version, what it answers to the dense model's prompts)."""
    from refound.export.directory import open_directory
    from refound.export.proof import make_prompts, run_engine

    answer = run_engine(engine, [served], make_prompts(open_directory(dense)))
    return answer["version"], answer["models"][0]


def served_figures(engine: str, dense: Path, carved: Path, reference: Any) -> list[dict[str, Any]]:
    """The carved model in an engine against the dense one in transformers; none where the engine is not to be had."""
    from refound.export.environments import engine_python
    from refound.export.errors import EngineFitError
    from refound.export.plan import ExportConfig
    from refound.export.proof import TOLERANCES, compare
    from refound.export.run import export_model

    layout = carved.name.removeprefix("identity-")
    if not engine_python(engine):
        say(f"{engine} is not installed here: {layout} is not served by it")
        return []
    with tempfile.TemporaryDirectory(prefix="refound-identity-") as folder:
        wanted = ExportConfig(model=carved, engines=(engine,), out=Path(folder, "export"), verify=False)
        try:
            (done,) = export_model(wanted, say)
        except EngineFitError as error:
            say(f"{layout} is not for {engine}: {error}")
            return []
        version, found = greedy(engine, dense, done.part.model_path)
    told = compare(engine, version, reference[1], found, TOLERANCES["f32"])
    total, name = told.prompts * told.tokens_each, f"all experts in {layout} by {engine}"
    return [
        figure(
            f"{name}: greedy tokens that are the dense model's",
            told.equal_tokens / total,
            "",
            "all but ties",
            told.holds,
        ),
        figure(f"{name}: largest difference of log-probabilities", told.logprob_difference or 0.0, "nats"),
    ]


def logits_of(path: Path, ids: Any) -> Any:
    """As transformers computes them in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- splits --------------------------------------------------------------------------------------------------------


def carved_figures(name: str, split: str, dense: Path, sizes: Sizes, out: Path) -> list[dict[str, Any]]:
    from refound.nas.moe.carve import run_carve

    began = time.monotonic()
    found = run_carve(config(dense, sizes, out / name.split()[0], split=split, keep=out / "work"), say)
    assert found.trained is not None
    rows = kl_figures(name, found.trained)
    means = {key: sum(one[key] for one in found.layers) / len(found.layers) for key in ("agreement", "kept", "after")}
    rows.append(figure(f"{name}: gates take of the oracle's experts", means["agreement"], ""))
    rows.append(figure(f"{name}: energy in these, of the oracle's", means["kept"], ""))
    rows.append(figure(f"{name}: squared error of an FFN before training", means["after"], ""))
    rows.append(figure(f"{name}: time of this run", time.monotonic() - began, "s"))
    return rows


def cmoe_figures(dense: Path, sizes: Sizes, out: Path) -> list[dict[str, Any]]:
    return kl_figures("CMoE", cmoe(config(dense, sizes, out / "cmoe", keep=out / "work", balance=0.0), sizes))


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """KL of ours by that of the others, of those stages that were run."""
    after = {row["name"].split(":")[0]: row["value"] for row in rows if ": KL after" in row["name"]}
    found = []
    for name, bar in (("random split", 0.8), ("CMoE", 1.0)):
        if "ours" in after and name in after:
            ratio = after["ours"] / after[name]
            found.append(figure(f"KL of ours, by that of {name}", ratio, "x", f"<= {bar:g}", ratio <= bar))
    return found


def kl_figures(name: str, trained: Any) -> list[dict[str, Any]]:
    return [
        figure(f"{name}: KL before training", trained.before.kl, "nats"),
        figure(f"{name}: KL after {trained.tokens} tokens", trained.after.kl, "nats"),
        figure(f"{name}: standard error of it", trained.after.kl_se, "nats"),
    ]


def cmoe(own: Any, sizes: Sizes) -> Any:
    """CMoE's construction of the same shape, trained by the same loop on the same tokens."""
    from refound.distill.config import DistillConfig
    from refound.distill.loop import Loop
    from refound.distill.models import load
    from refound.nas.jobs import Store
    from refound.nas.moe.calibration import windows_of
    from refound.nas.moe.carve import Carving

    carving = Carving(own, Store(own.keep / "store"))
    carving.calibrate(say)
    child: Any = load(carving.source)
    for index, layer in enumerate(child.model.layers):
        layer.mlp = cmoe_ffn(carving.calibration.evidence(index, "activations"), sizes)
        layer.post_attention_layernorm.requires_grad_(True)
        say(f"CMoE: layer {index}")
    training = own.training
    steps = training.tokens // (training.length * training.batch)
    loop = Loop(
        DistillConfig(child=own.model, teacher=own.model, out=own.out, sources=own.sources, training=training),
        child,
        load(carving.source),
        windows_of(carving.source, replace(own, length=training.length), "train", steps * training.batch),
        windows_of(carving.source, own, "test", own.held_out),
        f"cmoe {carving.run}",
        None,
        alone=True,
    )
    found = loop.run(steps, say)
    loop.close()
    return found


def cmoe_ffn(seen: Any, sizes: Sizes) -> Any:
    """One layer of CMoE: its split, and the module."""
    import numpy as np
    import torch
    from scipy.optimize import linear_sum_assignment
    from torch.nn import functional

    unit = [functional.normalize(x, dim=1) for x in (seen.inputs, seen.gate, seen.up)]
    hidden = functional.silu(unit[0] @ unit[1].T) * (unit[0] @ unit[2].T)
    marks = torch.zeros_like(hidden).scatter_(1, hidden.abs().topk(sizes.marks, dim=1).indices, 1.0)
    order = marks.mean(0).argsort(descending=True, stable=True)
    shared, rest = order[: sizes.cmoe_shared], order[sizes.cmoe_shared :]
    columns = marks[:, rest].T.contiguous()
    centres = columns[: sizes.experts]
    # L1 between binary marks: |a| + |b| - 2 a·b; against means of marks it is a sum, and cdist does it
    distance = columns.sum(1, keepdim=True) + centres.sum(1) - 2 * columns @ centres.T
    each = len(rest) // sizes.experts
    places = np.repeat(distance.double().numpy(), each, axis=1)
    _, place = linear_sum_assignment(places)
    cluster = torch.from_numpy(place // each)
    experts, speakers = [], []
    for number in range(sizes.experts):
        mine = torch.nonzero(cluster == number).flatten()
        centre = columns[mine].mean(0)
        speakers.append(rest[mine[(columns[mine] - centre).abs().sum(1).argmin()]])
        experts.append(rest[mine])
    return cmoe_module()(seen, shared, torch.cat(experts), torch.stack(speakers), sizes)


def cmoe_module() -> Callable[..., Any]:
    import torch
    from torch import nn
    from torch.nn import functional

    class CMoeFFN(nn.Module):
        """Shared channels and experts with weight 1 + s α; s from the channels that speak for their clusters."""

        def __init__(self, seen: Any, shared: Any, experts: Any, speakers: Any, sizes: Sizes) -> None:
            super().__init__()
            rows = torch.cat([shared, experts])
            self.gate, self.up = nn.Parameter(seen.gate[rows].clone()), nn.Parameter(seen.up[rows].clone())
            self.down = nn.Parameter(seen.down[:, rows].clone())
            unit = [functional.normalize(x[speakers], dim=1) for x in (seen.gate, seen.up)]
            self.router_gate, self.router_up = nn.Parameter(unit[0]), nn.Parameter(unit[1])
            self.alpha = nn.Parameter(torch.zeros(sizes.experts))
            self.shared, self.top_k, self.each = len(shared), sizes.cmoe_active, len(experts) // sizes.experts

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            unit = functional.normalize(x, dim=-1)
            scores = (functional.silu(unit @ self.router_gate.T) * (unit @ self.router_up.T)).abs()
            share = torch.softmax(scores, -1)
            chosen = share.topk(self.top_k, dim=-1).indices
            weights = torch.zeros_like(share).scatter(-1, chosen, 1.0) * (1 + share * self.alpha)
            each = weights.repeat_interleave(self.each, -1)
            always = torch.ones(*x.shape[:-1], self.shared)
            inner = functional.silu(x @ self.gate.T) * (x @ self.up.T)
            return (inner * torch.cat([always, each], -1)) @ self.down.T

    return CMoeFFN


# --- pre-gating ----------------------------------------------------------------------------------------------------


def pregate_figures(dense: Path, sizes: Sizes, out: Path) -> list[dict[str, Any]]:
    from refound.distill.config import Training
    from refound.nas.moe.pregating import run_pregating
    from refound.nas.moe.pregating_config import PreGateConfig

    training = Training(tokens=sizes.tokens // 2, length=sizes.length, batch=sizes.batch, lr=sizes.lr)
    found = run_pregating(
        PreGateConfig(
            model=out / "ours",
            dense=dense,
            out=out / "pregated",
            tokens=sizes.pregate_tokens,
            length=sizes.length,
            steps=sizes.pregate_steps,
            training=training,
            held_out=sizes.held_out,
            overwrite=True,
        ),
        say,
    )
    return [
        figure("pre-gating: oracle's experts, held-out tokens", found.oracle, "", ">= 0.8", found.oracle >= 0.8),
        figure("pre-gating: layers' own gates' experts", found.gates, ""),
        figure("pre-gating: the same by chance", found.chance, ""),
        figure("pre-gating: KL with the sidecar", found.pregated.kl, "nats"),
        figure("pre-gating: KL by the layers' own gates", found.stock.kl, "nats"),
    ]


# --- speed ---------------------------------------------------------------------------------------------------------


def speed_figures(dense: Path, carved: Path) -> list[dict[str, Any]]:
    """Decoding on transformers, and on llama.cpp where it is installed: carved by dense, whatever it is."""
    from refound.export.directory import open_directory
    from refound.export.environments import engine_python
    from refound.export.proof import make_prompts, run_engine

    prompts = make_prompts(open_directory(dense))
    rows = []
    for engine in ("transformers", "llama.cpp"):
        if not engine_python(engine):
            say(f"{engine} is not installed here")
            continue
        models = [dense, carved] if engine == "transformers" else gguf([dense, carved])
        told = run_engine(engine, models, prompts, new_tokens=32)["models"]
        speeds = [one["decode_tok_s"] for one in told]
        rows.append(figure(f"decode on {engine}: dense", speeds[0], "tok/s"))
        rows.append(figure(f"decode on {engine}: carved", speeds[1], "tok/s"))
        rows.append(figure(f"decode on {engine}: carved by dense", speeds[1] / speeds[0], "x"))
    return rows


def gguf(models: list[Path]) -> list[Path]:
    """Each as a GGUF file beside it."""
    from refound.export.plan import ExportConfig
    from refound.export.run import export_model

    found = []
    for model in models:
        out = Path(tempfile.mkdtemp(prefix="refound-gguf-"))
        (done,) = export_model(ExportConfig(model=model, engines=("llama.cpp",), out=out, verify=False), say)
        found.append(done.part.model_path)
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
