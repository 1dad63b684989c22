# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens, logits and perplexity of models in transformers, in float32."""

import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils import logging


@torch.no_grad()
def run(model: Any, request: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """The answer for one model, and its logits (prompts, new tokens, vocabulary) at its own greedy tokens."""
    prompts = torch.tensor(request["prompts"])
    batch, length = prompts.shape
    began = time.perf_counter()
    model(input_ids=prompts, logits_to_keep=1)
    prefill_s = time.perf_counter() - began
    began = time.perf_counter()
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=request["new_tokens"],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    decode_s = time.perf_counter() - began - prefill_s
    tokens, logits = out.sequences[:, length:], torch.stack(out.logits, dim=1).float()
    best = logits.topk(2, dim=-1).values
    return {
        "tokens": tokens.tolist(),
        "logprobs": logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].tolist(),
        "margins": (best[..., 0] - best[..., 1]).tolist(),
        "prefill_tok_s": batch * length / prefill_s,
        "decode_tok_s": batch * (request["new_tokens"] - 1) / max(decode_s, 1e-9),
        "perplexity": perplexity(model, request["text"]) if request["text"] else None,
    }, forced(model, prompts, tokens)


def forced(model: Any, prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The logits at each of `tokens`, all given at once."""
    logits = model(input_ids=torch.cat([prompts, tokens[:, :-1]], dim=1), logits_to_keep=tokens.shape[1]).logits
    return logits.float()


def perplexity(model: Any, windows: list[list[int]]) -> float:
    text = torch.tensor(windows)
    logits = model(input_ids=text[:, :-1]).logits.float()
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item())


def load(path: str, request: dict[str, Any]) -> Any:
    dtype = getattr(torch, request["settings"].get("dtype", "float32"))
    trust = path in request["trust"]
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust).eval()


def choose(model: Any, adapter: str) -> None:
    """Of several, the one that computes. `model.set_adapter` wants a newer PEFT than loading does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapter)


@torch.no_grad()
def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    logging.set_verbosity_error()
    answers, reference, model = [], None, None
    for place, (path, adapter) in enumerate(zip(request["models"], request["adapters"], strict=True)):
        began = time.perf_counter()
        if model is None or not request["together"]:
            model = None  # first, or two are in memory
            model = load(path, request)
            for index, one in enumerate(request["adapters"] if request["together"] else [adapter]):
                if one:
                    model.load_adapter(one, adapter_name=f"adapter_{index}")
        if request["together"]:
            choose(model, f"adapter_{place}")
        load_s = time.perf_counter() - began
        answer, logits = run(model, request)
        if reference is None:
            reference = (answer["tokens"], logits)
        else:
            tokens, wanted = reference
            prompts = torch.tensor(request["prompts"])
            answer["logit_difference"] = (forced(model, prompts, torch.tensor(tokens)) - wanted).abs().max().item()
        answers.append({"load_s": load_s, **answer})
    Path(sys.argv[1]).write_text(json.dumps({"version": version("transformers"), "models": answers}))


if __name__ == "__main__":
    main()
