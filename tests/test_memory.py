"""Promise: beside the gradient there is no tensor of rows x classes, and next to nothing is kept for the backward.

Measured: the process's own high-water mark over a forward and a backward, and what autograd is asked to keep.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsoftloss import functional

CASES = [
    ((800_000, 10), False),  # tile kernel
    ((8_000, 1000), False),  # row kernel
    ((8_000, 1000), True),  # the tile kernel in several looks, over a class stride: no copy of the logits
    ((80, 100_000), False),  # classes shared between threads
]

OPTIONS = [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "return_components": True}]

# Prints, for each line of input, (peak - before) / bytes of the logits. malloc'ed buffers count as well as tensors.
MEASURE = """
import sys
import torch
from fastsoftloss import functional

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

def measure(shape, strided, dtype, differentiate, options):
    logits = torch.empty(shape[::-1], dtype=dtype).normal_().t() if strided else torch.empty(shape, dtype=dtype).normal_()
    z, target = logits.requires_grad_(differentiate), torch.randint(shape[1], shape[:1])
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
    before = status("VmRSS")
    loss = functional.cross_entropy(z, target, **options)
    if differentiate:
        (gradient,) = torch.autograd.grad(loss, z)
    return (status("VmHWM") - before) / (logits.numel() * logits.element_size())

torch.set_num_threads(2)
measure((64, 300), False, torch.float32, True, {})  # whatever the first call loads
for line in sys.stdin:
    print(measure(*eval(line)))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    """A case as a line of text, and its peak."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark is read from Linux's /proc")
    lines = [f"{shape}, {strided}, torch.{dtype}, True, {{}}" for shape, strided in CASES for dtype in ("float32", "bfloat16", "float16")]
    lines += [f"{shape}, {strided}, torch.float32, False, {options}" for shape, strided in CASES for options in OPTIONS]
    # what is freed goes back at once, so that no case finds the memory of the one before it
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, "-c", MEASURE], input="\n".join(lines), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, map(float, done.stdout.split()), strict=True))


def test_the_peak_is_the_gradient(peaks):
    """1 is the gradient; another tensor of its size, or a float32 copy of 16-bit logits, would be 1 or 2 more. The 0.25 is for
    the row sums (one in 16384 elements), the stacks of the threads and pages of 2 MB: 4 MB of 16."""
    found = {case: peak for case, peak in peaks.items() if ", True, {" in case}
    assert len(found) == 3 * len(CASES) and all(0.9 < peak < 1.25 for peak in found.values()), found


def test_without_a_gradient_nothing_is_allocated(peaks):
    found = {case: peak for case, peak in peaks.items() if ", False, {" in case}
    assert len(found) == len(OPTIONS) * len(CASES) and max(found.values()) < 0.25, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 10), (16, 1000), (2, 40000)])  # tile, row, classes shared between threads
@pytest.mark.usefixtures("node")
def test_what_is_kept_for_the_backward(shape, dtype):
    """The inputs themselves, and at most six floats a row (none where the row fits on chip)."""
    logits = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(shape[1], shape[:1])
    sample_weight = torch.rand(shape[0], dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = functional.cross_entropy(logits, target, sample_weight=sample_weight, backend="cpu")
    inputs = {tensor.data_ptr() for tensor in (logits, target, sample_weight)}
    own = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert sum(tensor.numel() for tensor in own) <= (0 if shape[1] <= 1000 else 6 * shape[0])
    assert any(tensor.data_ptr() == logits.data_ptr() for tensor in saved)
    # the gradient that the forward wrote is kept no longer than until it is handed over
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert owners(gradient) == owners(torch.empty(1))


def owners(tensor: torch.Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


@pytest.mark.usefixtures("node")
def test_the_graph_goes_when_the_loss_goes():
    """No reference cycle holds a gradient of many megabytes until the garbage collector comes by."""
    import gc
    import weakref

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            kept.append(weakref.ref(self))

    kept: list[weakref.ref[Kept]] = []
    gc.disable()
    try:
        logits = torch.randn(64, 10, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            loss = functional.cross_entropy(logits, torch.randint(10, (64,)), backend="cpu")
        assert kept and all(one() is not None for one in kept)
        del loss
        assert all(one() is None for one in kept)
    finally:
        gc.enable()
