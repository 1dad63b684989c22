# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts as one more variant of a layer's FFN: what the space may hold, how it is made, what it costs.

One configuration has words for dense layers beside layers with experts, Qwen2-MoE's (`mlp_only_layers`), and it says
everything else once: one number of KV heads, one dense width, one shape of experts. So a child has experts of one shape
in some layers and the teacher's own subblocks everywhere else, or it has none, and then its layers may differ in all
that the space holds. Each of these is a *kind* of child; the solver proves its answer over all of them.

A variant is carved as `refound carve` does it (`nas.moe`: split by co-activation, a gate distilled from the oracle, the
down projection refitted to what the gate takes), then distilled block by block like any FFN. Qwen2-MoE has biases of
queries, keys and values in every layer, zeros here, which are counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..export.architecture import FFN, Attention, Decoder, Layer
from ..export.engines import ENGINES
from ..export.families import FAMILIES, Moe
from ..export.fit import check_fit
from .activations import LayerData
from .errors import RecipeError
from .expert_shapes import shape_in, shape_of
from .moe.config import RouterTraining
from .moe.errors import LayoutError
from .moe.evidence import LayerEvidence
from .moe.gates import distil_gate
from .moe.layouts import Layout, lay_out
from .moe.module import Mixture, MoeFFN
from .moe.refit import refit
from .moe.splits import find_split

FAMILY = "qwen2_moe"
METHOD = 1
"""Raised when the same teacher, text and settings come out as other experts than before."""
BALANCE = 0.01
"""Of the load-balancing loss in block-local distillation, as `refound carve` has it."""
SPLIT = "coactivation"


def _words() -> Moe:
    found = FAMILIES[FAMILY].moe
    assert found is not None
    return found


def in_layout(decoder: Decoder) -> Decoder:
    """A child in the words that it is written in: Qwen2-MoE's if any of its layers has experts, else as it is."""
    if decoder.blocks.moe is not None or not decoder.moe_layers:
        return decoder
    return replace(decoder, family=FAMILY, qkv_bias=True)


def layout_of(teacher: Decoder, ffn: FFN) -> Layout:
    """All of the teacher's FFNs as such mixtures."""
    return lay_out(teacher, shape_in(ffn, teacher.layers[0].ffn.width), FAMILY)


# --- the space -----------------------------------------------------------------------------------------------------


def expert_ffns(teacher: Decoder, texts: Sequence[str]) -> list[FFN]:
    """The mixtures that a recipe names.

    Raises:
        RecipeError: for shapes that the teacher's FFNs cannot be split into, and for a teacher that Qwen2-MoE has no
            words for.
    """
    found: dict[FFN, None] = {}
    for text in texts:
        if teacher.layers[0].ffn.kind != "dense":
            raise RecipeError(f"space.ffn_experts: layer 0 of the teacher has {teacher.layers[0].ffn}; leave it empty")
        shape = shape_of(text, teacher.layers[0].ffn.width)
        try:
            found[lay_out(teacher, shape, FAMILY).decoder.layers[0].ffn] = None
        except LayoutError as error:
            raise RecipeError(f"space.ffn_experts: {error}. Leave it empty for this teacher") from error
    return list(found)


def kinds_of(teacher: Decoder, ffns: Sequence[FFN], engines: Sequence[str]) -> tuple[list[tuple[FFN, bool]], list[str]]:
    """([(mixture, whether layers beside it may stay dense)], what the engines do not take, a sentence each)."""
    found: list[tuple[FFN, bool]] = []
    excluded: dict[str, None] = {}
    several = len(teacher.layers) > 1
    for ffn in ffns:
        whole = tuple(replace(layer, ffn=ffn) for layer in teacher.layers)
        mixed = (teacher.layers[0], *whole[1:])
        refused = {
            name: _refusals(in_layout(replace(teacher, layers=layers)), engines)
            for name, layers in (("whole", whole), ("mixed", mixed))
        }
        if refused["whole"]:
            excluded |= dict.fromkeys(refused["whole"])
        elif several and refused["mixed"]:
            excluded |= dict.fromkeys(f"{told}; so {ffn} are in all layers or in none" for told in refused["mixed"])
            found.append((ffn, False))
        else:
            found.append((ffn, True))
    return found, list(excluded)


def _refusals(child: Decoder, engines: Sequence[str]) -> list[str]:
    return [
        f"{ENGINES[name].title}: {finding.problem}"
        for name in engines
        for finding in check_fit(child, name)
        if finding.exact is None or finding.alike or finding.plugin
    ]


