"""The CUDA launch plan is a pure function, and its promises are plain arithmetic; csrc/cuda/plan.h is compiled alone."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from pathlib import Path

import pytest
from test_headers import CXX, ROOT

from fastsoftloss import cuda_backend

SHIM = """
#include "cuda/plan.h"
using namespace fastsoftloss::cuda;
extern "C" {
void plan_of(int64_t rows, int64_t classes, int bytes, int contiguous, int packed, int side, int weighted, int fused, int sms,
             int form, int64_t* out) {
  const Plan p = plan({rows, classes, bytes, contiguous != 0, packed != 0, side != 0, weighted != 0, fused != 0, Form(form)}, sms);
  const Scratch s = scratch(p, rows, 9, fused != 0);
  const int64_t all[] = {int64_t(p.kernel), p.lanes, p.threads, p.tile_rows, p.splits, p.blocks, p.spread_splits, p.spread_blocks,
                         p.merge_blocks, p.shared,
                         s.shares, s.moments, s.counter, s.labels, s.size};
  for (int64_t i = 0; i < 15; ++i) out[i] = all[i];
}
int fused_of(int64_t classes) { return fused(classes); }
int64_t kept_of(int64_t rows, int64_t classes, int mean, int floats) { return kept(rows, classes, mean != 0, floats); }
}
"""
NAMES = ("kernel", "lanes", "threads", "tile_rows", "splits", "blocks", "spread_splits", "spread_blocks", "merge_blocks", "shared")
TILE_STAGED, TILE_DIRECT, RESIDENT, STREAM, CAREFUL, PROBABILITIES_HELD, PROBABILITIES_PASSED = range(7)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "shim.cpp").write_text(SHIM)
    to = folder / "plan.so"
    subprocess.run([CXX, "-std=c++17", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", str(folder / "shim.cpp"), "-o", str(to)], check=True)
    loaded = ctypes.CDLL(str(to))
    loaded.kept_of.restype = ctypes.c_int64
    return loaded


def ask(
    library, rows, classes, bytes=2, contiguous=True, packed=True, side_by_side=False, weighted=False, fused=True, sms=132, form=0
) -> dict[str, int]:
    out = (ctypes.c_int64 * 15)()
    library.plan_of(
        ctypes.c_int64(rows),
        ctypes.c_int64(classes),
        bytes,
        contiguous,
        contiguous and packed,
        side_by_side,
        weighted,
        fused,
        sms,
        form,
        out,
    )
    return dict(zip((*NAMES, "shares", "moments", "counter", "labels", "size"), out, strict=True))


ROWS = (1, 7, 4096, 10**6, 2**31 + 5, 2**40)
CLASSES = (0, 1, 2, 10, 17, 31, 32, 33, 128, 129, 512, 513, 1000, 1003, 4096, 16384, 16385, 50257, 128256, 2**20)


def test_every_row_fits_its_threads_and_every_launch_a_grid(library) -> None:
    both = (True, False)
    for rows, classes, size, contiguous, packed, fused, sms in itertools.product(ROWS, CLASSES, (2, 4, 8), both, both, both, (1, 132)):
        p = ask(library, rows, classes, size, contiguous, packed, fused=fused, sms=sms)
        assert 1 <= p["blocks"] < 2**31 and p["threads"] <= 256 and p["threads"] % p["lanes"] == 0 and p["shared"] <= 48 * 1024
        assert p["lanes"] & (p["lanes"] - 1) == 0 and (p["lanes"] <= 32 or p["lanes"] == p["threads"]), "several warps are a whole block"
        if p["kernel"] in (TILE_STAGED, TILE_DIRECT):
            assert classes <= 32 * p["lanes"] and p["tile_rows"] % (p["threads"] // p["lanes"]) == 0
            assert p["kernel"] == TILE_DIRECT or p["tile_rows"] * classes * size <= p["shared"]
            assert p["tile_rows"] * classes * size % 16 == 0, "each tile starts at a multiple of 16 bytes"
        if p["kernel"] == RESIDENT:
            vector = 16 // size
            assert classes <= 64 * p["lanes"] and p["lanes"] >= 2 * vector, "registers, and a lane for each edge"
            assert (classes - 2 * (vector - 1)) // vector >= p["lanes"] * (64 // vector // 2 - 1), "the vectors that all lanes have"
        if p["kernel"] == STREAM:
            assert p["merge_blocks"] >= 1 and p["spread_splits"] == p["splits"] * p["lanes"] // 32
            assert p["splits"] == 1 or classes // p["splits"] >= 1024, "more than two vectors a part"
            assert 1 <= p["spread_blocks"] < 2**31 and p["spread_splits"] < 2**16
        merged = p["merge_blocks"] if p["splits"] > 1 else p["blocks"]
        assert p["shares"] >= 4 * merged and p["moments"] >= p["shares"] + 256, "four sums a block, then the mean's shares"
        assert p["counter"] >= p["moments"] + (9 * rows * p["splits"] if p["splits"] > 1 else 0)
        assert p["labels"] > p["counter"] and p["labels"] % 8 == 0
        assert p["size"] == p["labels"] + ((rows + 1) // 2 if fused else 0), "two bytes a label"


def test_which_kernel(library) -> None:
    assert [ask(library, 4096, k)["kernel"] for k in (10, 512, 513, 16384, 16385)] == [TILE_STAGED] * 2 + [RESIDENT] * 2 + [STREAM]
    assert [ask(library, 4096, k, fused=False)["kernel"] for k in (1024, 1025)] == [RESIDENT, STREAM]
    assert ask(library, 4096, 21, contiguous=False, side_by_side=True)["kernel"] == TILE_DIRECT
    assert ask(library, 4096, 150, contiguous=False, side_by_side=True)["kernel"] == CAREFUL
    assert ask(library, 4096, 1000, bytes=8)["kernel"] == ask(library, 4096, 1000, weighted=True)["kernel"] == CAREFUL
    assert ask(library, 4096, 1)["kernel"] == CAREFUL, "no complement"


def test_class_probabilities(library) -> None:
    """Held rows fit 36 classes a thread wherever their first is in its sector; a group of more than a warp is the whole block."""
    for rows, classes, size, weighted in itertools.product(ROWS, CLASSES, (2, 4, 8), (False, True)):
        p = ask(library, rows, classes, size, weighted=weighted, form=2)
        assert 1 <= p["blocks"] < 2**31 and p["splits"] == 1 and p["threads"] <= 256 and p["threads"] % p["lanes"] == 0
        assert p["lanes"] & (p["lanes"] - 1) == 0 and (p["lanes"] <= 32 or p["lanes"] == p["threads"])
        held = size < 8 and not weighted and classes <= 256 * 36 - 15
        assert p["kernel"] == (PROBABILITIES_HELD if held else PROBABILITIES_PASSED)
        if held:
            assert classes + (15 if p["lanes"] >= 32 else 0) <= 36 * p["lanes"]
        else:
            assert p["lanes"] >= 4, "no more shared memory than there is without asking"


def test_few_long_rows_are_shared_and_many_are_not(library) -> None:
    assert ask(library, 2, 2**20)["splits"] > 16
    assert ask(library, 10**5, 128256)["splits"] == ask(library, 4224, 4096, fused=False)["splits"] == 1


def test_python_and_cpp_agree_on_what_a_forward_gives(library) -> None:
    for classes in CLASSES:
        assert bool(library.fused_of(ctypes.c_int64(classes))) == (classes <= cuda_backend.FUSED_CLASSES)
        for mean, floats in itertools.product((False, True), cuda_backend.KEPT.values()):
            kept = 1 + floats * 7 if classes > cuda_backend.KEPT_CLASSES else int(mean)
            assert library.kept_of(ctypes.c_int64(7), ctypes.c_int64(classes), mean, floats) == kept


def test_the_headers_know_no_torch() -> None:
    for path in Path(ROOT / "csrc/cuda").iterdir():
        assert "torch" not in path.read_text()
