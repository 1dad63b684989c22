# SPDX-License-Identifier: Apache-2.0
"""The exit codes, and which error ends with which."""

from typing import Any

import click

from .adapters.errors import AdapterError
from .ckpt.errors import ConfigError, DamageError, SnapshotError
from .distill.errors import DistillError
from .export.errors import ExportError
from .nas.errors import SearchError

FAILED, USAGE, DAMAGE = 1, 2, 3


class UsageError(click.ClickException):
    exit_code = USAGE


class _DamageFound(click.ClickException):
    exit_code = DAMAGE


class _Failed(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # pyright: ignore[reportAttributeAccessIssue]  # click reads it from the instance


class Commands(click.Group):
    """Turns the errors that are the user's to solve into one line and the exit code that belongs to them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (AdapterError, ExportError, DistillError, SearchError) as error:
            raise _Failed(str(error), error.exit_code) from error
        except ConfigError as error:
            raise UsageError(str(error)) from error
        except DamageError as error:
            raise _DamageFound(str(error)) from error
        except SnapshotError as error:
            raise click.ClickException(str(error)) from error
