"""Builds the C++ kernels where there is a compiler; without one the package still installs, as plain PyTorch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
TARGET_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
# One file an instruction set: flags for all would let the compiler use them where the machine has not been asked yet.
FLAGS_OF = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}


try:
    from pybind11.setup_helpers import ParallelCompile as side_by_side
except ImportError:
    from contextlib import nullcontext as side_by_side


EVERY_ARCHITECTURE = "80 86 89 90 100 120"
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def cuda_home() -> Path | None:
    """Where nvcc is, if there is one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home) / "bin/nvcc" if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if not found.exists():
        return None
    # a wrapper script elsewhere on the path is no toolkit
    return next((p for p in (found.resolve().parents[1], Path("/usr/local/cuda")) if (p / "include/cuda_runtime_api.h").exists()), None)


def wants_cuda() -> bool:
    """FASTSOFTLOSS_CUDA=1 builds where there is no GPU too, for one elsewhere; 0 never builds. Not set: where there is one."""
    import torch

    return os.environ.get("FASTSOFTLOSS_CUDA", str(int(torch.cuda.is_available()))) == "1" and cuda_home() is not None


def cuda_architectures() -> list[str]:
    """Machine code for these, and PTX of the last for what comes after them.

    FASTSOFTLOSS_CUDA_ARCHITECTURES is "all" or like "80 90"; if it is not set, those of the GPUs here, since each takes four
    minutes of a core. Where there is no GPU, all.
    """
    import torch

    asked = os.environ.get("FASTSOFTLOSS_CUDA_ARCHITECTURES", "").strip()
    if not asked and torch.cuda.is_available():
        return sorted({"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}, key=int)
    return (EVERY_ARCHITECTURE if asked in ("", "all") else asked).split()


def extensions() -> list[Extension]:
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        print("fastsoftloss: torch is not there at build time, so the C++ kernels are left out (see the README)", file=sys.stderr)
        return []
    kernels = [
        Extension(
            "fastsoftloss._C",
            sources=["csrc/ops_cpu.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
            depends=[str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.h")],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            extra_compile_args=[*FLAGS, TARGET_TORCH],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            optional=True,  # a failed build is a warning, and `python -m fastsoftloss` says why later
        ),
        autograd(),
    ]
    if wants_cuda():
        home = cuda_home()
        kernels.append(
            Extension(
                "fastsoftloss._C_cuda",
                sources=["csrc/ops_cuda.cpp"],  # the kernels are compiled by nvcc, below
                depends=[str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cu", ".cuh")],
                include_dirs=[*include_paths(), f"{home}/include"],
                library_dirs=[*library_paths(), f"{home}/lib64"],
                libraries=["torch", "torch_cpu", "c10", "cudart_static", "rt", "dl", "pthread"],
                extra_compile_args=[*FLAGS, TARGET_TORCH, "-DUSE_CUDA"],
                define_macros=[("Py_LIMITED_API", "0x030A0000")],
                py_limited_api=True,
                optional=True,
            )
        )
    return kernels


def autograd() -> Extension:
    """The eager call's node, for the torch and the Python that build it; fastsoftloss/backends.py looks for it by this name."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    name = "_autograd_" + re.sub(r"\W", "_", torch.__version__.partition("+")[0])
    return Extension(
        f"fastsoftloss.{name}",
        sources=["csrc/autograd.cpp"],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["torch", "torch_cpu", "torch_python", "c10"],
        extra_compile_args=[*FLAGS[1:], "-std=c++20"],  # as torch's own headers ask
        define_macros=[("FSL_MODULE", name)],
        optional=True,
    )


class BuildKernels(build_ext):
    """Adds the flags of an instruction set to the one file that may use it, and compiles files side by side."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, extra, pp_opts):  # type: ignore[no-untyped-def]
            own = FLAGS_OF.get(Path(src).name, []) if platform.machine() in ("x86_64", "AMD64") else []
            compile_one(obj, src, ext, cc_args, [*extra, *own], pp_opts)

        self.compiler._compile = compile_with_flags
        with side_by_side():
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_cuda"):
            folder = Path(self.build_temp)
            ext.extra_objects = [str(path) for path in compile_cuda(folder)]
            if not any((Path(path) / "libtorch_cuda.so").exists() for path in ext.library_dirs):
                ext.library_dirs.append(str(stub_torch_cuda(folder)))
            ext.libraries.append("torch_cuda")
        super().build_extension(ext)


def compile_cuda(folder: Path) -> list[Path]:
    """The kernels, a file a dtype; plain nvcc, since torch's CUDAExtension refuses under a torch without CUDA."""
    architectures = cuda_architectures()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        to = folder / f"{source.stem}_cuda_{'_'.join(architectures)}.o"
        newest = max(path.stat().st_mtime for path in Path("csrc").rglob("*.*"))
        if not to.exists() or to.stat().st_mtime < newest:
            command = [f"{cuda_home()}/bin/nvcc", *CUDA_FLAGS, *targets, "-c", str(source), "-o", str(to)]
            print(" ".join(command), flush=True)
            if subprocess.run(command, check=False).returncode:
                raise CompileError(f"nvcc failed on {source}")  # of an optional extension it becomes a warning
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, sorted(Path("csrc/cuda").glob("*.cu"))))


def stub_torch_cuda(folder: Path) -> Path:
    """A libtorch_cuda.so to link against where torch has none."""
    source = folder / "stub.c"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return 1; }\n")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(folder / "libtorch_cuda.so")], check=False).returncode:
        raise CompileError(f"{compiler} failed on {source}")
    return folder


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
