"""A kernel of one tile, which does nothing but read and write it: for test_triton_agreement, since Triton wants a file's source."""

import triton
import triton.language as tl

from fastsoftloss.triton_kernels import _load_run, _store_run


@triton.jit
def first_tile(from_ptr, to_ptr, rows, K: tl.constexpr, A: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr):
    z, _ = _load_run(from_ptr, 0, rows, K, A, R, B, P)
    _store_run(to_ptr, 0, rows, K, z, A, R, B, P)
