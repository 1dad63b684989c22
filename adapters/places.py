# SPDX-License-Identifier: Apache-2.0
"""Where a result must not go: `--overwrite` removes what is there, and that must not be what it is made of."""

from collections.abc import Mapping
from pathlib import Path

from .errors import TuneUsageError


def keep_inputs(out: Path, inputs: Mapping[str, Path]) -> None:
    """Before anything is done, with and without `--overwrite`.

    inputs: what is read, by what it is called.

    Raises:
        TuneUsageError: `out` is one of them or holds one.
    """
    place = out.resolve()
    for name, path in inputs.items():
        if path.resolve().is_relative_to(place):
            holds = "is" if path.resolve() == place else "holds"
            raise TuneUsageError(f"{out} {holds} {name}, {path}, and would be replaced; choose another place")
