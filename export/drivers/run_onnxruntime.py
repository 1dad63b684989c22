# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens of models in ONNX Runtime GenAI, in float32."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found]


class Models:
    """One model, loaded once for each token that stands for the end of a sequence.

    It has no setting to go on after that end: all that it chooses from there on is the end again, whatever the logits
    are. So another token stands for it, one that does not come up.
    """

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads, self._loaded = path, threads, {}
        self.vocab_size = json.loads(Path(path, "genai_config.json").read_text())["model"]["vocab_size"]

    def ending_with(self, token: int) -> Any:
        if token not in self._loaded:
            options = {"session_options": {"intra_op_num_threads": self._threads}}
            config = og.Config(self._path)
            config.overlay(json.dumps({"model": {"eos_token_id": token, "decoder": options}}))
            self._loaded[token] = og.Model(config)
        return self._loaded[token]

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], list[float], float]:
        """`count` tokens, their log-probabilities, and the seconds to the first."""
        ends = (token for token in range(self.vocab_size - 1, -1, -1) if token not in prompt)
        runs = (greedy(self.ending_with(end), prompt, count) for end in ends)
        return next(run for run in runs if len(run[0]) == count)


def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float], float]:
    """As `Models.greedy`, but no further than to the end of the sequence."""
    tokens: list[int] = []
    logprobs: list[float] = []
    first_s = 0.0
    asked = og.GeneratorParams(model)
    asked.set_search_options(max_length=len(prompt) + count, do_sample=False)
    began = time.perf_counter()
    generator = og.Generator(model, asked)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    while len(tokens) < count and not (tokens and generator.is_done()):
        logits = np.asarray(generator.get_logits(), dtype=np.float64).reshape(-1)
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        first_s = first_s or time.perf_counter() - began
        top = logits.max()
        tokens.append(token)
        logprobs.append(float(logits[token] - top - np.log(np.exp(logits - top).sum())))
    return tokens, logprobs, first_s


def run(path: str, request: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    models = Models(path, request["threads"])
    models.ending_with(models.vocab_size - 1)
    load_s = time.perf_counter() - began
    began = time.perf_counter()
    runs = [models.greedy(prompt, request["new_tokens"]) for prompt in request["prompts"]]
    all_s = time.perf_counter() - began
    prefill_s = sum(first for _, _, first in runs)
    return {
        "load_s": load_s,
        "tokens": [tokens for tokens, _, _ in runs],
        "logprobs": [logprobs for _, logprobs, _ in runs],
        "prefill_tok_s": sum(len(prompt) for prompt in request["prompts"]) / prefill_s,
        "decode_tok_s": len(runs) * (request["new_tokens"] - 1) / max(all_s - prefill_s, 1e-9),
    }


def main() -> None:
    request = json.load(sys.stdin)
    answers = [run(path, request) for path in request["models"]]
    Path(sys.argv[1]).write_text(json.dumps({"version": version("onnxruntime-genai"), "models": answers}))


if __name__ == "__main__":
    main()
