# SPDX-License-Identifier: Apache-2.0
"""Packages that extras bring, asked for before anything is begun."""

import importlib.util

from .errors import PackageMissingError


def require(*packages: str) -> None:
    """Raises PackageMissingError for the first that is not installed. Imports none of them."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise PackageMissingError(package)
