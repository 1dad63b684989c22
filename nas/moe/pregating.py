# SPDX-License-Identifier: Apache-2.0
"""A carved model and its pre-gating model, trained by turns (Read-ME 2410.19123, section 3.3).

A round: the oracle is heard on the model as it is (how much output energy each expert holds, for every token and
layer); the pre-gating model learns it; then the experts learn from the dense model, taking what the pre-gating model
says, and the layers' own gates learn to say the same, so that a stock engine, which knows only those, stays near. Each
half of a round is a job, and within it the state is on disk: a killed run goes on, to the same bytes.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...distill.config import DistillConfig, digest
from ...distill.exclusive import only_one
from ...distill.loop import Loop, Position
from ...distill.models import load, open_blocks
from ...distill.quality import Quality, measure
from ...distill.resume import guard, state_folder
from ...distill.save import RECORD, fill_model
from ...distill.texts import Part
from ...export.atomic import fresh_directory, require_absent, require_apart
from ...export.errors import OutputExistsError, OutputSpaceError
from ..jobs import Job, Store
from ..teacher import text_digest
from .calibration import windows_of
from .carve import carved_source
from .errors import LayoutError, MoeError
from .finetune import balance, trainable
from .hearing import gate_choice, oracle_energy
from .module import carved_weights, load_carved, mixtures, stored_dtype
from .pregate import FACTS, PreGate, PreGateShape, agreement, pregate_loss, read_sidecar, start, write_sidecar
from .pregating_config import HEADS, PreGateConfig
from .trace import model_sha256

Progress = Callable[[str], None]
VERSION = 2
"""Raised when the same settings give other weights than before."""


@dataclass(frozen=True, kw_only=True)
class PreGated:
    """What came of it, on held-out text."""

    path: Path
    sidecar: Path
    rounds: tuple[dict[str, float], ...]
    """After each: how often the pre-gating model says what the oracle and what the gates say, before and after the
    experts were trained."""
    oracle: float
    """Its agreement with the oracle at the end."""
    gates: float
    """Its agreement with the layers' own gates at the end."""
    chance: float
    """The agreement of any k of E experts."""
    before: Quality
    pregated: Quality
    """Of the model with its sidecar."""
    stock: Quality
    """Of the model without: by its layers' own gates."""

    def to_json(self) -> dict[str, Any]:
        plain = {key: getattr(self, key) for key in ("oracle", "gates", "chance")}
        quality = {key: getattr(self, key).to_json() for key in ("before", "pregated", "stock")}
        paths = {"path": str(self.path), "sidecar": str(self.sidecar)}
        return {"schema": 1, **paths, "rounds": list(self.rounds), **plain, **quality}

    @staticmethod
    def of_json(told: dict[str, Any], config: PreGateConfig) -> "PreGated":
        """From the record of a run that went to `config.out`."""
        return PreGated(
            path=config.out,
            sidecar=config.sidecar,
            rounds=tuple(told["rounds"]),
            oracle=told["oracle"],
            gates=told["gates"],
            chance=told["chance"],
            before=Quality(**told["before"]),
            pregated=Quality(**told["pregated"]),
            stock=Quality(**told["stock"]),
        )

    def to_text(self) -> str:
        return (
            f"{self.path}, and {self.sidecar} beside it\n"
            f"held-out tokens: {self.oracle:.1%} of the oracle's experts, {self.gates:.1%} of the gates' "
            f"({self.chance:.1%} by chance)\n"
            f"before:       {self.before}\npre-gated:    {self.pregated}\nits own gates: {self.stock}"
        )


