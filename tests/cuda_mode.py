"""The CUDA backend on tensors of the CPU: csrc/ops_cuda.cpp and the launchers as they are, over a runtime whose launches execute
the compiled PTX in ptxsim. What runs is the product's host code and the product's kernels; evidence: simulated."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsoftloss import backends, ops

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
WRAPPED = ("torch_get_const_data_ptr", "torch_get_mutable_data_ptr")


def tool(name: str) -> str:
    """Of the CUDA toolkit."""
    own = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / name
    found = shutil.which(name) or (str(own) if own.exists() else None)
    if not found:
        pytest.skip(f"there is no {name}")
    return found


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def build(folder: Path) -> Path:
    """The library, and the PTX of its kernels beside it."""
    compiler, home = tool("nvcc"), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    package = Path(torch.__file__).parent
    includes = [package / "include", package / "include/torch/csrc/api/include", sysconfig.get_paths()["include"], home / "include"]
    host = ["-std=c++17", "-O1", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000", *[f"-I{path}" for path in includes]]

    def compile_one(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        if source.suffix == ".cu":
            kept = folder / source.stem
            kept.mkdir()
            # PTX alone: what a GPU would make of it is for test_cuda_compile.py
            said = run(
                compiler, *NVCC_FLAGS, "-gencode", "arch=compute_80,code=compute_80", "--keep", "--keep-dir", kept, "-c", source, "-o", to
            )
            assert "warning" not in said, said
            shutil.move(kept / f"{source.stem}.ptx", folder)
            shutil.rmtree(kept)
        else:
            run("g++", *host, "-DFSL_DISPATCH_KEY=CPU", "-c", source, "-o", to)
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [ROOT / "tests/cuda_hooks.cpp", ROOT / "csrc/ops_cuda.cpp", *SOURCES]))
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    library = folder / "simulated.so"
    libraries = [f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-L{home / 'lib64'}", "-lcudart"]
    run("g++", "-shared", "-o", library, *objects, *wraps, *libraries)
    return library


def built() -> Path:
    """Built once for the sources as they are."""
    digest = hashlib.sha256(torch.__version__.encode())
    files = [*(ROOT / "csrc").glob("*.*"), *(ROOT / "csrc/cuda").glob("*.*"), Path(__file__), ROOT / "tests/cuda_hooks.cpp"]
    for path in sorted(files):
        digest.update(path.read_bytes())
    cache = Path(os.environ.get("FASTSOFTLOSS_TEST_CACHE", tempfile.gettempdir())) / f"fastsoftloss-{digest.hexdigest()[:16]}"
    cache.mkdir(exist_ok=True)
    with open(cache / "lock", "w") as lock:  # other processes of the same run wait for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / "simulated.so").exists():
            with tempfile.TemporaryDirectory() as folder:
                build(Path(folder))
                shutil.copytree(folder, cache, dirs_exist_ok=True)
    return cache / "simulated.so"


def simulator_folder() -> str:
    folder = os.environ.get("PTXSIM")
    if not folder:
        pytest.skip("the environment variable PTXSIM does not name a folder with ptxsim")
    return folder


@functools.cache
def simulator() -> Any:
    """cudasim with the library in it, and the backend "cuda" serving the CPU; skips where ptxsim or nvcc is not there.

    ``launches`` tells what ran: [(kernel, grid, block, shared, stats)].
    """
    folder = simulator_folder()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    library = built()
    import cudasim  # type: ignore[import-not-found]
    import ptxsim  # type: ignore[import-not-found]

    entry = re.compile(r"^\.visible \.entry (\w+)\(.*?^}\n", re.M | re.S)

    class Simulator(cudasim.CudaSim):  # type: ignore[misc]
        """The memory is what the host code asked for, rather than what a test names."""

        def _launch(self, name, grid, block, args, smem):  # type: ignore[no-untyped-def]
            self.buffers, i, at = [], 0, ctypes.c_void_p()
            self.lib.fsl_touched.restype = ctypes.c_int64
            while size := self.lib.fsl_touched(ctypes.c_int64(i), ctypes.byref(at)):
                self.buffers.append(np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_uint8)), (size,)))
                i += 1
            self.error = None
            if name.decode() not in parsed:  # a kernel at a time: all of them take half a minute to parse
                parsed.add(name.decode())
                rest, own = kernels[name.decode()]
                self.modules.append(ptxsim.Module(rest + own))
                assert self.modules[-1].coverage() == []
            failed = super()._launch(name, grid, block, args, smem)
            if self.error:
                print(self.error, file=sys.stderr)
            elif self.launches[-1][-1]["races"]:
                print(name, self.launches[-1][-1]["races"][:3], file=sys.stderr)
                return 1
            return failed

    parsed: set[str] = set()
    kernels = {}
    for path in library.parent.glob("*.ptx"):
        text = path.read_text()
        rest = entry.sub("", text)
        kernels |= {match[1]: (rest, match[0]) for match in entry.finditer(text)}
    sim = Simulator(str(library), [])
    backends.devices["cuda"] = ("cuda", "cpu")
    backends.enable_cuda()
    # the second derivative is Triton's, which has a simulator of its own: with CUDA's it is plain PyTorch's
    twice, kernel = ops.Operators.twice, backends._ready["cuda"].double_backward
    ops.Operators.twice = lambda self, *inputs: self.double_backward is not kernel and twice(self, *inputs)  # type: ignore[method-assign]
    return sim
