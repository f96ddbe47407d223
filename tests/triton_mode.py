"""How this process can run Triton kernels on CPU tensors: interpreted, or compiled and executed in ptxsim, or not at all."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def simulator() -> Any:
    """ptxsim as Triton's device; skips the test where it is not there. ``launches`` of the result tells what ran."""
    pytest.importorskip("triton")
    folder = os.environ.get("PTXSIM")
    if not folder or INTERPRETED:
        pytest.skip("the environment variable PTXSIM does not name a folder with ptxsim" if not folder else "interpreted")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import tritonsim  # type: ignore[import-not-found]

    return tritonsim.install(80)


def device() -> Any:
    """The interpreter (None) or the simulator."""
    pytest.importorskip("triton")
    return None if INTERPRETED else simulator()


# the interpreter cuts a float32 down to bfloat16 where compiled code rounds it
ULPS = 1.0 if INTERPRETED else 0.5
