# SPDX-License-Identifier: Apache-2.0
"""What heads, drafts and exits are asked for. Imports nothing heavy."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import HeadsUsageError

Kind = Literal["medusa", "draft", "exit"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The text, and how a loss is followed down over it."""

    tokens: int = 65536
    """Trained on, once each."""
    length: int = 128
    """Tokens a window."""
    batch: int = 8
    """Windows a step, over all ranks together."""
    lr: float = 1e-3
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls to a tenth of `lr` by a cosine."""
    own: bool = True
    """The text is what the model itself says after `prompt` tokens of the sources. Otherwise it is the sources'."""
    prompt: int = 32
    temperature: float = 0.0
    """Of the model's own text; 0: greedy, as the decoders are."""
    held_out: int = 32
    """Windows that accuracies are measured on."""
    kl: float = 1.0
    lm: float = 0.0
    """Weights of the divergence from what the model says, and of the cross entropy of the text."""
    save_every: int = 10
    """Steps between two states on disk, where torchrun keeps none in memory."""
    measured: int = 4
    """Held-out prompts that are decoded plainly and with what was trained, by turns; 0: nothing is timed."""
    new_tokens: int = 64
    """Decoded after each of them."""

    @property
    def steps(self) -> int:
        return self.tokens // (self.length * self.batch)

    def problems(self) -> list[str]:
        least = {"tokens": 0, "length": 8, "batch": 1, "prompt": 1, "held_out": 2, "save_every": 1, "measured": 0}
        found = [
            f"{key} is {getattr(self, key)}; it must be at least {floor}"
            for key, floor in (least | {"new_tokens": 2}).items()
            if getattr(self, key) < floor
        ]
        if not self.lr > 0 or not 0 <= self.warmup <= 1:
            found.append(f"lr is {self.lr} and warmup {self.warmup}; lr is positive, warmup between 0 and 1")
        if min(self.kl, self.lm) < 0 or not self.kl + self.lm > 0:
            found.append(f"kl and lm are {self.kl} and {self.lm}; none may be negative and one must be positive")
        if self.temperature < 0:
            found.append(f"temperature is {self.temperature}; it must not be negative")
        if self.own and self.prompt >= self.length:
            found.append(f"a prompt of {self.prompt} tokens leaves no room for the model in windows of {self.length}")
        if self.tokens and not self.steps:
            found.append(f"{self.tokens} tokens are less than one batch of {self.batch} windows of {self.length}")
        return found


@dataclass(frozen=True, kw_only=True)
class MedusaSettings(Training):
    """Heads that guess further tokens (arXiv:2401.10774)."""

    heads: int = 3
    blocks: int = 1
    """Residual blocks of each head."""
    shared: bool = True
    """All heads use the model's own output matrix. Otherwise each trains one of its own, that begins as the model's."""
    decay: float = 0.8
    """Head k weighs decay^k in the loss."""
    joint: bool = False
    """Medusa-2: the model itself is trained too, and held to what it said before."""
    joint_lr: float = 1e-5
    joint_after: float = 0.3
    """Share of the steps in which the heads alone are trained, so that the model is not pulled by random heads."""
    joint_weight: float = 0.2
    """Of the heads' loss beside the model's own."""
    top: int = 8
    """Guesses of a head that are measured."""
    nodes: int = 0
    """Of the tree, beside the root; 0: what is predicted to be fastest on this machine, up to 32."""

    def problems(self) -> list[str]:
        found = super().problems()
        for key, floor in (("heads", 1), ("blocks", 0), ("top", 1), ("nodes", 0)):
            if getattr(self, key) < floor:
                found.append(f"{key} is {getattr(self, key)}; it must be at least {floor}")
        if not (0 < self.decay <= 1 and self.joint_lr > 0 and 0 <= self.joint_after <= 1 and self.joint_weight > 0):
            found.append("decay and joint_after lie between 0 and 1; joint_lr and joint_weight are positive")
        if self.length < self.heads + 3:
            found.append(f"{self.heads} heads need windows of at least {self.heads + 3} tokens")
        return found


@dataclass(frozen=True, kw_only=True)
class DraftSettings(Training):
    """A smaller model of the same tokens."""

    start: str = ""
    """A model directory that the draft begins as; left out: `layers` of the model's own. Its tokenizer must be the
    model's, token by token. With `tokens=0` it is only measured."""
    layers: int = 4
    """Of the model's own that are kept, spread from the first to the last."""
    width: int = 100
    """Percent of the FFN's channels that are kept."""
    guesses: int = 4
    """Tokens that it guesses in a row when it is measured."""
    lr: float = 5e-4

    def problems(self) -> list[str]:
        found = super().problems()
        if self.layers < 1 or not 0 < self.width <= 100 or self.guesses < 1:
            found.append("layers and guesses are at least 1, width is between 1 and 100 percent")
        return found