@contextlib.contextmanager
def pregated(child: Any, pregate: PreGate) -> Iterator[None]:
    """While the block runs, the child's mixtures take the experts that `pregate` says, whatever ids it is given."""

    def ask(_: Any, arguments: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
        with torch.no_grad():
            chosen = pregate.choice(arguments[0])
        for index, mixture in enumerate(mixtures(child)):
            mixture.forced = chosen[:, :, index]

    hook = child.model.embed_tokens.register_forward_hook(ask)
    try:
        yield
    finally:
        hook.remove()
        for mixture in mixtures(child):
            mixture.forced = None


class _PreGating:
    def __init__(self, config: PreGateConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.source, self.dense = carved_source(config.model), open_blocks(config.dense)
        for name in ("vocab_size", "hidden_size"):
            if getattr(self.source.decoder, name) != getattr(self.dense.decoder, name):
                raise LayoutError(f"{config.model} was not carved out of {config.dense}: another {name}")
        if len(self.source.decoder.layers) != len(self.dense.decoder.layers):
            raise LayoutError(f"{config.model} was not carved out of {config.dense}: another number of layers")
        self.windows = self._windows("train", config.tokens // config.length, config.length)
        self.test = self._windows("test", config.held_out, config.length)
        # each round takes text that the rounds before it did not; too little is said now, not after the first
        training = config.training
        self.steps = training.tokens // (training.length * training.batch)
        self.each = max(self.steps, 1) * training.batch if training.tokens else 0
        self.expert_windows = self._windows("train", self.each * config.rounds, training.length)
        texts = [text_digest(text) for text in (self.windows, self.test, self.expert_windows)]
        models = [self.source.fingerprint(), self.dense.fingerprint()]
        self.run = digest([VERSION, *models, self._settings(), texts])
        self.store = Store(_folder(config) / "store")

    @cached_property
    def child(self) -> Any:
        return load_carved(self.source)

    @cached_property
    def teacher(self) -> Any:
        return load(self.dense)

    @cached_property
    def pregate(self) -> PreGate:
        config, decoder = self.config, self.source.decoder
        sparse = [decoder.layers[index].ffn for index in decoder.moe_layers]
        shape = PreGateShape(
            vocab_size=decoder.vocab_size,
            layers=len(sparse),
            experts=sparse[0].experts,
            top_k=sparse[0].top_k,
            size=config.size,
            blocks=config.blocks,
            heads=HEADS,
        )
        return start(shape, self.child.model.embed_tokens.weight, config.seed)

    def _settings(self) -> Any:
        plain = asdict(self.config) | {"model": "", "dense": "", "out": "", "overwrite": False}
        return json.loads(json.dumps(plain, default=str))

    def _windows(self, part: Part, count: int, length: int) -> torch.Tensor:
        return windows_of(self.dense, replace(self.config, length=length), part, count)

    def _done(self, what: str, number: int, module: torch.nn.Module) -> bool:
        """Whether that half of a round is on record; `module` then has its weights."""
        try:
            tensors, _ = self.store.read(self._job(what, number))
        except KeyError:
            return False
        module.load_state_dict(tensors, strict=False)
        return True

    def _job(self, what: str, number: int) -> Job:
        return Job(kind=what, key={"run": self.run, "round": number})

    def learn_gates(self, number: int) -> None:
        """The pre-gating model's half of round `number`."""
        config = self.config
        if self._done("pregate", number, self.pregate):
            return
        self.progress(f"round {number}: hearing the oracle on {self.windows.numel():,} tokens")
        with pregated(self.child, self.pregate) if number > 1 else contextlib.nullcontext():
            labels = oracle_energy(self.child, self.windows).half()
        model = self.pregate.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
        data = Position(len(self.windows), batch=config.batch, seed=config.seed + number, drop_last=True)
        folder = state_folder(config.gates_out(number))
        kept = guard(
            folder, run=f"{self.run}.{number}", every=50, model=model, optimizer=optimizer, data=data, alone=True
        )
        while kept.step < config.steps:
            for rows in data.follow(data.batches):
                optimizer.param_groups[0]["lr"] = config.lr * min(1.0, 1.2 - kept.step / config.steps)
                loss = pregate_loss(model(self.windows[rows]), labels[rows].float())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                kept.end_step()
                if kept.step % 50 == 0 or kept.step == config.steps:
                    self.progress(f"round {number}: gates, step {kept.step} of {config.steps}: {loss.item():.4f}")
                if kept.step >= config.steps:
                    break
        self.store.put(self._job("pregate", number), model.eval().requires_grad_(False).state_dict(), {})
        kept.close()

    def learn_experts(self, number: int) -> None:
        """The experts' half of round `number`."""
        training, config = self.config.training, self.config
        if not training.tokens or self._done("experts", number, self.child):
            return
        windows = self.expert_windows[(number - 1) * self.each : number * self.each]
        own = DistillConfig(
            child=config.model,
            teacher=config.dense,
            out=config.experts_out(number),
            sources=config.sources,
            training=training,
            held_out=config.held_out,
            seed=config.seed + number,
        )
        with pregated(self.child, self.pregate):
            loop = Loop(
                own,
                trainable(self.child),
                self.teacher,
                windows,
                self.test,
                f"{self.run}.{number}",
                None,
                alone=True,
                auxiliary=self._auxiliary,
            )
            loop.run(self.steps, lambda line: self.progress(f"round {number}: experts, {line}"))
        self.child.requires_grad_(False)
        trained = {
            name: tensor for name, tensor in self.child.state_dict().items() if ".mlp." in name or "norm" in name
        }
        self.store.put(self._job("experts", number), trained, {})
        loop.close()

    def _auxiliary(self) -> torch.Tensor:
        alike = torch.stack([mixture.likeness for mixture in mixtures(self.child) if mixture.likeness is not None])
        return self.config.balance * balance(self.child) + self.config.likeness * alike.mean()

    def agreements(self) -> dict[str, float]:
        """Of the pre-gating model on held-out tokens, in the model as it is with it."""
        said = self.pregate.choice(self.test)
        with pregated(self.child, self.pregate):
            energy, gates = oracle_energy(self.child, self.test), gate_choice(self.child, self.test)
        oracle = energy.topk(self.pregate.shape.top_k, dim=-1).indices
        return {"oracle": agreement(said, oracle), "gates": agreement(said, gates)}


def run_pregating(config: PreGateConfig, progress: Progress) -> PreGated:
    """Train both by turns; write the model to `config.out` and the sidecar beside it. What is there already of the
    same run is returned.

    Raises:
        ExportError, DistillError, SearchError: for models, texts or settings that cannot be used.
    """
    for place in (config.out, config.sidecar):
        require_apart(place, [config.model, config.dense])
    folder = _folder(config)
    with only_one(folder, "pre-gating", "--out", taken=OutputExistsError, unwritable=OutputSpaceError):
        work = _PreGating(config, progress)
        if (found := _finished(config, work.run)) is not None:
            progress(f"{config.out} is the result of this very run already")
        else:
            require_absent(config.out, overwrite=config.overwrite)
            require_absent(config.sidecar, overwrite=_may_replace_sidecar(config, work.run))
            found = _train(work)
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(1, config.rounds + 1):  # of a process that was killed between a result and its state's end
        for out in (config.gates_out(number), config.experts_out(number)):
            shutil.rmtree(state_folder(out), ignore_errors=True)
    return found


def _folder(config: PreGateConfig) -> Path:
    return config.out.absolute().with_name(f".{config.out.absolute().name}.pregating")


def _finished(config: PreGateConfig, run: str) -> PreGated | None:
    try:
        told = json.loads((config.out / RECORD).read_text())["pregated"]
        if told["run"] != run:
            return None
        read_sidecar(config.sidecar, of=model_sha256(config.out))
        return PreGated.of_json(told, config)
    except (OSError, ValueError, KeyError, TypeError, MoeError):
        return None


def _may_replace_sidecar(config: PreGateConfig, run: str) -> bool:
    """It was asked for, or the sidecar is what a killed process of this very run left: the model comes after it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return config.overwrite or json.loads((config.sidecar / FACTS).read_text())["run"] == run
    return config.overwrite


def _train(work: _PreGating) -> PreGated:
    before, rounds = measure(work.child, work.teacher, work.test), []
    for number in range(1, work.config.rounds + 1):
        work.learn_gates(number)
        first = work.agreements()
        work.learn_experts(number)
        last = work.agreements()
        rounds.append({f"{name}_{when}": x[name] for when, x in (("before", first), ("after", last)) for name in x})
        work.progress(f"round {number}: {last['oracle']:.1%} of the oracle's experts on held-out tokens")
    return _write(work, before, rounds)


def _write(work: _PreGating, before: Quality, rounds: list[dict[str, float]]) -> PreGated:
    config, decoder, shape = work.config, work.source.decoder, work.pregate.shape
    dtype = stored_dtype(work.source)
    weights = {name: tensor.to(dtype) for name, tensor in carved_weights(work.child, decoder).items()}
    stock = measure(work.child, work.teacher, work.test)
    with pregated(work.child, work.pregate):
        quality = measure(work.child, work.teacher, work.test)
    last = work.agreements()
    found = PreGated(
        path=config.out,
        sidecar=config.sidecar,
        rounds=tuple(rounds),
        oracle=last["oracle"],
        gates=last["gates"],
        chance=shape.top_k / shape.experts,
        before=before,
        pregated=quality,
        stock=stock,
    )
    record = {
        "source": {"path": str(work.source.path.absolute()), "sha256": work.source.fingerprint()},
        "teacher": {"path": str(work.dense.path.absolute()), "sha256": work.dense.fingerprint()},
        "pregated": {"run": work.run, **found.to_json()},
    }
    facts = {"run": work.run, "measured": found.to_json()}
    replaces = _may_replace_sidecar(config, work.run)
    # the model takes its name last: where it is, its sidecar is
    with fresh_directory(config.out, overwrite=config.overwrite) as folder:
        fill_model(folder, decoder, weights, companions_of=work.source, record=record)
        with fresh_directory(config.sidecar, overwrite=replaces) as beside:
            write_sidecar(beside, work.pregate, of=model_sha256(folder), facts=facts)
        work.progress("the sidecar is written, and the model follows")
    return found
