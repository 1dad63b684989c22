# SPDX-License-Identifier: Apache-2.0
"""The primitive on torch tensors: eager torch and the Triton kernel give the bytes that the host gives."""

import importlib
import importlib.util
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.erasure import Code, ErasureError, apply, eager, tensors
from refound.erasure.field import PRODUCTS, product

HAVE_TRITON = importlib.util.find_spec("triton") is not None
CPU = torch.device("cpu")


@pytest.fixture
def triton_kernel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernel's module under Triton's interpreter, or compiled where there is a GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "refound.erasure.triton_kernel", raising=False)
    return importlib.import_module("refound.erasure.triton_kernel")


def random_tensors(rows: int, size: int, seed: int = 3) -> torch.Tensor:
    """Rows that start on whole lines, as memory from an allocator does."""
    padded = torch.zeros((rows, size + 64 - size % 64), dtype=torch.uint8)
    padded[:, :size] = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (rows, size), dtype=np.uint8))
    return padded[:, :size]


def test_eager_computes_all_products():
    every = torch.arange(256, dtype=torch.uint8)
    outs = torch.empty((256, 256), dtype=torch.uint8)
    for first in range(0, 256, 16):
        matrix = np.arange(first, first + 16, dtype=np.uint8)[:, None]
        eager.apply(matrix, [every], list(outs[first : first + 16]))
    assert np.array_equal(outs.numpy(), PRODUCTS)


@settings(deadline=None)
@given(st.data())
def test_eager_equals_the_host_for_any_code_and_loss(data: st.DataObject):
    k, m = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    code, size = Code(k, m), data.draw(st.integers(1, 700))
    lost = data.draw(st.lists(st.integers(0, k + m - 1), min_size=1, max_size=m, unique=True))
    symbols = random_tensors(k + m, size)
    apply(code.parity_matrix, list(symbols[:k]), list(symbols[k:]))
    have = [i for i in range(k + m) if i not in lost][-k:]
    rebuilt = torch.empty((len(lost), size), dtype=torch.uint8)
    eager.apply(code.rebuild_matrix(have, lost), [symbols[i] for i in have], list(rebuilt))
    assert torch.equal(rebuilt, symbols[lost])


def test_eager_cuts_blocks_anywhere_and_takes_unaligned_tensors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(eager, "CPU_BLOCK_BYTES", 1001)
    whole = random_tensors(4, 10_007)
    ins, outs = (
        [row[c:][:10_000] for c, row in enumerate(whole)],
        torch.full((2, 10_003), 9, dtype=torch.uint8),
    )
    eager.apply(Code(4, 2).parity_matrix, ins, [row[r + 1 : r + 10_001] for r, row in enumerate(outs)])
    expected = product(Code(4, 2).parity_matrix, np.stack([t.numpy() for t in ins]))
    assert np.array_equal(outs[0, 1:10_001], expected[0]) and np.array_equal(outs[1, 2:10_002], expected[1])
    assert outs[0, 0] == outs[1, 1] == outs[0, 10_001] == outs[1, 10_002] == 9


def test_apply_takes_tensors_short_ones_too():
    symbols = random_tensors(6, 1000)
    short = [symbols[0], symbols[1, :0], symbols[2, :999], symbols[3, :17]]
    padded = np.zeros((4, 1000), dtype=np.uint8)
    for row, tensor in zip(padded, short, strict=True):
        row[: len(tensor)] = tensor.numpy()
    apply(Code(4, 2).parity_matrix, short, list(symbols[4:]))
    assert np.array_equal(symbols[4:].numpy(), product(Code(4, 2).parity_matrix, padded))


def _zeros(size: int = 8) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


_shared = _zeros(100)


@pytest.mark.parametrize(
    ("ins", "outs", "words"),
    [
        ([_zeros().to(torch.int8)], [_zeros()], r"ins\[0\] has dtype torch.int8"),
        ([_zeros().view(2, 4)], [_zeros()], "2 dimensions"),
        ([_zeros(16)[::2]], [_zeros()], "not contiguous"),
        ([_zeros()], [_zeros(16)[::2]], r"outs\[0\] is not contiguous"),
        ([bytes(8)], [_zeros()], "bytes among tensors"),
        ([_zeros()], [bytearray(8)], "bytearray among tensors"),
        ([_shared[:8]], [_shared[7:15]], "overlaps"),
        ([_zeros(9)], [_zeros(8)], r"ins\[0\] has 9 bytes"),
        ([_zeros(0)], [_zeros(0)], "length zero"),
        ([torch.zeros(8, dtype=torch.uint8, device="meta")], [_zeros()], "2 devices"),
    ],
)
def test_bad_tensors_are_refused_before_any_write(ins, outs, words):
    for out in outs:
        out[:] = _zeros(len(out)) + 0x5A if isinstance(out, torch.Tensor) else b"Z" * len(out)
    with pytest.raises(ErasureError, match=words):
        apply([[1]], ins, outs)
    assert all(int(byte) == 0x5A for out in outs for byte in out)


