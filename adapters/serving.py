# SPDX-License-Identifier: Apache-2.0
"""How what a recipe trains will be served, told before it is trained; and who cannot, refused then."""

from ..export.engines import ENGINES, find_engines
from ..export.fit import check_fit
from ..export.plan import refuse
from .base import Base, check_recast
from .errors import NotServableError, TuneUsageError
from .method import Attached
from .recipe import TuneRecipe

_BESIDE = {
    "lora": "beside the base, as a PEFT directory and a GGUF adapter",
    "rslora": "beside the base, as a PEFT directory and a GGUF adapter",
    "dora": "merged into the base; nearest beside it: the LoRA in lora/",
    "pruned-lora": "a smaller base in base/ and a LoRA for it in lora/; merged and sliced as a model",
    "vera": "merged into the base; beside it exactly as the LoRA in lora/",
}
_BESIDE_ROUNDED = {
    "lora": "beside the base, as a PEFT directory; merged into it by `refound adapter merge`",
    "rslora": "beside the base, as a PEFT directory; merged into it by `refound adapter merge`",
    "dora": "as its nearest LoRA, in lora/: beside the base, or merged into it by `refound adapter merge`",
    "vera": "as the LoRA that it is, in lora/: beside the base, or merged into it by `refound adapter merge`",
}
_BESIDE_UNEXPORTED = {
    "lora": "beside the base, as a PEFT directory",
    "rslora": "beside the base, as a PEFT directory",
    "dora": "as its nearest LoRA, in lora/: a PEFT directory beside the base",
    "vera": "as the LoRA that it is, in lora/: a PEFT directory beside the base",
    "pruned-lora": "a smaller base in base/ and a LoRA for it, a PEFT directory, in lora/",
}


def refuse_base(kind: str, base: Base) -> None:
    """Raises TuneUsageError if `kind` has no way to end on this base."""
    if base.rounding is not None and kind == "pruned-lora":
        raise TuneUsageError(
            f"{base.path} has weights of INT{base.rounding.bits}, of which nothing can be cut away. Prune the base "
            "that it was rounded from, and round what comes out"
        )


def how_served(kind: str, base: Base, attached: Attached) -> str:
    """A word on it.

    Raises:
        NotServableError: it is not; the message says why, and what is nearest.
        AdapterDamageError: what would change has another name in the base's files.
    """
    if base.rounding is not None:
        if kind in _BESIDE_ROUNDED:
            return _BESIDE_ROUNDED[kind]
        attached.recast()  # which may have a better reason
        raise NotServableError(
            f"weights of INT{base.rounding.bits} take in a LoRA only, and not what this adds. Nearest that is served: "
            'kind = "lora", or the same on the base before it is rounded'
        )
    if base.source is not None:
        return _BESIDE.get(kind) or f"{attached.recast().how} into the base, as a model"
    unexported = f"`refound export` does not write {base.model_type} models"
    if kind in _BESIDE_UNEXPORTED:
        if kind == "pruned-lora":
            check_recast(base, attached.recast())
        return f"{_BESIDE_UNEXPORTED[kind]}, for what loads it; {unexported}"
    check_recast(base, attached.recast())
    raise NotServableError(f'{unexported}. Nearest that is served: kind = "lora", as a PEFT directory beside the base')


def refuse_engines(recipe: TuneRecipe, base: Base, attached: Attached) -> None:
    """For those that the recipe names.

    Raises:
        TuneUsageError: one cannot serve what is trained.
        EngineFitError: one cannot serve the base.
    """
    if not recipe.engines:
        return
    engines = find_engines(",".join(recipe.engines))
    titles = ", ".join(ENGINES[name].title for name in engines)
    unserved = f"engines names {titles}, and what this recipe trains is not served there: "
    otherwise = ". Choose another base or method, or leave engines out to train it all the same"
    if base.source is None:
        raise TuneUsageError(f"{unserved}`refound export` does not write {base.model_type} models{otherwise}")
    try:
        how_served(recipe.kind, base, attached)
    except NotServableError as error:
        raise TuneUsageError(f"{unserved}{error}{otherwise}") from error
    if base.rounding is not None and (bad := [n for n in engines if ENGINES[n].layout != "huggingface"]):
        raise TuneUsageError(f"{unserved}{', '.join(bad)} cannot load weights rounded as in {base.path}{otherwise}")
    refuse([finding for name in engines for finding in check_fit(base.source.decoder, name)])


def check_length(recipe: TuneRecipe, base: Base) -> None:
    """Raises TuneUsageError if samples are longer than what the base was made for."""
    before = getattr(recipe.method, "tokens", 0)  # of a prefix
    length = recipe.data.length + before
    positions = base.positions
    if positions is not None and length > positions:
        told = f"data.length is {recipe.data.length}" + (f" behind a prefix of {before}" if before else "")
        raise TuneUsageError(f"{told}, and {base.path} has {positions} positions; lower it")
