# SPDX-License-Identifier: Apache-2.0
"""Models for ONNX Runtime GenAI, by its own builder, of Hugging Face directories.

Started as `convert_onnx.py SOURCE TO [SOURCE TO …]`. The builder is its package's command; here it runs once for each,
in one process.
"""

import runpy
import sys
import tempfile

BUILDER = "onnxruntime_genai.models.builder"


def main() -> None:
    for source, directory in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        with tempfile.TemporaryDirectory(prefix="refound-onnx-") as cache:
            sys.argv = [BUILDER, "-i", source, "-o", directory, "-p", "fp32", "-e", "cpu", "-c", cache]
            runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
