"""Promise: beside the gradient there is no tensor of rows x classes, and next to nothing is kept for the backward.

Measured: the process's own high-water mark over a forward and a backward, and what autograd is asked to keep.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsoftloss import functional

# Prints, for each case, (peak - before) / bytes of the gradient. malloc'ed buffers count as well as tensors.
MEASURE = """
import torch
from fastsoftloss import functional

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

shape, strided, dtype = {shape}, {strided}, torch.{dtype}
torch.set_num_threads(2)
logits = torch.empty(shape[::-1], dtype=dtype).normal_().t() if strided else torch.empty(shape, dtype=dtype).normal_()
target = torch.randint(shape[1], shape[:1])
small = torch.randn(64, 300, requires_grad=True)
functional.cross_entropy(small, target[:64] % 300).backward()  # whatever the first call loads
z = logits.requires_grad_({differentiate})
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts anew
before = status("VmRSS")
loss = functional.cross_entropy(z, target, {options})
if {differentiate}:
    (gradient,) = torch.autograd.grad(loss, z)
print((status("VmHWM") - before) / (logits.numel() * logits.element_size()))
"""

CASES = [
    ((800_000, 10), False),  # tile kernel
    ((8_000, 1000), False),  # row kernel
    ((8_000, 1000), True),  # the tile kernel in several looks, over a class stride: no copy of the logits
    ((80, 100_000), False),  # classes shared between threads
]

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is read from Linux's /proc")


def peak(shape: tuple[int, int], strided: bool, dtype: str, differentiate: bool, options: str = "") -> float:
    code = MEASURE.format(shape=shape, strided=strided, dtype=dtype, differentiate=differentiate, options=options)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("shape", "strided"), CASES)
def test_the_peak_is_the_gradient(shape, strided, dtype):
    """1 is the gradient; another tensor of its size, or a float32 copy of 16-bit logits, would be 1 or 2 more. The 0.25 is for
    the row sums (one in 16384 elements), the stacks of the threads and pages of 2 MB: 4 MB of 16."""
    assert peak(shape, strided, dtype, True) < 1.25


@linux
@pytest.mark.parametrize(("shape", "strided"), CASES)
def test_without_a_gradient_nothing_is_allocated(shape, strided):
    options = "return_components=False" if strided else "label_smoothing=0.1, z_loss=1e-3"
    assert peak(shape, strided, "float32", False, options) < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 10), (16, 1000), (2, 40000)])  # tile, row, classes shared between threads
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
    # the gradient that the forward wrote goes as soon as it is handed over
    assert set(vars(loss.grad_fn)) >= {"dlogits"} or dtype is torch.float16
    loss.backward(retain_graph=True)
    assert "dlogits" not in vars(loss.grad_fn)


def test_the_graph_goes_when_the_loss_goes():
    """No reference cycle holds a gradient of many megabytes until the garbage collector comes by."""
    import gc
    import weakref

    gc.disable()
    try:
        logits = torch.randn(64, 10, requires_grad=True)
        loss = functional.cross_entropy(logits, torch.randint(10, (64,)), backend="cpu")
        gradient = weakref.ref(loss.grad_fn.dlogits)
        del loss
        assert gradient() is None
    finally:
        gc.enable()