def test_the_choice_for_a_device_has_a_reason():
    assert tensors.device_backend(torch.device("meta")).reason.endswith("no kernel for meta")
    backend = tensors.device_backend(torch.device("cuda", 0))
    if torch.cuda.is_available() and HAVE_TRITON:
        assert backend.name == "triton"
    else:
        assert backend.name == "eager" and "Triton failed on cuda:0" in backend.reason


def test_a_kernel_that_computes_wrongly_is_refused():
    def wrong(matrix, ins, outs):
        eager.apply(matrix, ins, outs)
        outs[-1][-1] ^= 1

    tensors.verify(eager.apply, CPU)
    with pytest.raises(ErasureError, match="came out wrong"):
        tensors.verify(wrong, CPU)


if HAVE_TRITON:  # `make test` installs it on x86_64; torch's CUDA builds bring it
    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 2), (2, 1), (4, 2), (10, 4)])
    @pytest.mark.parametrize("size", [1, 63, 64, 4096, 4097, 10_050])
    def test_triton_equals_the_host(k: int, m: int, size: int, triton_kernel: ModuleType):
        code, symbols = Code(k, m), random_tensors(k + m, size)
        apply(code.parity_matrix, list(symbols[:k]), list(symbols[k:]))
        have = list(range(m, k + m)) if k > m else list(range(m, m + k))
        for matrix, ins, expected in (
            (code.parity_matrix, symbols[:k], symbols[k:]),
            (code.rebuild_matrix(have, range(m)), symbols[have], symbols[:m]),
        ):
            outs = torch.full((m, size + 64 - size % 64), 9, dtype=torch.uint8, device=DEVICE)
            given = random_tensors(k, size).to(DEVICE)
            given.copy_(ins)
            triton_kernel.apply(matrix, list(given), [row[:size] for row in outs])
            assert torch.equal(outs[:, :size].cpu(), expected)
            assert (outs[:, size:] == 9).all()

    def test_triton_handles_zero_rows_copies_and_unaligned_tensors(triton_kernel: ModuleType):
        matrix = np.array([[0, 0], [1, 0], [2, 3]], dtype=np.uint8)
        ins = random_tensors(2, 500)
        for shift in (0, 1):
            given = [row[shift:300].to(DEVICE) for row in ins]
            outs = torch.full((3, 320), 9, dtype=torch.uint8, device=DEVICE)
            triton_kernel.apply(matrix, given, [row[shift:300] for row in outs])
            assert np.array_equal(outs[:, shift:300].cpu(), product(matrix, ins[:, shift:300].numpy()))

    @pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2), (10, 4)])
    def test_triton_compiles_to_one_wide_load_an_input(k: int, m: int, monkeypatch: pytest.MonkeyPatch):
        """For an H100 or H200, without having one: four words a load, and no input loaded twice."""
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delitem(sys.modules, "refound.erasure.triton_kernel", raising=False)
        module = importlib.import_module("refound.erasure.triton_kernel")
        from triton import compile as compile_kernel  # pyright: ignore[reportMissingImports]
        from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
        from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

        steps, results = module.straight_line(Code(k, m).parity_matrix.tobytes(), m, k)
        aligned = [["tt.divisibility", 16]]
        source = ASTSource(
            fn=module._kernel,
            signature={
                "ins": ("*i32",) * k,
                "outs": ("*i32",) * m,
                "words": "i64",
                **dict.fromkeys(("STEPS", "RESULTS", "BLOCK"), "constexpr"),
            },
            constexprs={"STEPS": steps, "RESULTS": results, "BLOCK": module.BLOCK_WORDS},
            attrs={
                **{(side, i): aligned for side, n in ((0, k), (1, m)) for i in range(n)},
                (2,): aligned,
            },
        )
        lines = compile_kernel(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"].splitlines()
        loads = [line for line in lines if "ld.global" in line]
        # 128 threads with four words a load take two loads for a block of 1,024.
        assert len(loads) == 2 * k and all(".v4" in line for line in loads)
        assert sum("st.global.v4" in line for line in lines) == 2 * m
