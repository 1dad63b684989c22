# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of GGUF files in llama.cpp, through the server of the package xllamacpp, in this process.

Cache and activations are float32, so what differs from the reference is the file, not the settings.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import xllamacpp  # type: ignore[import-not-found]


def load(path: str, adapters: list[str], request: dict[str, Any]) -> Any:
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0) for adapter in adapters]
    settings.n_ctx = len(request["prompts"][0]) + request["new_tokens"] + 8
    settings.n_parallel = 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = request["threads"]
    # The cache as `f32`, `f16`, or with attention computed in tiles: `f16 flash`, `q8_0 flash`
    cache, _, flash = request["settings"].get("cache", "f32").partition(" ")
    settings.cache_type_k = settings.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
    attention = "ENABLED" if flash else "DISABLED"
    settings.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{attention}")
    settings.n_ubatch = request["settings"].get("ubatch", settings.n_ubatch)
    settings.warmup = False
    try:
        return xllamacpp.Server(settings)
    except RuntimeError as error:
        raise RuntimeError(f"llama.cpp does not load {path}: {error}") from error


def ask(server: Any, prompt: list[int], count: int, scales: list[float]) -> dict[str, Any]:
    """scales: of the adapters, in the order in which they were loaded."""
    return server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0,
            "top_k": 1,
            "n_probs": 1,
            "return_tokens": True,
            "verbose": True,  # which is where the ids are
            "cache_prompt": True,
            "lora": [{"id": index, "scale": scale} for index, scale in enumerate(scales)],
        }
    )


def greedy(
    server: Any, prompt: list[int], count: int, scales: list[float]
) -> tuple[list[int], list[float | None], dict[str, float]]:
    """`count` tokens, going on after each end of sequence: llama.cpp's own `ignore_eos` would forbid that token."""
    tokens: list[int] = []
    logprobs: list[float | None] = []
    spent = {"prompt_n": 0.0, "prompt_ms": 0.0, "predicted_n": 0.0, "predicted_ms": 0.0}
    while len(tokens) < count:
        answer = ask(server, prompt + tokens, count - len(tokens), scales)
        found = answer.get("__verbose", {}).get("tokens")
        if not found:
            raise RuntimeError(f"llama.cpp gave no token after {len(tokens)}: {answer}")
        told = (answer["choices"][0]["logprobs"] or {}).get("content", [])
        logprobs += aligned(found, told)
        tokens += found
        timings = answer["__verbose"].get("timings", {})
        spent = {key: value + timings.get(key, 0) for key, value in spent.items()}
    return tokens, logprobs, spent


def aligned(tokens: list[int], told: list[dict[str, Any]]) -> list[float | None]:
    """The log-probability of each token. Where the server leaves out halves of characters: None."""
    if [entry["id"] for entry in told] != tokens:
        return [None] * len(tokens)
    return [entry["logprob"] for entry in told]


def main() -> None:
    request = json.load(sys.stdin)
    answers, server, beside = [], None, []
    for place, (path, adapter) in enumerate(zip(request["models"], request["adapters"], strict=True)):
        began = time.perf_counter()
        if server is None or not request["together"]:
            del server  # first, or two are in memory
            beside = [one for one in (request["adapters"] if request["together"] else [adapter]) if one]
            server = load(path, beside, request)
        load_s = time.perf_counter() - began
        scales = [float(not request["together"] or index == place) for index in range(len(beside))]
        runs = [greedy(server, prompt, request["new_tokens"], scales) for prompt in request["prompts"]]
        spent = {key: sum(run[2][key] for run in runs) for key in runs[0][2]}
        answers.append(
            {
                "load_s": load_s,
                "tokens": [run[0] for run in runs],
                "logprobs": [run[1] for run in runs],
                "prefill_tok_s": 1000 * spent["prompt_n"] / max(spent["prompt_ms"], 1e-9),
                "decode_tok_s": 1000 * spent["predicted_n"] / max(spent["predicted_ms"], 1e-9),
            }
        )
    Path(sys.argv[1]).write_text(json.dumps({"version": xllamacpp.__version__, "models": answers}))


if __name__ == "__main__":
    main()
