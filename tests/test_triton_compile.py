"""The kernels compile for every architecture, without spills and with 16-byte accesses. Evidence: compiled (cuobjdump).

Kernel x dtype x penalty x architecture is a rotation in which every pair meets; with FASTSOFTLOSS_TEST_EVERY=1 the whole
product, which takes an hour.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from triton_mode import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsoftloss import ops, triton_finish, triton_hessian, triton_kernels, triton_rows, triton_soft
from fastsoftloss.triton_plan import chunks_at_a_time, hessian_plan, plan, soft_plan

EVERY = os.environ.get("FASTSOFTLOSS_TEST_EVERY") == "1"
ARCHITECTURES = (80, 90, 100, 120, "gfx942")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


class Case(NamedTuple):
    """A kernel and what the host would ask of it for 4096 rows of ``classes``."""

    kernel: Any
    classes: int
    class_stride: int = 1
    gradient: bool = False  # the pass writes it
    kept: bool = False  # from what the forward has kept
    absent: tuple[str, ...] = ()
    form: str = "index"
    loads: bool = True  # of 16 bytes
    stores: bool = True


FUSED = ("weight_ptr", "sample_ptr", "parts_ptr", "upstream_ptr", "saved_ptr")
MIXED = ("weight_ptr", "parts_ptr", "upstream_ptr", "saved_ptr")
MIXED_LONG = ("weight_ptr", "parts_ptr")
FORWARD = ("weight_ptr", "sample_ptr", "parts_ptr", "upstream_ptr", "g_ptr", "shares_ptr", "counter_ptr", "divisor_ptr")
PLAIN = ("weight_ptr", "sample_ptr", "parts_ptr")
CASES = {
    "flat": Case(triton_kernels.resident, 10, gradient=True, absent=FUSED),
    "wide flat": Case(triton_kernels.resident, 100, gradient=True, absent=FUSED),  # a thread holds most
    "strided": Case(triton_kernels.resident, 19, 4096, gradient=True, absent=FUSED, loads=False, stores=False),
    "sectors": Case(triton_rows.resident_rows, 4096, gradient=True, absent=FUSED),
    "half sectors": Case(triton_rows.resident_rows, 1000, gradient=True, absent=FUSED),
    "widest": Case(triton_rows.resident_rows, 16384, gradient=True, absent=FUSED),
    "edges": Case(triton_rows.resident_rows, 1003, gradient=True, absent=FUSED),
    "forward": Case(triton_rows.resident_rows, 1003, absent=FORWARD, stores=False),
    "long_reduce": Case(triton_rows.long_reduce, 50257, absent=PLAIN, stores=False),
    "long_reduce, strided": Case(triton_rows.long_reduce, 50257, 7, absent=PLAIN, loads=False, stores=False),
    "long_finish": Case(triton_rows.long_finish, 50257, absent=PLAIN, loads=False, stores=False),
    "spread": Case(triton_rows.spread_rows, 1000, gradient=True, kept=True, absent=PLAIN),
    "long spread": Case(triton_rows.spread_rows, 50257, gradient=True, kept=True, absent=PLAIN),
    "probabilities": Case(triton_soft.soft, 100, gradient=True, absent=FUSED, form="probabilities", loads=False, stores=False),
    "wide probabilities": Case(triton_soft.soft, 4096, gradient=True, absent=FUSED, form="probabilities", stores=False),
    "flat mixture": Case(triton_kernels.resident, 10, gradient=True, absent=MIXED, form="mixture"),
    "wide flat mixture": Case(triton_kernels.resident, 100, gradient=True, absent=MIXED, form="mixture"),
    "strided mixture": Case(triton_kernels.resident, 19, 4096, gradient=True, absent=MIXED, form="mixture", loads=False, stores=False),
    "wide strided mixture": Case(triton_kernels.resident, 4096, 7, gradient=True, absent=MIXED, form="mixture", loads=False, stores=False),
    "mixture, sectors": Case(triton_rows.resident_rows, 4096, gradient=True, absent=MIXED, form="mixture"),
    "mixture, half sectors": Case(triton_rows.resident_rows, 1000, gradient=True, absent=MIXED, form="mixture"),
    "mixture, edges": Case(triton_rows.resident_rows, 1003, gradient=True, absent=MIXED, form="mixture"),
    "mixture, forward": Case(triton_rows.resident_rows, 1003, absent=FORWARD, form="mixture", stores=False),
    "mixture, long_reduce": Case(triton_rows.long_reduce, 50257, absent=PLAIN, form="mixture", stores=False),
    "mixture, long_finish": Case(triton_rows.long_finish, 50257, absent=MIXED_LONG, form="mixture", loads=False, stores=False),
    "mixture, spread": Case(triton_rows.spread_rows, 1000, gradient=True, kept=True, absent=MIXED_LONG, form="mixture"),
    "mixture, long spread": Case(triton_rows.spread_rows, 50257, gradient=True, kept=True, absent=MIXED_LONG, form="mixture"),
    "long probabilities": Case(triton_soft.soft, 50257, gradient=True, absent=FUSED, form="probabilities", loads=False, stores=False),
    "hessian": Case(triton_hessian.hessian, 100, absent=PLAIN),
    "hessian of a row": Case(triton_hessian.hessian, 4096, absent=PLAIN, loads=False, stores=False),
    "long hessian": Case(triton_hessian.hessian, 50257, absent=PLAIN, loads=False, stores=False),
    "strided hessian": Case(triton_hessian.hessian, 19, 4096, absent=PLAIN, loads=False, stores=False),
    "hessian, mixture": Case(triton_hessian.hessian, 100, absent=MIXED_LONG, form="mixture"),
    "hessian of a row, mixture": Case(triton_hessian.hessian, 4096, absent=MIXED_LONG, form="mixture", loads=False, stores=False),
    "long hessian, mixture": Case(triton_hessian.hessian, 50257, absent=MIXED_LONG, form="mixture", loads=False, stores=False),
    "total": Case(triton_finish.total, 1, absent=("parts_ptr",), loads=False, stores=False),
    "divisors": Case(triton_finish.divisors, 1, absent=PLAIN, loads=False, stores=False),
}
NEVER = tuple(  # rows that the plan gives to other kernels
    (name, "fp64")
    for name in (
        *("flat", "wide flat", "widest", "flat mixture", "wide flat mixture", "wide strided mixture", "mixture, sectors"),
        *("hessian", "hessian, mixture"),
    )
)
NO_LOGITS = ("long_finish", "mixture, long_finish", "total", "divisors")
SECOND = ("other_ptr", "other_sample_ptr")  # where a row has two labels
POINTERS = {
    "target_ptr": "*i64",
    "other_ptr": "*i64",
    "counter_ptr": "*i32",
    "z_ptr": "*Z",
    "g_ptr": "*Z",
    "v_ptr": "*Z",
}  # the others: the dtype of the arithmetic
DOUBLES = ("smoothing", "diversity_weight", "z_loss")


def compile_case(name: str, dtype: str, diversity: int, architecture: int | str) -> Any:
    """The kernel with every run-time stride that the host could pass."""
    case = CASES[name]
    k, s = case.classes, case.class_stride
    p: Any = plan(4096, k, s, [k * s], BYTES[dtype], True, 132, case.gradient, case.kept, labels=2 if case.form == "mixture" else 1)
    if case.form == "probabilities":
        p = soft_plan(4096, k, [s], [[k * s]], BYTES[dtype], 132, diversity)
    elif case.kernel is triton_hessian.hessian:
        p = hessian_plan(4096, k, s == 1, BYTES[dtype], 132, 2 if case.form == "mixture" else 1)
    absent = case.absent + (() if case.form == "mixture" else SECOND)
    arithmetic = "fp64" if dtype == "fp64" else "fp32"
    constants: dict[str, Any] = {
        "KIND": diversity, "SMOOTH": False, "Z_LOSS": False, "REDUCTION": 1, "DIMS": 1, "SAME": True, "WIDE": False, "RESCALE": False,
        "UPSTREAM_ROWS": False, "SHARES": 1, "COPIES": max(1, 32 * p.warps // p.r), "K": k, "A": p.a, "R": p.r, "B": p.b, "L": p.b,
        "SPLITS": 1, "V": getattr(p, "vector", 1), "TILE": chunks_at_a_time(BYTES[dtype]), "BLOCK": 32,
    }  # fmt: skip
    if case.kernel is triton_hessian.hessian:
        constants["P"] = p.run
    elif case.form != "probabilities":
        constants |= {"P": p.run, "ACCESS": p.access, "START": p.start, "ALIGN": p.align}
    if name in NO_LOGITS:
        constants |= {"R": 256 if case.form == "mixture" else 512, "BLOCK": 1024}
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(case.kernel.params):
        argument = parameter.name
        if parameter.is_constexpr or argument in absent or (argument in ("sc", "tc", "uc") and s == 1):
            signature[argument], values[argument] = "constexpr", constants.get(argument, 1 if argument in ("sc", "tc", "uc") else None)
        elif argument.endswith("_ptr"):
            signature[argument] = POINTERS.get(argument, f"*{arithmetic}").replace("Z", dtype)
            if argument == "target_ptr" and case.form == "probabilities":
                signature[argument] = f"*{arithmetic}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp64" if argument in DOUBLES else "i32"
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=values, attrs=attributes)
    target = GPUTarget("hip", architecture, 64) if isinstance(architecture, str) else GPUTarget("cuda", architecture, 32)
    options = {"num_warps": 4} if name in NO_LOGITS else {"num_warps": p.warps, "maxnreg": p.registers}
    return triton.compile(source, target=target, options=options)


def cuobjdump(compiled: Any, tmp_path: Path, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    return subprocess.run([tool, flag, binary], capture_output=True, text=True, check=True).stdout


def check(name: str, dtype: str, diversity: int, architecture: int | str, tmp_path: Path) -> None:
    compiled = compile_case(name, dtype, diversity, architecture)
    if isinstance(architecture, str):
        assert compiled.asm["hsaco"]
        return
    usage = cuobjdump(compiled, tmp_path, "-res-usage")
    (stack,), (local,) = re.findall(r"STACK:(\d+)", usage), re.findall(r"LOCAL:(\d+)", usage)
    assert (stack, local) == ("0", "0"), usage
    ptx = compiled.asm["ptx"]
    if CASES[name].loads:
        assert "ld.global.v4.b32" in ptx or "ld.global.v2.b64" in ptx, "no 16-byte load"
    if CASES[name].stores:
        assert "st.global.v4.b32" in ptx or "st.global.v2.b64" in ptx, "no 16-byte store"


def rotation() -> list[tuple[str, str, int, int | str]]:
    """Every kernel with every dtype, every penalty and every architecture, two by two."""
    kinds = range(len(ops.DIVERSITIES))
    product = list(itertools.product(CASES, BYTES, kinds, ARCHITECTURES))
    if EVERY:
        return [p for p in product if p[:2] not in NEVER]
    some = []
    for i, name in enumerate(CASES):
        for j in range(len(kinds) if name not in NO_LOGITS else 1):
            dtype = list(BYTES)[(i + j) % len(BYTES)]
            if (name, dtype) in NEVER:
                continue
            some.append((name, dtype, 1 if name in NO_LOGITS else j, ARCHITECTURES[(i + j) % len(ARCHITECTURES)]))
    return some


@pytest.mark.parametrize(("name", "dtype", "diversity", "architecture"), rotation())
def test_compiles_without_spills(name: str, dtype: str, diversity: int, architecture: int | str, tmp_path: Path) -> None:
    check(name, dtype, diversity, architecture, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES[:4])
@pytest.mark.parametrize("name", ["widest", "sectors", "half sectors", "edges"])
def test_the_widest_rows_do_not_spill(name: str, architecture: int, tmp_path: Path) -> None:
    """bf16 with the default penalty: most registers a thread."""
    check(name, "bf16", 1, architecture, tmp_path)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.loads])
def test_sass_has_16_byte_accesses(name: str, tmp_path: Path) -> None:
    sass = cuobjdump(compile_case(name, "bf16", 1, 80), tmp_path, "-sass")
    assert re.search(r"LDG\.E\S*\.128", sass) and (not CASES[name].stores or re.search(r"STG\.E\S*\.128", sass))
