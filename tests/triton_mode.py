"""How this process can run Triton kernels on CPU tensors: interpreted, or compiled and executed in ptxsim, or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIMULATED = os.environ.get("FASTSOFTLOSS_TEST_BACKEND") == "triton"  # the tests of every backend, of Triton behind the simulator
EVERY = os.environ.get("FASTSOFTLOSS_TEST_EVERY") == "1"  # more of the same: half an hour instead of a minute


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


@contextlib.contextmanager
def copies_may_differ(**options: Any) -> Iterator[None]:
    """Run the simulator with ``options`` and no race check: it calls a race what lanes write to one place if that is not the same."""
    sim = device()
    if sim is None:
        yield
        return
    before = dict(sim.options)
    sim.options |= options | {"racecheck": False}
    try:
        yield
    finally:
        sim.options.clear()
        sim.options |= before
