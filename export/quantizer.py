# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's own quantizer, in a process of its environment: rows of float32 go in, its blocks come out."""

import json
import subprocess
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from .environments import DRIVERS, engine_python
from .errors import EngineMissingError, ExportError

if TYPE_CHECKING:
    import numpy as np


class EngineQuantizer:
    """Quantizes with the llama.cpp that is installed here."""

    def __init__(self) -> None:
        """Raises EngineMissingError if it is not."""
        python = engine_python("llama.cpp")
        if python is None:
            raise EngineMissingError(
                "k-quants are made by llama.cpp's own quantizer, which is not installed here: make engines "
                "ENGINES=llama.cpp. Or take --quantize q8_0, which needs none"
            )
        self._command = [str(python), "-P", str(DRIVERS / "quantize_llama_cpp.py")]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process:
            self._process.communicate()

    def __call__(self, rows: "np.ndarray[Any, Any]", kind: str) -> "np.ndarray[Any, Any]":
        """rows: float32 (..., columns), columns a multiple of the block; kind: as GGUF names it, `Q4_K`. Returns uint8
        (..., bytes of a row).

        Raises:
            ExportError: if the quantizer ends before it has answered.
        """
        import gguf
        import numpy as np

        number = gguf.GGMLQuantizationType[kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[number]
        columns = rows.shape[-1]
        shape = (*rows.shape[:-1], columns // block * block_bytes)
        request = {"type": int(number), "rows": rows.size // columns, "columns": columns, "bytes": int(np.prod(shape))}
        assert self._process and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.write(np.ascontiguousarray(rows, np.float32).data)
            self._process.stdin.flush()
            data = _exactly(self._process.stdout, request["bytes"])
        except (BrokenPipeError, EOFError) as error:
            raise ExportError(f"llama.cpp's quantizer ended in the middle of {kind}: {error}") from error
        return np.frombuffer(data, np.uint8).reshape(shape)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"{len(data)} of {count} bytes came")
    return data
