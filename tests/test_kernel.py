"""Promise: the kernel is the reference, for every shape, stride, dtype and option.

Properties drawn by hypothesis against float64 on the same logits; then invariances, the bits for every thread count and
run, and what the kernel must leave alone: the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DIVERSITIES, RELATIVE, assert_near, assert_true, compute
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_mode import EVERY, INTERPRETED, SIMULATED

from fastsoftloss import functional

CLASSES = [
    1,
    2,
    3,
    10,  # tile kernel, as MNIST has it
    16,
    255,
    256,  # the last of the tile kernel, where its classes fit one buffer
    257,  # the first of the row kernel; with a class stride, the tile kernel in two looks
    320,  # row kernel, whole blocks of 64
    1000,
    4096,  # one part
    4097,  # a second part of one class
]
LONG = [
    16384,  # float64: the last row that one thread does alone
    16385,
    32768,  # float32: the same
    32769,  # classes shared between threads
    140001,  # odd, many parts
]
ROWS = [1, 2, 15, 16, 17, 40]  # a tile is 16 rows in float32, 8 in float64

# How the rows (a shape that 60 elements can be cut into) and the classes lie in memory.
LAYOUTS = {
    "matrix": lambda new, b, k: new(b, k),
    "vector": lambda new, b, k: new(k),
    "vector, every other class": lambda new, b, k: new(2 * k)[::2],
    "transposed": lambda new, b, k: new(k, b).t(),
    "every other class": lambda new, b, k: new(b, 2 * k)[:, ::2],
    "every third row": lambda new, b, k: new(3 * b, k)[::3],
    "classes cut out": lambda new, b, k: new(b, k + 3)[:, 2:-1],  # rows at odd addresses
    "one row for all": lambda new, b, k: new(1, k).expand(b, k),
    "one column for all": lambda new, b, k: new(b, 1).expand(b, k),
    "images": lambda new, b, k: new(2, k, 3, b),
    "channels last": lambda new, b, k: new(2, k, 3, b).contiguous(memory_format=torch.channels_last),
    "cropped": lambda new, b, k: new(2, k, 4, b + 2)[..., 1:-1, 1:-1],
    "volume": lambda new, b, k: new(2, k, 2, 3, 2).permute(4, 1, 0, 3, 2),
    "lines": lambda new, b, k: new(b, 2, k).transpose(1, 2),  # (N, L, K) as a model gives it
}


def weights(kind: str | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """One positive value a row, in the memory layout ``kind``."""
    if kind is None:
        return None
    if kind == "same":
        return (torch.rand((), dtype=dtype) + 0.5).expand(shape)
    if kind == "step":
        return (torch.rand(*shape, 2, dtype=dtype) + 0.5)[..., 0]
    return torch.rand(shape, dtype=dtype) + 0.5


@dataclass
class Case:
    logits: Tensor
    target: Tensor
    options: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn, classes: list[int] = CLASSES, layouts: list[str] = list(LAYOUTS)) -> Case:  # noqa: B006
    torch.manual_seed(draw(st.integers(0, 2**31)))
    k, b = draw(st.sampled_from(classes)), draw(st.sampled_from(ROWS))
    if k > 1000:
        b = min(b, 3)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    scale, offset = draw(st.sampled_from([(1, 0), (10, 0), (1e-2, -60), (5, 1e4), (30, -1e3)]))
    layout = draw(st.sampled_from(layouts))
    logits = LAYOUTS[layout](lambda *shape: (scale * torch.randn(shape) + offset).to(dtype), b, k)
    rows = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
    target = torch.randint(k, (*rows, 2))
    ignore = draw(st.sampled_from([None, -100, 255, 0]))
    options: dict[str, Any] = {} if ignore is None else {"ignore_index": ignore}
    if ignore is not None:
        target[torch.rand(target.shape) < 0.3] = ignore
    index = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    if index is not torch.uint8 or (int(target.min()) >= 0 and int(target.max()) < 256):
        target = target.to(index)
    target = target[..., 0] if draw(st.booleans()) else target[..., 0].contiguous()

    masked = draw(st.sampled_from([0.0, 0.0, 0.2, 1.0]))  # -inf: some classes of some rows, or all of some rows
    own_memory = 0 not in logits.stride()
    if masked and own_memory:
        rows_hit = torch.rand(logits.shape[0]) < 0.5
        hit = rows_hit.view(-1, *[1] * (logits.dim() - 1)) if logits.dim() > 1 else rows_hit[:1]
        logits[hit & (torch.rand(logits.shape) < masked)] = -torch.inf
    if ignore is not None and own_memory and draw(st.booleans()):
        ignored = (target == ignore).unsqueeze(1) if logits.dim() > 1 else (target == ignore)
        logits[ignored.expand(logits.shape)] = torch.nan

    accumulated = torch.float64 if dtype is torch.float64 else torch.float32
    options["reduction"] = draw(st.sampled_from(["none", "mean", "sum"]))
    options["diversity"] = draw(st.sampled_from(DIVERSITIES))
    options["diversity_weight"] = draw(st.sampled_from([1.0, 0.3]))
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.0, 0.1, 1.0]))
    options["z_loss"] = draw(st.sampled_from([0.0, 0.0, 1e-2]))
    if draw(st.booleans()):
        options["weight"] = torch.rand(2 * k, dtype=accumulated)[::2] + 0.1
    layout_of_weights = st.sampled_from([None, "own", "same", "step"])
    options["sample_weight"] = weights(draw(layout_of_weights), rows, accumulated)
    options["upstream"] = weights(draw(layout_of_weights), rows if options["reduction"] == "none" else torch.Size(), accumulated)
    return Case(logits, target, options)


def check(case: Case, backend: str) -> None:
    before = case.logits.clone()
    got = compute(backend, case.logits, case.target, **case.options)
    assert torch.equal(case.logits.nan_to_num(nan=0.5), before.nan_to_num(nan=0.5)), "the logits were written to"
    assert_true(got, case.logits, case.target, **case.options)
    options = {name: value for name, value in case.options.items() if name != "upstream"}
    with torch.no_grad():  # the moments pass alone
        loss = functional.cross_entropy(case.logits, case.target, backend=backend, **options)
    if backend == "triton":  # summed in another order
        assert_true(got._replace(loss=loss), case.logits, case.target, **case.options)
    else:
        assert torch.equal(loss.nan_to_num(nan=0.5), got.loss.nan_to_num(nan=0.5)), "another loss where no gradient is wanted"


@settings(max_examples=400)
@given(case=cases())
def test_every_shape_stride_dtype_and_option(case):
    check(case, "cpu")


@settings(max_examples=40)
@given(case=cases(LONG, ["matrix", "vector", "transposed", "every other class", "classes cut out", "one row for all"]))
def test_long_rows(case):
    check(case, "cpu")


# The interpreter takes seconds for a long row, the simulator for each kernel that an example compiles.
OTHERS = [*CLASSES, 300, 20000] if SIMULATED else CLASSES[:8]
EXAMPLES = (200 if EVERY else 8) if SIMULATED else 20 if INTERPRETED else 60


@settings(max_examples=EXAMPLES)
@given(case=cases(OTHERS), backend=st.sampled_from([name for name in BACKENDS if name != "cpu"]))
def test_the_other_backends(case, backend):
    check(case, backend)


@pytest.mark.parametrize("classes", [10, 256, 257, 5000, 40000])  # tile, tile, row, two parts, shared between threads
@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_order_of_rows_is_nothing_and_that_of_classes_a_rounding(backend, classes, diversity, dtype):
    rows = 37 if classes < 1000 else 3
    logits, target = 4 * torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
    options = dict(reduction="none", diversity=diversity)
    got = compute(backend, logits, target, **options)
    order = torch.randperm(rows)
    moved = compute(backend, logits[order], target[order], **options)
    for a, b in zip(got, moved, strict=True):
        if backend == "cpu":  # each row alone makes its values, whichever lane it is in
            assert torch.equal(a[order], b)
    order = torch.randperm(classes)
    moved = compute(backend, logits[:, order], order.argsort()[target], **options)
    assert_true(moved._replace(gradient=moved.gradient[:, order.argsort()]), logits, target, **options)


def test_a_sample_weight_of_two_is_the_row_twice(backend):
    logits, target = 3 * torch.randn(9, 7), torch.randint(7, (9,))
    weight = torch.rand(7) + 0.1
    twice = torch.tensor([1, 2, 1, 1, 2, 2, 1, 1, 2])
    for reduction in ("mean", "sum"):
        options = dict(weight=weight, reduction=reduction, label_smoothing=0.1, z_loss=0.01)
        weighted = compute(backend, logits, target, sample_weight=twice.float(), **options)
        doubled = compute(backend, logits.repeat_interleave(twice, 0), target.repeat_interleave(twice), **options)
        index = torch.arange(9).repeat_interleave(twice)
        gradient = torch.zeros(9, 7).index_add_(0, index, doubled.gradient)
        bound = RELATIVE[torch.float32]
        assert_near(weighted.loss, doubled.loss, bound * doubled.loss.abs().numpy(), "loss")
        assert_near(weighted.diversity, doubled.diversity, bound * doubled.diversity.abs().numpy(), "diversity")
        assert_near(weighted.gradient, gradient, bound * gradient.abs().amax(1, keepdim=True).numpy(), "gradient")


@pytest.mark.parametrize(
    "shape",
    [
        (1000, 10),  # several blocks of tiles
        (70, 257),  # a block of the row kernel is 63 rows
        (300, 1000),
        (5, 40000),  # classes shared between threads
        (2, 140001),
        (20000, 3),  # several blocks of the scan over targets
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_bits_for_every_thread_count_and_every_run(shape, dtype):
    logits, target = 5 * torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1])
    target[::7] = -100
    for strides in (logits, logits.t().contiguous().t()):
        for reduction in ("mean", "none"):
            weight, sample_weight = torch.rand(shape[1]), torch.rand(shape[0])
            runs = []
            for threads in (1, 2, 3, 2):
                torch.set_num_threads(threads)
                runs.append(compute("cpu", strides, target, weight=weight, sample_weight=sample_weight, reduction=reduction))
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_strides_of_the_gradient_are_those_of_the_logits():
    """So that the backward before it reads and writes in step, as PyTorch's own loss has it."""
    for logits in (torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last), torch.randn(7, 4).t()):
        target = torch.randint(logits.shape[1], logits.shape[:1] + logits.shape[2:])
        assert compute("cpu", logits, target).gradient.stride() == logits.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_logit_is_read_and_written_right(dtype):
    """All 65536 of them, as logit (K = 2, so the loss shows it) and as gradient (the upstream gradient shows it)."""
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)
    logits = torch.stack([every, torch.zeros_like(every)], 1)
    target = torch.ones(len(every), dtype=torch.int64)
    loss = functional.cross_entropy(logits, target, reduction="none", diversity=None, backend="cpu")
    expected = functional.cross_entropy(logits.double(), target, reduction="none", diversity=None, backend="reference")
    assert_near(loss, expected, (RELATIVE[torch.float32] * expected.abs() + 1e-35).numpy())
    # at z = 0 and K = 2 the gradient is +-upstream/2, exact in float32: its storing is all that rounds
    values = torch.cat([every.float(), torch.nextafter(every.float(), torch.tensor(9e9)), every.float() * 1.001])
    values = values[~(values.isfinite() & (2 * values).isinf())]
    flat = torch.zeros(len(values), 2, dtype=dtype, requires_grad=True)
    rows = functional.cross_entropy(flat, torch.ones(len(values), dtype=torch.int64), reduction="none", diversity=None, backend="cpu")
    (gradient,) = torch.autograd.grad(rows, flat, 2 * values)
    assert torch.equal(gradient[:, 0].nan_to_num(nan=0.5), values.to(dtype).nan_to_num(nan=0.5))


@example(shape=(3, 5), dims=12)
@settings(max_examples=20)
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 6)), dims=st.integers(2, 12))
def test_many_dimensions(shape, dims):
    logits = torch.randn(*shape, *([1, 2] * dims)[: dims - 2])
    target = torch.randint(shape[1], logits.shape[:1] + logits.shape[2:])
    assert_true(compute("cpu", logits, target), logits, target)