@dataclass(frozen=True, kw_only=True)
class ExitSettings(Training):
    """Exits after some layers, gates that say when to take one, and one that says when to stop."""

    own: bool = False
    """Where a continuation is useless can be seen on real text only: with own text there is no `stop`."""
    held_out: int = 128
    """No threshold can be proven for a risk of 0.05 with confidence 0.95 by fewer than 60 windows."""
    layers: tuple[int, ...] = ()
    """Exits, as `layers=8,12`: after so many layers. Left out: after a third and a half of them."""
    width: int = 64
    """Of the small MLP beside the exit's norm; 0: the norm alone."""
    gate: str = "mlp"
    """mlp, gru or ssm: the last two remember what came before."""
    gate_width: int = 32
    risk: float = 0.05
    """At most such a share of all tokens leaves early and is not what the model would have said …"""
    confidence: float = 0.95
    """… with so much confidence over the held-out text that thresholds are chosen by."""
    useful: int = 2
    """A continuation of fewer right tokens is useless, to whom types the text; what `stop` is trained to foresee."""
    guesses: int = 0
    """Tokens guessed in a row; 0: what is predicted to be fastest on this machine, up to 8."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.gate not in ("mlp", "gru", "ssm"):
            found.append(f"gate is {self.gate!r}, none of mlp, gru, ssm")
        if not (0 < self.risk < 1 and 0 < self.confidence < 1):
            found.append("risk and confidence lie between 0 and 1")
        if min(self.width, self.guesses) < 0 or min(self.gate_width, self.useful) < 1:
            found.append("width and guesses are not negative; gate_width and useful are at least 1")
        if any(layer < 1 for layer in self.layers):
            found.append(f"layers are {self.layers}; an exit is after at least one layer")
        return found


SETTINGS: dict[Kind, type[Training]] = {"medusa": MedusaSettings, "draft": DraftSettings, "exit": ExitSettings}


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """What is trained, for which model, and where it goes."""

    model: Path
    kind: Kind
    out: Path
    settings: Training
    sources: tuple[str, ...] = ("python-docs", "python-source")
    """Names of `distill.texts.SOURCES`, or paths of UTF-8 files."""
    seed: int = 0
    texts: Path | None = None
    """A directory where what the model says itself is kept, said once and read again by other trainings of it."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        problems = self.settings.problems()
        if not isinstance(self.settings, SETTINGS[self.kind]):
            problems.append(f"these are no settings of {self.kind}")
        if not self.sources:
            problems.append("name at least one text")
        problems += self._overwritten()
        if problems:
            raise HeadsUsageError("; ".join(problems))

    def _overwritten(self) -> list[str]:
        """What is read is not what may be replaced, nor in it."""
        read = {
            "the model": self.model,
            "what the model says (--texts)": self.texts,
            "the draft's start": getattr(self.settings, "start", ""),
        }
        read |= {f"the text {source}": source for source in self.sources if Path(source).is_file()}
        out = self.out.resolve()
        return [
            f"{what} is in {self.out}, where the result would take its place; name another --out"
            for what, place in read.items()
            if place and out in (Path(place).resolve(), *Path(place).resolve().parents)
        ]


def read_settings(kind: str, settings: Sequence[str]) -> Training:
    """`key=value` settings over the defaults.

    Raises:
        HeadsUsageError: naming every unknown key, with the nearest known one, and every value that is none.
    """
    if kind not in get_args(Kind):
        raise HeadsUsageError(f"--kind {kind!r} is none of {', '.join(get_args(Kind))}")
    form: Any = SETTINGS[kind]  # type: ignore[index]
    known = {item.name: item.default for item in fields(form)}
    values, problems = {}, []
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if key not in known or not equals:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"
            problems.append(f"--set {setting!r} is no known KEY=VALUE of {kind}{hint}")
            continue
        try:
            values[key] = _value(text, known[key])
        except (ValueError, KeyError):
            wanted = {tuple: "list of numbers", bool: "true or false"}.get(type(known[key]), type(known[key]).__name__)
            problems.append(f"--set {setting!r}: a {wanted} is wanted")
    if problems:
        raise HeadsUsageError("; ".join(problems))
    return form(**values)


def _value(text: str, like: Any) -> Any:
    if isinstance(like, bool):
        return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[text.lower()]
    if isinstance(like, tuple):
        return tuple(int(part) for part in text.split(",") if part.strip())
    return type(like)(text)
