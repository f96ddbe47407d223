"""The kernels compile for every architecture, without spills and with 16-byte accesses. Evidence: compiled (cuobjdump)."""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from triton_mode import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsoftloss import ops
from fastsoftloss import triton_kernels as kernels
from fastsoftloss.triton_plan import plan

NVIDIA = (80, 90, 100, 120)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# what is compiled: the kernel, its number of classes, the class stride
CASES = {
    "flat": (kernels.resident, 10, 1),
    "aligned": (kernels.resident, 1003, 1),
    "strided": (kernels.resident, 19, 4096),
    "long_reduce": (kernels.long_reduce, 50257, 1),
    "long_spread": (kernels.long_spread, 50257, 1),
}
POINTERS = {"target_ptr": "*i64", "loss_ptr": "*A", "partials_ptr": "*A", "moments_ptr": "*A", "saved_ptr": "*A", "upstream_ptr": "*A"}


def compile_case(case: str, dtype: str, diversity: int, target: GPUTarget) -> Any:
    """The kernel as the host would ask for it: fused forward of "mean" with every run-time stride; long rows each way."""
    kernel, classes, class_stride = CASES[case]
    p = plan(4096, classes, class_stride, [classes * class_stride], BYTES[dtype], True, 132, case == "long_spread")
    accumulate = "fp64" if dtype == "fp64" else "fp32"
    same = {"KIND": diversity, "SMOOTH": False, "Z_LOSS": False, "REDUCTION": 1, "DIMS": 1, "SAME": True, "WIDE": False, "RESCALE": False}
    shape = {"A": p.a, "R": p.r, "B": p.b, "P": p.run, "L": p.r, "V": p.b, "ALIGN": p.align, "ACCESS": p.access, "SHARES": 1, "K": classes}
    constants = same | shape | {"UPSTREAM_ROWS": False, "COPIES": max(1, 32 * p.warps // p.r)}
    absent = {"weight_ptr", "sample_ptr", "parts_ptr", "divisor_ptr", "shares_ptr", "counter_ptr"}
    absent |= {"upstream_ptr"} if kernel is kernels.resident else set()
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in absent or (name in ("sc", "tc") and class_stride == 1):
            signature[name], values[name] = "constexpr", constants.get(name, 1 if name in ("sc", "tc") else None)
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, f"*{dtype}").replace("A", accumulate)
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp64" if name in ("smoothing", "diversity_weight", "z_loss") else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": p.warps})


def cuobjdump(compiled: Any, tmp_path: Path, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    return subprocess.run([tool, flag, binary], capture_output=True, text=True, check=True).stdout


def check(case: str, dtype: str, diversity: int, capability: int, tmp_path: Path) -> None:
    compiled = compile_case(case, dtype, diversity, GPUTarget("cuda", capability, 32))
    usage = cuobjdump(compiled, tmp_path, "-res-usage")
    (stack,), (local,) = re.findall(r"STACK:(\d+)", usage), re.findall(r"LOCAL:(\d+)", usage)
    assert (stack, local) == ("0", "0"), usage
    if case != "strided":
        ptx = compiled.asm["ptx"]
        assert "ld.global.v4.b32" in ptx or "ld.global.v2.b64" in ptx, "no 16-byte load"
        if case != "long_reduce":
            assert "st.global.v4.b32" in ptx or "st.global.v2.b64" in ptx, "no 16-byte store"


@pytest.mark.parametrize(("case", "dtype"), [(c, t) for c, t in itertools.product(CASES, BYTES) if (c, t) != ("flat", "fp64")])
def test_every_kernel_and_dtype(case: str, dtype: str, tmp_path: Path) -> None:
    """Each on one architecture with each of two penalties, so that all architectures meet all kernels."""
    turn = list(CASES).index(case) + list(BYTES).index(dtype)
    check(case, dtype, 1, NVIDIA[turn % 4], tmp_path)
    check(case, dtype, 2 + turn % 4, NVIDIA[(turn + 2) % 4], tmp_path)


@pytest.mark.parametrize(("case", "diversity"), itertools.product(("flat", "aligned", "long_spread"), range(len(ops.DIVERSITIES))))
def test_every_penalty(case: str, diversity: int, tmp_path: Path) -> None:
    check(case, "bf16", diversity, NVIDIA[diversity % 4], tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_sass_has_16_byte_accesses(case: str, tmp_path: Path) -> None:
    if case == "strided":
        pytest.skip("a class stride leaves nothing contiguous")
    sass = cuobjdump(compile_case(case, "bf16", 1, GPUTarget("cuda", 80, 32)), tmp_path, "-sass")
    assert re.search(r"LDG\.E\S*\.128", sass) and (case == "long_reduce" or re.search(r"STG\.E\S*\.128", sass))


@pytest.mark.parametrize("case", CASES)
def test_amd(case: str) -> None:
    assert compile_case(case, "bf16", 1, GPUTarget("hip", "gfx942", 64)).asm["hsaco"]
