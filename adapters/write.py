# SPDX-License-Identifier: Apache-2.0
"""The directory that a tuning ends in: what was trained, the nearest that servers take beside the base, the record."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..distill.save import RECORD
from ..export.atomic import fresh_directory
from .base import Base, open_base, write_recast
from .method import Attached, record_of
from .peft_methods import Dora, PeftAttached, Vera, write_lora
from .prune import PrunedAttached
from .ranks import nearest_lora, vera_as_lora
from .recipe import TuneRecipe
from .saved import write_record


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a run did. Losses are means over the learned tokens of held-out samples, without weights."""

    out: str
    kind: str
    steps: int
    trained: int
    before: float
    after: float
    served: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"notes": list(self.notes)}

    def to_text(self) -> str:
        lines = [
            f"{self.kind}: {self.trained:,} parameters, {self.steps} steps",
            f"held-out loss {self.before:.4f} before, {self.after:.4f} after",
            f"served: {self.served}",
        ]
        return "\n".join([*lines, *self.notes, self.out])


def write_tuned(
    recipe: TuneRecipe, base: Base, attached: Attached, tuned: Tuned, *, run: str, state: str, overwrite: bool
) -> Tuned:
    """Write `recipe.out`; what was done, with notes on what lies there.

    run: which run it is the result of, for `finished`.
    state: what its state on disk is called, for `state_of`.

    Raises:
        OutputExistsError, OutputSpaceError: see `export.atomic`.
    """
    of = {"path": str(base.path), "sha256": base.fingerprint()}
    with fresh_directory(Path(recipe.out), overwrite=overwrite) as folder:
        attached.save(folder)
        if isinstance(attached, PrunedAttached):
            notes = _write_sliced(folder, Path(recipe.out).absolute(), base, attached)
        else:
            notes = _write_nearest(folder, recipe, attached, of)
        tuned = replace(tuned, notes=notes)
        (folder / "recipe.json").write_text(json.dumps(recipe.to_json(), indent=2) + "\n")
        method = record_of(recipe.method, recipe.kind)
        told = {"run": run, "state": state, **tuned.to_json()}
        write_record(folder, {"base": of, "method": method, "seed": recipe.seed, "tuned": told})
    return tuned


def _write_nearest(folder: Path, recipe: TuneRecipe, attached: Attached, base: Mapping[str, str]) -> tuple[str, ...]:
    """The LoRA that servers take beside the base, where this method is none."""
    method = recipe.method
    if not isinstance(attached, PeftAttached) or not isinstance(method, Dora | Vera):
        return ()
    if isinstance(method, Dora):
        state, recast = dict(attached.model.get_base_model().named_parameters()), attached.recast()
        before = {name: state[name.replace(".weight", ".base_layer.weight")] for name in recast.weights}
        nearest = nearest_lora(recast, before, method.rank)
        pairs, told = nearest.pairs, str(nearest)
    else:
        pairs, told = vera_as_lora(attached), "exactly this VeRA"
    (folder / "lora").mkdir()
    write_lora(folder / "lora", pairs, base=base["path"])
    write_record(folder / "lora", {"base": dict(base), "nearest": told})
    return (f"lora/: {told}",)


def _write_sliced(folder: Path, out: Path, base: Base, attached: PrunedAttached) -> tuple[str, ...]:
    """The smaller base and its LoRA; the base alone computes nothing that was trained.

    out: what `folder` will be called.
    """
    of = {"path": str(base.path), "sha256": base.fingerprint()}
    write_recast(base, attached.sliced_base(), folder / "base", record={"sliced": of})
    sliced = {"path": str(out / "base"), "sha256": open_base(folder / "base").fingerprint()}
    (folder / "lora").mkdir()
    write_lora(folder / "lora", attached.sliced_pairs(), base=sliced["path"])
    write_record(folder / "lora", {"base": sliced})
    return (f"serve {out / 'lora'} on {out / 'base'}, or export this directory as one model",)


def finished(out: Path, run: str) -> Tuned | None:
    """What is in `out`, if it is the result of this very run."""
    try:
        told = json.loads((out / RECORD).read_text())["tuned"]
        if told.pop("run") != run:
            return None
        told.pop("state", None)
        return Tuned(**told | {"notes": tuple(told["notes"]), "out": str(out)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def state_of(out: Path) -> str | None:
    """What the state of the run was called whose result is in `out`; None if that is something else."""
    try:
        found = json.loads((out / RECORD).read_text())["tuned"]["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
