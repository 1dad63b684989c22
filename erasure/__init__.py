# SPDX-License-Identifier: Apache-2.0
"""Reed-Solomon over bytes, as fast as memory allows. Knows nothing of training and does not import torch.

code = Code(4, 2)
apply(code.parity_matrix, data, parities)
apply(code.rebuild_matrix(have=[0, 2, 3, 4], want=[1]), survivors, [lost])
"""

from .backends import Backend, backend, checksum
from .code import Code
from .errors import ErasureError, TooManyLosses
from .linear import apply
from .locate import Undecidable, locate_corrupt
from .pool import Workers

__all__ = [
    "Backend",
    "Code",
    "ErasureError",
    "TooManyLosses",
    "Undecidable",
    "Workers",
    "apply",
    "backend",
    "checksum",
    "locate_corrupt",
]
