# SPDX-License-Identifier: Apache-2.0
"""The door for `--standalone`: `--logs-specs=refound`, on one node."""

import atexit
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from . import plugin
from .agent import (
    JOB_ENV,
    NO_SHARED_STORE_ENV,
    Outcome,
    announce,
    check_checkpoint_dir,
    leave,
    plain_errors,
    with_spares,
    worker_environment,
)
from .agreement import decide
from .attach import Attachment, attach
from .conf import parse
from .errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsDest


class RefoundLogsSpecs(DefaultLogsSpecs):
    """The door for `--standalone`, which overrides the rendezvous backend: one node, the same snapshots.

    torchrun calls `reify` before every (re)start of the workers, with their environments to be.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        os.environ[NO_SHARED_STORE_ENV] = "1"
        self._outcome = Outcome.watch()
        self._attachment: Attachment | None = None

    def reify(self, envs: dict[int, dict[str, str]]) -> "LogsDest":
        """Open the next generation of this one node and tell its workers."""
        if not plugin.is_active:
            with plain_errors():
                self._next_generation(envs)
        return super().reify(envs)

    def _next_generation(self, envs: Mapping[int, dict[str, str]]) -> None:
        first = next(iter(envs.values()))
        if int(first["GROUP_WORLD_SIZE"]) != 1:
            raise ConfigError("--logs-specs=refound is for one node; with several, use --rdzv-backend=refound")
        if self._attachment is None:
            conf, _ = parse(_conf_from_environment())
            check_checkpoint_dir(conf.checkpoint_dir)
            # --standalone makes up a new run id every time; a name of one's own lets a later launch go on.
            job = os.environ.get(JOB_ENV) or first["TORCHELASTIC_RUN_ID"]
            self._attachment = attach(job, "127.0.0.1", conf)
            atexit.register(lambda: leave(self._attachment, success=self._outcome.success))
            if spares := with_spares(self._attachment):
                atexit.register(spares.close)
        elif not self._attachment.alive():
            self._attachment.restart()
        view = self._attachment.inventory()
        generation = self._attachment.open([view], "")
        announce(decide([view]), 0)
        for environment in envs.values():
            environment.update(worker_environment(self._attachment, generation))


def _conf_from_environment() -> dict[str, str]:
    """`$REFOUND_CONF`, written like `--rdzv-conf` (which does not reach this door): k=v,k=v."""
    text = os.environ.get("REFOUND_CONF", "")
    pairs = (part.partition("=") for part in text.split(",") if part)
    return {key: value for key, _, value in pairs}
