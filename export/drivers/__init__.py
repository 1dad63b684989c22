# SPDX-License-Identifier: Apache-2.0
"""Scripts that run inside an engine's own environment: one file each, no imports of ours.

Started as `python -P run_ENGINE.py ANSWER`, each reads one JSON object on stdin and writes one into the file ANSWER,
since engines print what they like on stdout. The request: `models` (paths; the first is what the others are compared
with), `prompts` (lists of token ids, all of one length), `new_tokens`, `threads`, `trust` (paths whose own code may
run), `text` (windows of token ids for the perplexity). The answer: `version`, and in `models` for each one `tokens` and
`logprobs` (a list a prompt), `load_s`, `prefill_tok_s`, `decode_tok_s`, and what else the engine can tell. Decoding is
greedy, and a token that ends a sequence does not end it.
"""
