# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a search. Each is a subclass of the builtin a caller would already catch.

`exit_code` is what the command line ends with: 1 failed, 2 usage, 3 damage or mismatch, 75 saved and stopped.
"""

from typing import ClassVar


class SearchError(RuntimeError):
    """A search cannot go on. The message is for the user, and needs no traceback."""

    exit_code: ClassVar[int] = 1


class RecipeError(SearchError, ValueError):
    """A recipe with unknown keys or impossible values; the message names all of them."""

    exit_code = 2


class BudgetError(SearchError, ValueError):
    """No child meets the budget; the message says why, and what is nearest."""

    exit_code = 3


class StoreError(SearchError, OSError):
    """A result cannot be written. What is done stays, and the same command goes on from there."""

    exit_code = 75


class OtherSearchError(SearchError, ValueError):
    """The output directory belongs to a search of another teacher, or to one that runs now."""

    exit_code = 3


class TeacherError(SearchError, ValueError):
    """The teacher computes NaN, or its weights hold it."""

    exit_code = 3
