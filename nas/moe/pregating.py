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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...distill.config import DistillConfig, digest
from ...distill.exclusive import only_one
from ...distill.loop import Loop, Position, eos_of
from ...distill.models import load, open_blocks
from ...distill.quality import Quality, measure
from ...distill.resume import guard, state_folder
from ...distill.save import save_model
from ...distill.texts import Part, open_tokenizer, pack
from ...export.atomic import fresh_directory, require_absent
from ...export.errors import OutputExistsError, OutputSpaceError
from ..jobs import Job, Store
from .calibration import listening
from .carve import carved_source
from .errors import LayoutError
from .finetune import balance, trainable
from .module import carved_weights, load_carved, mixtures
from .pregate import PreGate, PreGateShape, agreement, pregate_loss, start, write_sidecar
from .pregating_config import PreGateConfig
from .trace import model_sha256

Progress = Callable[[str], None]
_BATCH = 4
"""Windows at a time where nothing is trained."""


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


def oracle_energy(child: Any, windows: torch.Tensor) -> torch.Tensor:
    """The output energy of every expert, (n, length, layers, E) float32, as shares, in the model as it runs."""
    own, found = mixtures(child), []
    places = [index for index, layer in enumerate(child.model.layers) if layer.mlp in own]
    for ids in windows.split(_BATCH):
        with torch.no_grad(), listening(child) as heard:
            child.model(input_ids=ids, use_cache=False)
            layers = [mixture.output_energy(heard[place]) for mixture, place in zip(own, places, strict=True)]
        energy = torch.stack(layers, 2)
        found.append(energy / energy.sum(-1, keepdim=True).clamp_min(1e-30))
    return torch.cat(found)


def gate_choice(child: Any, windows: torch.Tensor) -> torch.Tensor:
    """What the layers' own gates take, (n, length, layers, k), in the model as it runs."""
    own, found = mixtures(child), []
    places = [index for index, layer in enumerate(child.model.layers) if layer.mlp in own]
    for ids in windows.split(_BATCH):
        with torch.no_grad(), listening(child) as heard:
            child.model(input_ids=ids, use_cache=False)
            layers = [mixture.choice(heard[place]) for mixture, place in zip(own, places, strict=True)]
        found.append(torch.stack(layers, 2))
    return torch.cat(found)


class _PreGating:
    def __init__(self, config: PreGateConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress
        self.source, self.dense = carved_source(config.model), open_blocks(config.dense)
        for name in ("vocab_size", "hidden_size"):
            if getattr(self.source.decoder, name) != getattr(self.dense.decoder, name):
                raise LayoutError(f"{config.model} was not carved out of {config.dense}: another {name}")
        if len(self.source.decoder.layers) != len(self.dense.decoder.layers):
            raise LayoutError(f"{config.model} was not carved out of {config.dense}: another number of layers")
        self.run = digest([self.source.fingerprint(), self.dense.fingerprint(), self._settings()])
        self.windows = self._windows("train", config.tokens // config.length, config.length)
        self.test = self._windows("test", config.held_out, config.length)
        self.folder = config.out.absolute().with_name(f".{config.out.absolute().name}.pregating")
        self.store = Store(self.folder / "store")
        self.child, self.teacher = load_carved(self.source), load(self.dense)
        sparse = [layer.ffn for layer in self.source.decoder.layers if layer.ffn.kind == "moe"]
        shape = PreGateShape(
            vocab_size=self.source.decoder.vocab_size,
            layers=len(sparse),
            experts=sparse[0].experts,
            top_k=sparse[0].top_k,
            size=config.size,
            blocks=config.blocks,
        )
        self.pregate = start(shape, self.child.model.embed_tokens.weight, config.seed)

    def _settings(self) -> Any:
        plain = asdict(self.config) | {"model": "", "dense": "", "out": "", "overwrite": False}
        return json.loads(json.dumps(plain, default=str))

    def _windows(self, part: Part, count: int, length: int) -> torch.Tensor:
        tokenizer, eos = open_tokenizer(self.dense.path), eos_of(self.source)
        return torch.from_numpy(
            pack(self.config.sources, part, tokenizer=tokenizer, eos=eos, count=count, length=length)
        )

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
        if self._done("pregate", number, self.pregate):
            return
        config = self.config
        self.progress(f"round {number}: hearing the oracle on {self.windows.numel():,} tokens")
        with pregated(self.child, self.pregate) if number > 1 else contextlib.nullcontext():
            labels = oracle_energy(self.child, self.windows).half()
        model = self.pregate.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01)
        data = Position(len(self.windows), batch=config.batch, seed=config.seed + number, drop_last=True)
        folder = state_folder(config.out.with_name(f"{config.out.name}.gates{number}"))
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
        steps = training.tokens // (training.length * training.batch)
        # each round takes text that the rounds before it did not
        windows = self._windows("train", max(steps, 1) * training.batch * number, training.length)
        own = DistillConfig(
            child=config.model,
            teacher=config.dense,
            out=config.out.with_name(f"{config.out.name}.experts{number}"),
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
                windows[-max(steps, 1) * training.batch :],
                self.test,
                f"{self.run}.{number}",
                None,
                alone=True,
                auxiliary=self._auxiliary,
            )
            loop.run(steps, lambda line: self.progress(f"round {number}: experts, {line}"))
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
    """Train both by turns; write the model to `config.out` and the sidecar beside it.

    Raises:
        ExportError, DistillError, SearchError: for models, texts or settings that cannot be used.
    """
    require_absent(config.out, overwrite=config.overwrite)
    require_absent(config.sidecar, overwrite=config.overwrite)
    folder = config.out.absolute().with_name(f".{config.out.absolute().name}.pregating")
    with only_one(folder, "pre-gating", "--out", taken=OutputExistsError, unwritable=OutputSpaceError):
        work = _PreGating(config, progress)
        before, rounds = measure(work.child, work.teacher, work.test), []
        for number in range(1, config.rounds + 1):
            work.learn_gates(number)
            first = work.agreements()
            work.learn_experts(number)
            last = work.agreements()
            rounds.append({f"{name}_{when}": x[name] for when, x in (("before", first), ("after", last)) for name in x})
            progress(f"round {number}: {last['oracle']:.1%} of the oracle's experts on held-out tokens")
        found = _write(work, before, rounds)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _write(work: _PreGating, before: Quality, rounds: list[dict[str, float]]) -> PreGated:
    config, decoder, shape = work.config, work.source.decoder, work.pregate.shape
    stored = next(iter(work.source.tensors.values())).dtype
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
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
    save_model(config.out, decoder, weights, companions_of=work.source, record=record, overwrite=config.overwrite)
    with fresh_directory(config.sidecar, overwrite=config.overwrite) as folder:
        write_sidecar(folder, work.pregate, of=model_sha256(config.out), facts={"measured": found.to_json()})
    return found
