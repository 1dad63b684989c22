# SPDX-License-Identifier: Apache-2.0
"""Layouts that an engine's own exporter makes of a Hugging Face directory, in that engine's environment.

Such an engine is needed to write for it, not only to prove: OpenVINO's intermediate representation comes from
optimum-intel, ONNX Runtime GenAI's model from the builder in its package.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from .environments import DRIVERS, engine_python
from .errors import EngineMissingError, ExportError

CONVERTED = {"openvino": "openvino", "onnx": "onnxruntime"}
"""The engine whose exporter writes a layout."""
GRAPH_BYTES = 2_000_000
"""Of a graph without its weights, and what goes along; about right."""
WEIGHT_FILES = {"openvino": "openvino_model.bin", "onnx": "model.onnx.data"}
GRAPH_FILES = {
    "openvino": ("openvino_model.xml", "openvino_tokenizer.xml", "openvino_tokenizer.bin", "openvino_detokenizer.xml"),
    "onnx": ("model.onnx", "genai_config.json"),
}


def require_converter(layout: str) -> Path:
    """The interpreter that converts to it.

    Raises:
        EngineMissingError: if the engine is not installed.
    """
    engine = CONVERTED[layout]
    python = engine_python(engine)
    if python is None:
        raise EngineMissingError(
            f"files for {engine} are made by its own exporter, which is not installed here: make engines "
            f"ENGINES={engine}"
        )
    return python


def convert(layout: str, pairs: Sequence[tuple[Path, Path]]) -> None:
    """Make the files of `layout` of a Hugging Face directory in another, which is there; of several in one process.

    pairs: (from, to) each.

    Raises:
        EngineMissingError: see `require_converter`.
        ExportError: if the exporter fails; the message ends with its own last words.
    """
    python = require_converter(layout)
    command = [str(python), "-P", str(DRIVERS / f"convert_{layout}.py")]
    command += [str(path.absolute()) for pair in pairs for path in pair]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=pairs[0][1])
    if done.returncode != 0:
        last = "\n  ".join(done.stderr.strip().splitlines()[-6:])
        raise ExportError(f"{CONVERTED[layout]}'s exporter failed (exit code {done.returncode}):\n  {last}")
