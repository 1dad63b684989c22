# SPDX-License-Identifier: Apache-2.0
"""The methods by the `kind` of a recipe's `[method]` table. A new one is a row here and passes the battery."""

from .bottleneck import Parallel, Series
from .peft_methods import Dora, Lora, Prefix, RsLora, Vera
from .prune import PrunedLora

KINDS: dict[str, type] = {
    "lora": Lora,
    "rslora": RsLora,
    "dora": Dora,
    "vera": Vera,
    "prefix": Prefix,
    "pruned-lora": PrunedLora,
    "series": Series,
    "parallel": Parallel,
}
ADAPTERS = ("lora", "rslora")
"""Kinds whose directories servers take beside the base as they are."""
