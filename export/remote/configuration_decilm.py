# SPDX-License-Identifier: Apache-2.0
"""nemotron-nas: a Llama whose layers each have their own attention and FFN, or none."""

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig


class Block(dict):
    """A part of `block_configs`, its keys also as attributes, which is how engines read it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **settings: Any) -> None:
        self.block_configs = [
            Block(attention=Block(block["attention"]), ffn=Block(block["ffn"])) for block in block_configs or []
        ]
        super().__init__(**settings)
