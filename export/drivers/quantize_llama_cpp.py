# SPDX-License-Identifier: Apache-2.0
"""Quantize rows with `ggml_quantize_chunk` of the llama.cpp in the package xllamacpp.

For each line of JSON with type, rows, columns and bytes, and rows * columns numbers of float32 after it, so many bytes
are answered.
"""

import ctypes
import importlib.util
import json
import sys
from pathlib import Path


def library() -> ctypes.CDLL:
    """The shared library of xllamacpp, with llama.cpp inside."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("the package xllamacpp is not installed here")
    (file,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    found = ctypes.CDLL(str(file))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return found


def main() -> None:
    ggml = library()
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        rows, columns = request["rows"], request["columns"]
        numbers = sys.stdin.buffer.read(4 * rows * columns)
        out = ctypes.create_string_buffer(request["bytes"])
        written = ggml.ggml_quantize_chunk(request["type"], numbers, out, 0, rows, columns, None)
        if written != request["bytes"]:
            raise SystemExit(f"llama.cpp wrote {written} bytes where {request['bytes']} were expected")
        sys.stdout.buffer.write(out.raw)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
