# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with plans for serving. Each is a subclass of the builtin a caller would already catch."""

from ..errors import SearchError


class PlanError(SearchError, ValueError):
    """A plan that cannot be: impossible numbers, unknown settings. The message names all of them."""

    exit_code = 2


class MismatchError(SearchError, ValueError):
    """Files that do not belong together: a trace of another model, a plan of another trace; or a damaged file."""

    exit_code = 3


class CapacityError(SearchError, ValueError):
    """The devices cannot hold the experts; the message says by how much."""

    exit_code = 3
