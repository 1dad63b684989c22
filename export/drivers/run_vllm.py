# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of models in vLLM, in float32, in this process."""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def settings(threads: int) -> dict[str, str]:
    """vLLM keeps a core to itself and starts a process of its own unless it is told not to."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def is_packed(path: str) -> bool:
    """Whether weights are integers, which its kernels multiply by 16-bit numbers only."""
    return "quantization_config" in json.loads(Path(path, "config.json").read_text())


def run(path: str, adapters: list[str], request: dict[str, Any]) -> list[dict[str, Any]]:
    """An answer for each adapter, all of which are asked for in one batch; or for the model alone, if there is none."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    began = time.perf_counter()
    engine = LLM(
        path,
        dtype=request["settings"].get("dtype") or ("bfloat16" if is_packed(path) else "float32"),
        enforce_eager=True,
        max_model_len=len(request["prompts"][0]) + request["new_tokens"] + 8,
        skip_tokenizer_init=True,
        trust_remote_code=path in request["trust"],
        max_num_batched_tokens=1024,
        max_num_seqs=len(request["prompts"]) * max(len(adapters), 1),
        # A slot more than adapters: its CPU build gives requests without one the last slot's.
        **({"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": 512} if adapters else {}),
        speculative_config=request["settings"].get("speculation"),
    )
    loras = [LoRARequest(f"adapter_{place}", place, adapter) for place, adapter in enumerate(adapters, start=1)]
    load_s = time.perf_counter() - began
    once: Any = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    prompts = once * max(len(loras), 1)
    lora = [lora for lora in loras for _ in once] or None
    began = time.perf_counter()
    engine.generate(
        prompts,
        SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False),
        use_tqdm=False,
        lora_request=lora,
    )
    prefill_s = time.perf_counter() - began
    asked = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False, logprobs=1
    )
    began = time.perf_counter()
    outs = [out.outputs[0] for out in engine.generate(prompts, asked, use_tqdm=False, lora_request=lora)]
    decode_s = time.perf_counter() - began
    counted = sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
    rates = {
        "load_s": load_s,
        "prefill_tok_s": counted / prefill_s,
        "decode_tok_s": len(outs) * request["new_tokens"] / decode_s,
    }
    groups = [outs[start : start + len(once)] for start in range(0, len(outs), len(once))]
    return [
        {
            **rates,
            "tokens": [list(out.token_ids) for out in group],
            "logprobs": [
                [chosen[token].logprob for token, chosen in zip(out.token_ids, out.logprobs, strict=True)]
                for out in group
            ],
        }
        for group in groups
    ]


def use_plugins(trusted: list[str]) -> None:
    """Those beside trusted models, as if they were installed; vLLM looks into models in processes of its own."""
    wheels = sorted({str(wheel.resolve()) for path in trusted for wheel in Path(path).glob("refound_vllm-*.whl")})
    if wheels:
        sys.path.append(wheels[0])
        os.environ["PYTHONPATH"] = wheels[0]


def main() -> None:
    request = json.load(sys.stdin)
    os.environ.update(settings(request["threads"]))
    use_plugins(request["trust"])
    import vllm  # type: ignore[import-not-found]
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # type: ignore[import-not-found]

    answers = []
    if request["together"]:
        answers += run(request["models"][0], request["adapters"], request)
    else:
        for path, adapter in zip(request["models"], request["adapters"], strict=True):
            answers += run(path, [adapter] if adapter else [], request)
            gc.collect()
            # What was set up for a dense model has no group of experts, and would stay for the next one.
            cleanup_dist_env_and_memory()
    Path(sys.argv[1]).write_text(json.dumps({"version": vllm.__version__, "models": answers}))


if __name__ == "__main__":
    main()
