# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of models in OpenVINO GenAI, in float32, and their log-probabilities from the graph itself."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]


def settings(request: dict[str, Any]) -> dict[str, str]:
    """By itself it computes in bfloat16 where the processor has it, and keeps the cache in 8 bits."""
    dtype = {"float32": "f32", "bfloat16": "bf16"}[request["settings"].get("dtype", "float32")]
    return {
        "INFERENCE_PRECISION_HINT": dtype,
        "KV_CACHE_PRECISION": request["settings"].get("cache", "f32"),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": str(request["threads"]),
    }


def generate(pipeline: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    asked = openvino_genai.GenerationConfig(max_new_tokens=count, do_sample=False, ignore_eos=True)
    tokens = []
    for prompt in prompts:
        ids = np.array([prompt], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        tokens.append([int(token) for token in pipeline.generate(inputs, asked).tokens[0]])
    return tokens


class Graph:
    """The exported graph alone: logits at every position of sequences that are given whole."""

    def __init__(self, path: str, request: dict[str, Any]) -> None:
        model = openvino.Core().read_model(str(Path(path, "openvino_model.xml")))
        self._compiled = openvino.Core().compile_model(model, "CPU", settings(request))
        self._names = {name for port in self._compiled.inputs for name in port.get_names()}

    def log_probabilities(self, rows: list[list[int]]) -> np.ndarray[Any, Any]:
        """(rows, positions, vocabulary), in float64."""
        ids = np.array(rows, dtype=np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape).copy(),
            "beam_idx": np.arange(len(ids), dtype=np.int32),
        }
        run = self._compiled.create_infer_request()
        run.infer({name: value for name, value in inputs.items() if name in self._names})
        logits = run.get_tensor("logits").data.astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def chosen(log_probabilities: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.take_along_axis(log_probabilities, rows[..., None], axis=-1)[..., 0]


def run(path: str, request: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(path, "CPU", **settings(request))
    load_s = time.perf_counter() - began
    prompts, count = request["prompts"], request["new_tokens"]
    began = time.perf_counter()
    generate(pipeline, prompts, 1)
    prefill_s = time.perf_counter() - began
    began = time.perf_counter()
    tokens = generate(pipeline, prompts, count)
    decode_s = time.perf_counter() - began
    del pipeline
    graph = Graph(path, request)
    length = len(prompts[0])
    whole = [prompt + out[:-1] for prompt, out in zip(prompts, tokens, strict=True)]
    logprobs = chosen(graph.log_probabilities(whole)[:, length - 1 :], np.array(tokens))
    text = request["text"]
    loss = -chosen(graph.log_probabilities(text)[:, :-1], np.array(text)[:, 1:]).mean() if text else None
    return {
        "load_s": load_s,
        "tokens": tokens,
        "logprobs": logprobs.tolist(),
        "perplexity": None if loss is None else math.exp(loss),
        "prefill_tok_s": len(prompts) * length / prefill_s,
        "decode_tok_s": len(prompts) * count / decode_s,
    }


def main() -> None:
    request = json.load(sys.stdin)
    answers = [run(path, request) for path in request["models"]]
    Path(sys.argv[1]).write_text(json.dumps({"version": openvino_genai.__version__, "models": answers}))


if __name__ == "__main__":
    main()
