"""Builds the C++ kernels where there is a compiler; without one the package still installs, as plain PyTorch."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


def extensions() -> list[Extension]:
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        print("fastsoftloss: torch is not there at build time, so the C++ kernels are left out (see the README)", file=sys.stderr)
        return []
    return [
        Extension(
            "fastsoftloss._C",
            sources=["csrc/ops_cpu.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            extra_compile_args=[*FLAGS, TARGET_TORCH],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            optional=True,  # a failed build is a warning, and `python -m fastsoftloss` says why later
        )
    ]


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


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