# --- costs ---------------------------------------------------------------------------------------------------------


def bias_parameters(teacher: Decoder, attention: Attention) -> int:
    """What the attention of a layer has more in Qwen2-MoE than as the teacher has it."""
    alone = replace(teacher, layers=(Layer(attention=attention, ffn=FFN(kind="none")),))
    return replace(alone, family=FAMILY, qkv_bias=True).parameters - alone.parameters


def idle_parameters(block: Attention | FFN, hidden_size: int) -> int:
    """Of the experts that a token does not take."""
    if not isinstance(block, FFN) or block.kind != "moe":
        return 0
    return (block.experts - block.top_k) * 3 * block.width * hidden_size


def served_body(teacher: Decoder, ffn: FFN) -> Any:
    """Such a mixture as transformers runs it, which computes what a token takes alone; random weights, for timing."""
    from transformers.models.auto.configuration_auto import AutoConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from ..export.configs import write_config

    layer = replace(teacher.layers[0], ffn=ffn)
    raw = write_config(in_layout(replace(teacher, layers=(layer,), vocab_size=8, tokens={})))
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.model.layers[0].mlp.eval().requires_grad_(False)


# --- the variant ---------------------------------------------------------------------------------------------------


class NamedMixture(MoeFFN):
    """A mixture whose state is told, and taken, by the names and in the shapes that the layout has for it."""

    def __init__(self, ffn: FFN, hidden_size: int) -> None:
        rows = ffn.shared_width + ffn.experts * ffn.width
        empty = Mixture(
            router=torch.empty(ffn.experts, hidden_size),
            gate=torch.empty(rows, hidden_size),
            up=torch.empty(rows, hidden_size),
            down=torch.empty(hidden_size, rows),
            shared_gate=torch.empty(1, hidden_size),
        )
        super().__init__(empty, ffn)
        self.ffn = ffn
        self.register_state_dict_post_hook(_tell)
        self.register_load_state_dict_pre_hook(_take)


_OWN = ("router", "gate", "up", "down", "shared_gate")


def _tell(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    mixture = Mixture(**{name: state.pop(prefix + name) for name in _OWN})
    for name, tensor in mixture.named(_words(), module.ffn).items():
        state[prefix + name.removeprefix("mlp.")] = tensor.clone()


def _take(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    named = {f"mlp.{name.removeprefix(prefix)}": state.pop(name) for name in list(state) if name.startswith(prefix)}
    mixture = Mixture.read(named, _words(), module.ffn)
    state |= {prefix + name: getattr(mixture, name) for name in _OWN}


def evidence_of(data: LayerData, weights: Mapping[str, torch.Tensor]) -> LayerEvidence:
    """What `nas.moe` looks at, of a layer of the search."""
    inputs = data.ffn[0].cpu()
    windows, length = inputs.shape[:2]
    return LayerEvidence(
        inputs=inputs.flatten(0, 1),
        gate=weights["mlp.gate_proj.weight"],
        up=weights["mlp.up_proj.weight"],
        down=weights["mlp.down_proj.weight"],
        domain=torch.zeros(windows * length, dtype=torch.int64),
        windows=windows,
    )


def carve(
    teacher: Decoder,
    ffn: FFN,
    data: LayerData,
    weights: Mapping[str, torch.Tensor],
    *,
    ridges: Sequence[float],
    seed: int,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The mixture's weights by their names within a layer, in float32, and what is to be said of its gate.

    weights: the layer's own, in float32.
    """
    layout, seen = layout_of(teacher, ffn), evidence_of(data, weights)
    shape = layout.shape
    split = find_split(SPLIT).split(shape, seen, np.random.default_rng([seed, data.index]))
    order = torch.tensor(split.order)
    facts: dict[str, Any] = {}
    if shape.whole:
        router, down = torch.zeros(shape.experts, teacher.hidden_size), seen.down[:, order].clone()
    else:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + data.index)
        gate = distil_gate(seen, split, shape, RouterTraining(), generator)
        router, down = gate.weight, refit(seen, split, gate.weight, layout, ridges).down.clone()
        facts = {"agreement": gate.agreement, "kept": gate.kept, "dead": list(gate.dead), "left": list(gate.left)}
    down[:, : shape.shared] *= layout.shared_scale
    down[:, shape.shared :] *= layout.scale
    mixture = Mixture(router=router, gate=seen.gate[order], up=seen.up[order], down=down)
    norm = "post_attention_layernorm.weight"
    return {norm: weights[norm]} | mixture.named(_words(), ffn), facts
