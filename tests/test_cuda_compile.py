"""The CUDA kernels compile for every architecture without spills, stack or warnings. Evidence: compiled (ptxas, nvdisasm).

A run takes two dtypes for sm_80, from the PTX that the simulator executes, since all of it takes ten minutes and more; all of it is

    FASTSOFTLOSS_CUDA_ARCHITECTURES="80 86 89 90 100 120" FASTSOFTLOSS_TEST_DTYPES="bfloat16 float16 float32 float64" \\
        pytest tests/test_cuda_compile.py

which fails for mixtures in float32 on sm_100: the resident kernel with a gradient and all moments spills 4 bytes there. Of
mixtures these have been compiled: every dtype for sm_80, bfloat16 for sm_90 and sm_120, float32 for sm_100, float64 for sm_90.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import cuda_mode
import pytest

ARCHITECTURES = os.environ.get("FASTSOFTLOSS_CUDA_ARCHITECTURES", "80").split()
DTYPES = os.environ.get("FASTSOFTLOSS_TEST_DTYPES", "bfloat16 float64").split()
# Registers a thread: 64 leaves half of a multiprocessor's 64 warps their place. A double takes two, and its rows go the plain way.
# A mixture's second label takes a quarter more, and a half more where a row goes the plain way.
STREAMING = ("reduce", "spread", "careful_rows", "merge_parts", "total", "divisors", "outside")


def kernels(log: str) -> dict[str, tuple[int, int, int]]:
    """Mangled name: (registers, bytes of stack, bytes spilled), from what ptxas -v says."""
    found = {}
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'(\w+)'", part)
        stack, spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", part).groups()  # type: ignore[union-attr]
        registers = re.search(r"Used (\d+) registers", part)
        found[name[1]] = int(registers[1]), int(stack), int(spilled)  # type: ignore[index]
    return found


def nvdisasm() -> str | None:
    try:
        import triton

        own = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    except ImportError:
        return shutil.which("nvdisasm")
    return str(own) if own.exists() else shutil.which("nvdisasm")


def check_registers(source: str, architecture: str, cubin: Path) -> None:
    if architecture == "80":
        command = [cuda_mode.tool("ptxas"), "-O3", "-arch=sm_80", "-v", str(cuda_mode.built().parent / f"{source}.ptx"), "-o", str(cubin)]
    else:
        flags = [*cuda_mode.NVCC_FLAGS, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
        command = [cuda_mode.tool("nvcc"), *flags, str(cuda_mode.ROOT / f"csrc/cuda/{source}.cu"), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0 and "warning" not in log, log[-4000:]
    found = kernels(log)
    assert found
    for name, (registers, stack, spilled) in found.items():
        assert (stack, spilled) == (0, 0), name
        streaming = 128 if source == "float64" else 64
        if re.search(r"Lb1E[fd]?EEv", name):  # the last of the kernel's arguments that is a bool: two labels a row
            streaming = streaming * 8 // 5 if "careful" in name else streaming * 5 // 4
        assert registers <= (streaming if any(kind in name for kind in STREAMING) else 255), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_look_for_labels_out_of_range_compiles_clean(architecture: str, tmp_path: Path) -> None:
    check_registers("outside", architecture, tmp_path / "outside.cubin")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_clean(dtype: str, architecture: str, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    check_registers(dtype, architecture, cubin)
    disassembler = nvdisasm()
    if disassembler is None or dtype == "float64":  # whose rows go a logit at a time
        return
    sass = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    seen = set()
    for part in re.split(r"\n\.text\.", sass)[1:]:
        name = part.split(":")[0]
        loads, stores = re.search(r"LDG\.E\S*\.128", part), re.search(r"STG\.E\S*\.128", part)
        staged = re.search(r"4tileI.*ELb1ELb[01]ELb[01]EEEv", name)  # through shared memory, logits and gradient
        writes = staged or "spread" in name or re.search(r"8residentI.*ELb1ELb[01]EEEv", name)
        if staged or any(kind in name for kind in ("reduce", "spread", "resident")):
            assert loads and (stores or not writes), name
            seen.add(next(kind for kind in ("tile", "reduce", "spread", "resident") if kind in name))
    assert seen == {"tile", "reduce", "spread", "resident"}
