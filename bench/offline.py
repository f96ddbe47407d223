"""GPU kernels on a machine without a GPU: Triton compiles them for sm_80, and what each launch is made of and costs is kept.

``record()`` makes this process's Triton take CPU tensors. Where the environment variable PTXSIM names a folder with the simulator
ptxsim, launches are executed there (the PTX, thread by thread); elsewhere they are compiled and no more. Registers, spills and shared
memory come from ``cuobjdump``; traffic and instructions are *simulated*; shares of a GPU's limit are a *model*. Nothing here is a time.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

CAPABILITY = 80
GPUS = ("A100", "H100", "B200")


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    threads: int
    shared: int
    registers: int
    spilled: int  # bytes of local memory and stack a thread
    ptx: str
    stats: dict[str, Any] | None  # ptxsim's; None where nothing was executed


def resources(cubin: Path) -> dict[str, tuple[int, int]]:
    """Kernel -> (registers, bytes of stack and local memory) a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return {name: (int(registers), int(stack) + int(local)) for name, registers, stack, local in found}


def resources_of_cubins(sources: Sequence[Path], nvcc: str, flags: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The same of all kernels in CUDA sources; compiled once for the sources as they are."""
    texts = b"".join(path.read_bytes() for path in sorted(sources[0].parents[1].rglob("*.*h")) + list(sources))
    folder = Path(tempfile.gettempdir()) / f"fastsoftloss-cubins-{hashlib.sha256(texts).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)

    def compiled(source: Path) -> Path:
        cubin = folder / f"{source.stem}.cubin"
        if not cubin.exists():
            half = cubin.with_suffix(".half")
            subprocess.run([nvcc, *flags, f"-arch=sm_{CAPABILITY}", "-cubin", source, "-o", half], check=True)
            half.rename(cubin)
        return cubin

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = list(pool.map(compiled, sources))
    return {name: used for cubin in cubins for name, used in resources(cubin).items()}


def simulated() -> bool:
    return bool(os.environ.get("PTXSIM"))


def _simulator() -> Any:
    sys.path.insert(0, os.environ["PTXSIM"])
    return importlib.import_module("tritonsim")


def _compile_only() -> Any:
    """What tritonsim would install, with a launcher that does nothing."""
    import triton
    from triton.backends.compiler import GPUTarget

    properties = {"max_shared_mem": 166912, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", CAPABILITY, 32),
            get_current_device=lambda: 0,
            set_current_device=lambda device: None,
            get_current_stream=lambda device=None: 0,
            get_device_capability=lambda device=None: divmod(CAPABILITY, 10),
            get_active_torch_device=lambda: torch.device("cpu"),
            get_benchmarker=lambda: lambda run, *args, **options: (run(), 1.0)[1],
            is_active=lambda: True,
            map_python_to_cpp_type=lambda name: "CUdeviceptr" if name[0] == "*" else name,
            utils=SimpleNamespace(get_device_properties=lambda device: properties, load_binary=lambda *args: (1, 1, 0, 0, 1024)),
        )
    )
    return SimpleNamespace(launches=[])


def record() -> list[Launch]:
    """From now on every Triton launch of this process is appended to the list that this returns. Call it once."""
    import triton
    from triton.runtime.cache import get_cache_manager

    if simulated():
        tritonsim = _simulator()
        sim = tritonsim.install(CAPABILITY)
        base = tritonsim._Launcher
    else:
        sim = _compile_only()
        base = type("Nothing", (), {"__init__": lambda self, src, metadata: None, "__call__": lambda self, *args: None})
    kept: list[Launch] = []

    class Recorder(base):  # type: ignore[misc, valid-type]
        def __init__(self, src: Any, metadata: Any) -> None:
            super().__init__(src, metadata)
            files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json") or {}
            self.compiled, self.text = metadata, Path(files[f"{metadata.name}.ptx"]).read_text()
            (self.resources,) = resources(Path(files[f"{metadata.name}.cubin"])).values()

        def __call__(self, gx: int, gy: int, gz: int, *args: Any) -> None:
            super().__call__(gx, gy, gz, *args)
            stats = sim.launches.pop()[-1] if simulated() else None
            threads = 32 * self.compiled.num_warps
            kept.append(Launch(self.compiled.name, (gx, gy, gz), threads, self.compiled.shared, *self.resources, self.text, stats))

    triton.runtime.driver.active.launcher_cls = Recorder
    return kept


# ---------------------------------------------------------------- what launches cost


def bytes_moved(launch: Launch) -> int:
    """In 32-byte sectors, as DRAM is read and written; every read is taken to miss the caches."""
    return sum(way["sector_bytes"] for argument in launch.stats["traffic"].values() for way in argument.values()) if launch.stats else 0


def widths(launch: Launch, way: str) -> str:
    """Bytes an access, in most of the bytes that the kernel reads or writes; without a simulation the widest in its PTX."""
    if launch.stats is None:
        op = {"read": "ld", "written": "st"}[way]
        found = re.findall(rf"{op}\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)\b", launch.ptx)
        return f"<= {max(int(n or 1) * int(bits) // 8 for n, bits in found)}" if found else "-"
    by_width: dict[int, int] = {}
    for argument in launch.stats["traffic"].values():
        for width, count in argument.get(way, {}).get("accesses", {}).items():
            by_width[width] = by_width.get(width, 0) + width * count
    total = sum(by_width.values())
    if not total:
        return "-"
    width = max(by_width, key=by_width.__getitem__)
    share = by_width[width] / total
    return f"{width}" if share > 0.95 else f"{width} ({share:.0%})"


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def columns(launches: list[Launch], elements: int, minimum: int) -> dict[str, Any]:
    """The table's columns for one call. Those of a kernel are of the launch that moves the most, spills are the worst."""
    main = max(launches, key=lambda launch: (bytes_moved(launch), len(launch.ptx)))
    result: dict[str, Any] = {
        "launches": len(launches),
        "kernel": main.kernel,
        "threads": main.threads,
        "registers": main.registers,
        "spilled": max(launch.spilled for launch in launches),
        "shared": main.shared,
        "load": widths(main, "read"),
        "store": widths(main, "written"),
    }
    if main.stats is None:
        return result
    roofline = importlib.import_module("roofline")
    reports = {gpu: [roofline.report(launch.stats, elements, minimum, gpu) for launch in launches] for gpu in GPUS}
    parts = reports[GPUS[0]]
    result |= {
        "bytes_over_minimum": _short(sum(map(bytes_moved, launches)) / minimum),
        "instructions": _short(sum(part["instructions_per_element"] for part in parts)),
        "special": _short(sum(part["special_per_element"] for part in parts)),
    }
    for gpu, each in reports.items():
        seconds = [max(report["floors_us"].values()) / 1e6 for report in each]
        longest = each[seconds.index(max(seconds))]
        result[gpu] = {"share": _short(minimum / roofline.GPUS[gpu][0] / sum(seconds)), "limiter": longest["limiter"]}
    return result


def load_module(source: str, folder: Path | None = None) -> Any:
    """A Python module from text; on disk, since Triton reads its kernels' source there."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=folder, delete=False) as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location(Path(file.name).stem, file.name)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module
