# SPDX-License-Identifier: Apache-2.0
"""Carving as a whole: calibration, splits, gates and refitting, the written model. Run again, it goes on.

What a layer becomes are jobs of `nas.jobs`, named by what decides them; they depend on the dense model alone, not on
what other layers became, so they can be done in any order and used again by other carvings (`CarveConfig.keep`).
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...distill.config import digest
from ...distill.exclusive import only_one
from ...distill.loop import Distilled
from ...distill.models import load
from ...distill.quality import measure
from ...distill.resume import state_folder
from ...distill.save import RECORD, save_model
from ...export.architecture import Decoder
from ...export.atomic import require_absent, require_apart, size_text
from ...export.directory import ModelDirectory, open_directory, read_decoder
from ...export.errors import OutputExistsError, OutputSpaceError
from ..jobs import Job, Result, Store, run_jobs
from ..teacher import text_digest
from . import qk_norm
from .calibration import Calibration, windows_of
from .config import CarveConfig, Shape
from .errors import CarveUsageError, LayoutError, MoeError
from .evidence import fitted_windows
from .gates import distil_gate, virtual_gates
from .layouts import Layout, lay_out
from .module import Mixture, build_carved, stored_dtype
from .refit import refit
from .splits import LayerSplit, Split, find_split

Progress = Callable[[str], None]
VERSION = 2
"""Raised when the same settings give other weights than before."""


@dataclass(frozen=True, kw_only=True)
class CarvePlan:
    """What a carving would do."""

    config: CarveConfig
    layout: Layout
    dense: Decoder
    done: dict[str, int]
    jobs: dict[str, int]
    bytes: int

    @property
    def active(self) -> int:
        """Parameters of the layers' FFNs that a token takes, gates not counted, as a share of the dense model's."""
        return self.layout.shape.active

    def to_json(self) -> dict[str, Any]:
        layout = self.layout
        return {
            "schema": 1,
            "layout": layout.decoder.family,
            "model": str(layout.decoder),
            "shape": asdict(layout.shape) | {"expert_width": layout.shape.expert_width},
            "active_share": layout.shape.active / layout.shape.width,
            "scale": layout.scale,
            "parameters": layout.decoder.parameters,
            "dense_parameters": self.dense.parameters,
            "bytes": self.bytes,
            "jobs": self.jobs,
            "done": self.done,
            "split": self.config.split,
            "tokens": {"calibration": self.config.tokens, "training": self.config.training.tokens},
        }

    def to_text(self) -> str:
        layout, config = self.layout, self.config
        dense = len(layout.decoder.layers) - len(layout.sparse)
        jobs = ", ".join(f"{name} {self.done[name]} of {count} done" for name, count in self.jobs.items())
        lines = [
            f"{config.model}: {self.dense}",
            f"{layout.decoder.family}: {layout.shape}" + (f"; {dense} layers stay dense" if dense else ""),
            f"split by {config.split}; down projections times {layout.scale:g}"
            + (f", of shared channels times {layout.shared_scale:g}" if layout.shape.shared else ""),
            f"{layout.decoder.parameters / 1e6:.1f}M parameters of {self.dense.parameters / 1e6:.1f}M, "
            f"{size_text(self.bytes)}",
            f"jobs: {jobs or 'none'}; then {config.training.tokens:,} tokens of training",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Carved:
    """What a carving did."""

    path: Path
    layout: str
    shape: Shape
    layers: tuple[dict[str, Any], ...]
    """By layer with experts: `layer`, and of its gate agreement, kept, load, dead, left, before, after, all from before
    training; `load_after` and `dead_after` are those of the trained gates on held-out text."""
    quality: dict[str, Any] | None
    """Beside the dense model, on held-out text, before training. None: only Llama's blocks are measured."""
    trained: Distilled | None

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "path": str(self.path),
            "layout": self.layout,
            "shape": asdict(self.shape),
            "layers": list(self.layers),
            "quality": self.quality,
            "trained": None if self.trained is None else self.trained.to_json(),
        }

    def to_text(self) -> str:
        lines = [f"{self.path}: {self.layout}, {self.shape}"]
        gates = [layer for layer in self.layers if "agreement" in layer]
        if gates:
            agreement = sum(layer["agreement"] for layer in gates) / len(gates)
            kept = sum(layer["kept"] for layer in gates) / len(gates)
            lines.append(f"gates take {agreement:.0%} of the oracle's experts, and {kept:.0%} of the energy in them")
        dead = [(layer["layer"], expert) for layer in gates for expert in layer["dead"]]
        if dead:
            told = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead[:6])
            left = sum(len(layer.get("left", ())) for layer in gates)
            but = f", but {left} of them are dead still" if left else ""
            lines.append(f"{len(dead)} dead experts were put right{but}: {told}{' …' if len(dead) > 6 else ''}")
        if self.quality:
            lines.append(f"KL to the dense model {self.quality['kl']:.4f} ± {self.quality['kl_se']:.4f}")
        if self.trained:
            lines.append(str(self.trained))
        dead = [(layer["layer"], expert) for layer in gates for expert in layer.get("dead_after", ())]
        if dead:
            told = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead[:6])
            more = " …" if len(dead) > 6 else ""
            lines.append(f"after training {len(dead)} experts are dead on held-out text: {told}{more}")
        return "\n".join(lines)


