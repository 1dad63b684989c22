# SPDX-License-Identifier: Apache-2.0
"""A plugin for vLLM: nemotron-nas with one matrix in place of attention or of an FFN.

vLLM finds it by its entry point in the group `vllm.general_plugins` and calls `register` in each of its processes; the
layers themselves (`refound_vllm_layers`) are imported only where such a model is loaded.
"""


def register() -> None:
    """Takes the place of vLLM's own class, whose models it computes the same. May be called more than once."""
    from vllm import ModelRegistry  # type: ignore[import-not-found]
    from vllm.transformers_utils import model_arch_config_convertor as convertors  # type: ignore[import-not-found]

    class Convertor(convertors.NemotronNasModelArchConfigConvertor):
        """Asks for KV heads where there are some: vLLM's own asks the first layer that is not left out."""

        def get_total_num_kv_heads(self) -> int:
            heads = self.hf_text_config.num_attention_heads
            groups = (block.attention.n_heads_in_group for block in self.hf_text_config.block_configs)
            return heads // next((found for found in groups if found), heads)

    ModelRegistry.register_model("DeciLMForCausalLM", "refound_vllm_layers:PluginForCausalLM")
    convertors.MODEL_ARCH_CONFIG_CONVERTORS["nemotron-nas"] = Convertor
