# SPDX-License-Identifier: Apache-2.0
"""How a recipe names experts: `4of16`, and `4of16+512` with shared channels. Imports nothing heavy.

In the words of `refound carve`: --active 4 --experts 16 --shared 512. Experts are of one width, which follows from the
teacher's.
"""

import re
from collections.abc import Sequence

from ..export.architecture import FFN
from .errors import RecipeError
from .moe.config import Shape

_FORM = re.compile(r"([0-9]{1,6})of([0-9]{1,6})(?:\+([0-9]{1,9}))?")


def shape_of(text: str, width: int) -> Shape:
    """An FFN of `width` channels in such experts.

    Raises:
        RecipeError: if it cannot be read, or the channels cannot be so split, with what is nearest.
    """
    if (matched := _FORM.fullmatch(text.strip())) is None:
        raise RecipeError(f"space.ffn_experts: {text!r} is not of the form 4of16, or 4of16+512 with shared channels")
    top_k, experts, shared = (int(number or 0) for number in matched.groups())
    shape = Shape(width=width, experts=experts, top_k=top_k, shared=shared)
    if problems := shape.problems():
        raise RecipeError(f"space.ffn_experts: {text!r}: {'; '.join(problems)}")
    return shape


def form_problems(texts: Sequence[str]) -> list[str]:
    """What can be said before the teacher is known, a sentence each."""
    return [
        f"space.ffn_experts holds {text!r}, which is not of the form 4of16, or 4of16+512 with shared channels"
        for text in texts
        if _FORM.fullmatch(text.strip()) is None
    ]


def shape_in(ffn: FFN, width: int) -> Shape:
    """The shape of a mixture that was carved out of an FFN of `width` channels."""
    return Shape(width=width, experts=ffn.experts, top_k=ffn.top_k, shared=width - ffn.experts * ffn.width)


def expert_name(ffn: FFN) -> str:
    """`4of16x96`: the width of an expert tells the shared channels too, as a teacher's FFNs are of one width."""
    return f"{ffn.top_k}of{ffn.experts}x{ffn.width}"