class Carving:
    """One carving, stage by stage."""

    def __init__(self, config: CarveConfig, store: Store) -> None:
        self.config, self.store = config, store
        dense = read_decoder(config.model)
        if problem := _not_dense(dense):
            raise LayoutError(f"{config.model} {problem}")
        self.shape = config.shape(dense.layers[0].ffn.width)
        self.layout = lay_out(dense, self.shape, config.layout, config.dense_layers)
        self.split: Split = find_split(config.split)
        if problems := self.split.problems(self.shape, len(config.sources)):
            raise CarveUsageError("; ".join(problems))
        self.listens = self.split.needs != "nothing" or not self.shape.whole
        """Something is decided by text."""
        self.source = open_directory(config.model, tokenizer=self.listens or config.training.tokens > 0)
        self.source.check_numbers()
        blocks = dense.family if not self.layout.widened else self.layout.decoder.family
        self.measures = blocks == "llama" and (self.source.path / "tokenizer.json").is_file()
        if config.training.tokens and not self.measures:
            raise LayoutError(f"only Llama's blocks are trained, and these are {blocks}: say tokens=0")
        self.fingerprint = self.source.fingerprint()
        self.calibration = Calibration(self.source, config, self.fingerprint, store)
        if self.listens:
            self._enough_text()

    def _enough_text(self) -> None:
        windows = len(self.calibration.windows)  # too little text is said now, not later
        experts, sources = self.shape.experts, len(self.config.sources)
        if self.split.needs == "gradients" and fitted_windows(windows) < experts:
            enough = next(n for n in range(0, 4 * experts + 4 * sources, sources) if fitted_windows(n) >= experts)
            raise CarveUsageError(
                f"{windows} windows cannot be clustered for {experts} experts, an eighth of them being held out; say "
                f"--tokens {enough * self.config.length} or more"
            )

    @cached_property
    def training_windows(self) -> torch.Tensor:
        """What experts and gates are trained on: (n, length) int64, none without training."""
        training = self.config.training
        if not training.tokens:
            return torch.empty(0, training.length, dtype=torch.int64)
        count = max(training.tokens // (training.length * training.batch), 1) * training.batch
        return windows_of(self.source, replace(self.config, length=training.length), "train", count)

    @cached_property
    def held_out_windows(self) -> torch.Tensor:
        """What quality is measured on; none where it is not."""
        if not self.measures:
            return torch.empty(0, self.config.length, dtype=torch.int64)
        return windows_of(self.source, self.config, "test", self.config.held_out)

    @cached_property
    def run(self) -> str:
        """What decides the result: settings, the model, and the tokens themselves, since a file keeps its name when
        its text is another."""
        config = replace(self.config, model=Path(), out=Path(), keep=None, overwrite=False)
        texts = [self.calibration.text if self.listens else ""]
        texts += [text_digest(self.training_windows), text_digest(self.held_out_windows)]
        return digest([VERSION, self.fingerprint, json.loads(json.dumps(asdict(config), default=str)), texts])

    def split_job(self, layer: int) -> Job:
        text = self.calibration.text if self.split.needs != "nothing" else ""
        config = self.config
        key = {"model": self.fingerprint, "layer": layer, "split": config.split, "text": text, "seed": config.seed}
        domains = len(config.sources) if text else 0
        return Job(kind="split", key=key | {"shape": asdict(self.shape), "domains": domains, "version": VERSION})

    def gate_job(self, layer: int) -> Job:
        text = self.calibration.text if self.listens else ""
        config, split = self.config, self.split_job(layer).id
        key = {"split": split, "text": text, "router": asdict(config.router), "refit": list(config.refit)}
        return Job(kind="gate", key=key | {"normalized": self.layout.normalized, "seed": config.seed})

    def calibration_jobs(self) -> list[Job]:
        if not self.listens:
            return []
        return self.calibration.jobs("gradients" if self.split.needs == "gradients" else "activations")

    def _draw(self, layer: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, layer])

    def split_of(self, layer: int) -> LayerSplit:
        tensors, _ = self.store.read(self.split_job(layer))
        order, shared, width = tensors["order"].tolist(), self.shape.shared, self.shape.expert_width
        experts = tuple(tuple(order[begin : begin + width]) for begin in range(shared, len(order), width))
        return LayerSplit(experts=experts, shared=tuple(order[:shared]))

    def compute_split(self, layer: int) -> Result:
        needs = self.split.needs
        seen = self.calibration.evidence(layer, needs) if needs != "nothing" else None
        found = self.split.split(self.shape, seen, self._draw(layer))
        if problem := found.problem(self.shape):
            raise MoeError(f"layer {layer}: {problem}")
        return {"order": torch.tensor(found.order)}, {}

    def compute_gate(self, layer: int) -> Result:
        shape, hidden, split = self.shape, self.source.decoder.hidden_size, self.split_of(layer)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + layer)
        if shape.copies > 1:
            return {"router": virtual_gates(shape, hidden, self.config.router.spread, generator)}, {}
        if shape.whole:
            return {"router": torch.zeros(shape.experts, hidden)}, {}
        seen = self.calibration.evidence(layer, "activations")
        gate = distil_gate(seen, split, shape, self.config.router, generator)
        fitted = refit(seen, split, gate.weight, self.layout, self.config.refit)
        facts = {"agreement": gate.agreement, "kept": gate.kept, "load": list(gate.load)}
        facts |= {"dead": list(gate.dead), "left": list(gate.left)}
        return {"router": gate.weight, "down": fitted.down}, facts | {"before": fitted.before, "after": fitted.after}

    def mixture(self, layer: int) -> Mixture:
        """The weights of one layer as the layout stores them, in float32."""
        order = torch.tensor(self.split_of(layer).order)
        prefix = f"model.layers.{layer}.mlp."
        names = [f"{prefix}{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
        dense = {name: tensor.float() for name, tensor in self.source.weights(names)}
        tensors, _ = self.store.read(self.gate_job(layer))
        down = tensors.get("down", dense[names[2]][:, order]).clone()
        down[:, : self.shape.shared] *= self.layout.shared_scale
        down[:, self.shape.shared :] *= self.layout.scale
        return Mixture(router=tensors["router"], gate=dense[names[0]][order], up=dense[names[1]][order], down=down)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights of the carved model by its names, in the type that the dense one is stored in."""
        decoder, moe = self.layout.decoder, self.layout.moe
        found: dict[str, torch.Tensor] = {}
        for layer in self.layout.sparse:
            named = self.mixture(layer).named(moe, decoder.layers[layer].ffn)
            found |= {f"model.layers.{layer}.{name}": tensor.to(self.dtype) for name, tensor in named.items()}
        own = self.source.decoder.tensors()
        if self.layout.widened:
            for layer, kind in enumerate(self.source.decoder.layers):
                found |= self._attention(layer, kind.attention.kv_heads)
        found |= dict(self.source.weights([name for name in decoder.tensors() if name not in found and name in own]))
        missing = {name: spec for name, spec in decoder.tensors().items() if name not in found}  # biases of zeros
        return found | {name: torch.zeros(spec.shape, dtype=self.dtype) for name, spec in missing.items()}

    def _attention(self, layer: int, kv_heads: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{layer}.self_attn."
        names = [name for name in self.source.decoder.tensors() if name.startswith(prefix)]
        own = {name.removeprefix(prefix): tensor for name, tensor in self.source.weights(names)}
        found = qk_norm.widened(own, self.source.decoder, kv_heads)
        return {prefix + name: tensor for name, tensor in found.items()}

    @property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.source)

    def facts(self) -> list[dict[str, Any]]:
        return [{"layer": layer, **self.store.facts(self.gate_job(layer))} for layer in self.layout.sparse]

    def jobs(self) -> dict[str, list[Job]]:
        layers = self.layout.sparse
        return {
            "calibration": self.calibration_jobs(),
            "splits": [self.split_job(layer) for layer in layers],
            "gates": [self.gate_job(layer) for layer in layers],
        }

    def calibrate(self, progress: Progress) -> None:
        """Hear the dense model on the text, where anything is decided by it."""
        run_jobs("calibration", self.calibration_jobs(), self.store, self.calibration.compute, progress)

    def run_jobs(self, progress: Progress) -> None:
        jobs, layers = self.jobs(), self.layout.sparse
        for known in jobs.values():
            for job in known:
                with contextlib.suppress(KeyError):  # not done yet, or damaged and said so
                    self.store.read(job)
        if all(self.store.is_done(job) for job in (*jobs["splits"], *jobs["gates"])):
            progress("splits and gates are done already")
            return
        self.calibrate(progress)
        split_of = {job.id: layer for job, layer in zip(jobs["splits"], layers, strict=True)}
        run_jobs("splits", jobs["splits"], self.store, lambda job: self.compute_split(split_of[job.id]), progress)
        gate_of = {job.id: layer for job, layer in zip(jobs["gates"], layers, strict=True)}
        run_jobs("gates", jobs["gates"], self.store, lambda job: self.compute_gate(gate_of[job.id]), progress)


def _not_dense(decoder: Decoder) -> str | None:
    kinds = {layer.ffn.kind for layer in decoder.layers}
    if "moe" in kinds:
        return "has experts already; carving wants a dense model"
    if kinds != {"dense"} or len({layer.ffn.width for layer in decoder.layers}) > 1:
        return "has layers whose FFNs differ, and no family with experts has words for that; carve its teacher instead"
    return None


def plan_carve(config: CarveConfig) -> CarvePlan:
    """What `run_carve` would do, without doing any of it. Raises as it does."""
    carving = Carving(config, Store(_folder(config) / "store"))
    jobs = carving.jobs()
    return CarvePlan(
        config=config,
        layout=carving.layout,
        dense=carving.source.decoder,
        done={name: sum(carving.store.is_done(job) for job in known) for name, known in jobs.items()},
        jobs={name: len(known) for name, known in jobs.items()},
        bytes=carving.layout.decoder.parameters * carving.dtype.itemsize,
    )


def run_carve(config: CarveConfig, progress: Progress) -> Carved:
    """Carve and write the model to `config.out`; what is there already of the same run is returned.

    Raises:
        ExportError, DistillError, SearchError: for a model, a text, a layout or settings that cannot be used.
    """
    folder = _folder(config)
    with _held(folder):
        carving = Carving(config, Store(folder / "store"))
        if (found := _finished(config, carving.run)) is not None:
            progress(f"{config.out} is the result of this very run already")
            # of a process that was killed when its model was written and its state not yet gone
            shutil.rmtree(state_folder(config.out), ignore_errors=True)
        else:
            require_apart(config.out, [config.model])
            require_absent(config.out, overwrite=config.overwrite)
            carving.store.sweep()
            carving.run_jobs(progress)
            found = _write(carving, progress)
    if config.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _write(carving: Carving, progress: Progress) -> Carved:
    config, layout = carving.config, carving.layout
    weights, quality, trained, loop = carving.weights(), None, None, None
    for layer in (facts := carving.facts()):
        if layer.get("dead"):
            but = f", but {layer['left']} are dead still" if layer["left"] else ""
            progress(f"layer {layer['layer']}: dead experts {layer['dead']} were put right{but}")
    if carving.measures:
        progress("measuring beside the dense model")
        child = build_carved(layout.decoder, weights)
        quality = measure(child, load(carving.source), carving.held_out_windows).to_json()
    if config.training.tokens:
        from .finetune import finetune

        done = finetune(carving, weights, progress)
        trained, weights, loop = done.outcome, done.weights, done.loop
        facts = [fact | after for fact, after in zip(facts, done.loads, strict=True)]
    found = Carved(
        path=config.out,
        layout=layout.decoder.family,
        shape=carving.shape,
        layers=tuple(facts),
        quality=quality,
        trained=trained,
    )
    record = {
        "source": {"path": str(carving.source.path.absolute()), "sha256": carving.fingerprint},
        "recipe": json.loads(json.dumps(asdict(config), default=str)),
        "carved": {"run": carving.run, "scale": layout.scale, **found.to_json()},
    }
    save_model(
        config.out,
        layout.decoder,
        weights,
        companions_of=carving.source,
        record=record,
        overwrite=config.overwrite,
        card=make_card(carving, found),
    )
    if loop is not None:
        loop.close()
    return found


def make_card(carving: Carving, found: Carved) -> str:
    """The model card, in Markdown with the metadata that the Hub reads."""
    layout, config = carving.layout, carving.config
    lines = ["---", "library_name: transformers", "tags: [refound, moe]", "pipeline_tag: text-generation", "---", ""]
    lines += [f"# {config.out.name}", "", f"{layout.decoder.parameters / 1e6:.1f} M parameters: {layout.decoder}.", ""]
    lines += [
        f"Carved by `refound carve` out of {carving.source.path.name}: {found.shape}, split by {config.split}.",
        "",
    ]
    if found.quality:
        told = f"{found.quality['kl']:.4f} ± {found.quality['kl_se']:.4f}"
        lines += [
            f"KL(dense || carved) before training: {told} nats a token, on {config.held_out} held-out windows.",
            "",
        ]
    if found.trained:
        after = found.trained.after
        lines += [f"After {found.trained.tokens:,} tokens of training: {after.kl:.4f} ± {after.kl_se:.4f}.", ""]
    texts = ", ".join(config.sources)
    lines += [f"Text: {texts}. Serve it with `refound export {config.out.name} --to vllm,llama.cpp`."]
    return "\n".join(lines) + "\n"


def _folder(config: CarveConfig) -> Path:
    return config.keep or config.out.absolute().with_name(f".{config.out.absolute().name}.carve")


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    with only_one(folder, "carving", "--keep", taken=OutputExistsError, unwritable=OutputSpaceError):
        yield


def _finished(config: CarveConfig, run: str) -> Carved | None:
    try:
        told = json.loads((config.out / RECORD).read_text())["carved"]
        if told["run"] != run:
            return None
        return Carved(
            path=config.out,
            layout=told["layout"],
            shape=Shape(**told["shape"]),
            layers=tuple(told["layers"]),
            quality=told["quality"],
            trained=told["trained"] and Distilled.of_json(told["trained"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def carved_source(path: Path) -> ModelDirectory:
    """A directory with experts, checked whole.

    Raises:
        LayoutError: if it has none.
    """
    source = open_directory(path, tokenizer=False)
    if not source.decoder.moe_layers:
        raise LayoutError(f"{path} has no experts; make some with: refound carve {path}")
    return source
