"""Promise: bad input is a clear error before anything runs, and odd input is what PyTorch makes of it.

The operators themselves, called past the checks of functional.py, raise and never read where they should not.
"""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS, DIVERSITIES, compute, named
from torch import Tensor

from fastsoftloss import Loss, backends, functional

LOGITS, TARGET = torch.randn(3, 5), torch.tensor([0, 4, 2])
INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(logits=torch.tensor(1.0), target=torch.tensor(0)), ValueError, "logits must have a class dimension"),
        (dict(target=TARGET[:2]), ValueError, r"target must have shape \(3,\) for logits of shape \(3, 5\), got \(2,\)"),
        (dict(target=TARGET[:, None]), ValueError, r"target must have shape \(3,\)"),
        (dict(target=TARGET.expand(2, 3)), ValueError, r"target must have shape \(3,\)"),  # as a mixture is packed
        (dict(target=TARGET.expand(2, 3), backend="cpu"), ValueError, r"target must have shape \(3,\)"),
        (dict(logits=LOGITS[0]), ValueError, r"target must have shape \(\) for logits of shape \(5,\)"),
        (dict(logits=torch.randn(3, 5, 2)), ValueError, r"target must have shape \(3, 2\)"),
        (dict(logits=LOGITS.long()), TypeError, "logits must be float32, float64, bfloat16 or float16, got torch.int64"),
        (dict(logits=LOGITS.cfloat()), TypeError, "logits must be float32"),
        (dict(logits=LOGITS.to(torch.float8_e4m3fn)), TypeError, "logits must be float32"),
        (dict(target=TARGET.bool()), TypeError, "target must be class indices of int64 or int32, got torch.bool"),
        (dict(target=TARGET.to("meta")), ValueError, "target must be on the device of logits, cpu, got meta"),
        (dict(logits=LOGITS.to("meta")), ValueError, "target must be on the device of logits, meta, got cpu"),
        (dict(weight=torch.ones(4)), ValueError, r"weight must have shape \(5,\), one for each class, got \(4,\)"),
        (dict(weight=torch.ones(1, 5)), ValueError, r"weight must have shape \(5,\)"),
        (dict(weight=torch.ones(5).long()), TypeError, "weight must be a floating-point tensor, got torch.int64"),
        (dict(weight=torch.ones(5, device="meta")), ValueError, "weight must be on the device of logits"),
        (dict(sample_weight=torch.ones(5)), ValueError, r"sample_weight must have the shape of target, \(3,\), got \(5,\)"),
        (dict(sample_weight=torch.ones(())), ValueError, "sample_weight must have the shape of target"),
        (dict(sample_weight=torch.ones(3).int()), TypeError, "sample_weight must be a floating-point tensor"),
        (dict(sample_weight=torch.ones(3, device="meta")), ValueError, "sample_weight must be on the device of logits"),
        (dict(reduction="avg"), ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
        (dict(reduction=None), ValueError, "reduction must be one of"),
        (dict(diversity="entropy"), ValueError, "diversity must be None or one of 'logit_variance', .*, got 'entropy'"),
        (dict(diversity_weight=NAN), ValueError, "diversity_weight must be finite, got nan"),
        (dict(z_loss=INF), ValueError, "z_loss must be finite, got inf"),
        (dict(ignore_index=2**63), ValueError, "ignore_index must fit into 64 bits, got 9223372036854775808"),
        (dict(target=(TARGET, TARGET, 10**400)), ValueError, r"target\[2\], the weight of target\[0\], must be between 0 and 1"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        (dict(label_smoothing=-0.1), ValueError, "label_smoothing must be between 0 and 1"),
        (dict(label_smoothing=NAN), ValueError, "label_smoothing must be between 0 and 1, got nan"),
        (dict(backend="gpu"), ValueError, "backend must be None or one of 'cpu', 'cuda', 'triton', 'reference', got 'gpu'"),
    ],
)
def test_a_clear_error(arguments, error, message):
    with pytest.raises(error, match=message):
        functional.cross_entropy(**dict(logits=LOGITS, target=TARGET) | arguments)


def test_the_module_checks_its_options_when_it_is_made():
    for options in (dict(reduction="avg"), dict(diversity="entropy"), dict(label_smoothing=2.0), dict(z_loss=NAN)):
        with pytest.raises(ValueError):
            Loss(**options)


@pytest.mark.parametrize("bad", [-1, 5, -(2**31), 2**31 - 1, -(2**40), 2**40])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_target_out_of_range_names_the_row_and_its_value(backend, bad, requires_grad):
    for index in (torch.int64, torch.int32):
        if abs(bad) >= 2**31 and index is torch.int32:
            continue
        target = torch.tensor([0, -100, bad, 7], dtype=index)
        with pytest.raises(IndexError, match=re.escape(f"target[2] is {bad}, which is outside [0, 5) and is not ignore_index=-100")):
            functional.cross_entropy(torch.randn(4, 5, requires_grad=requires_grad), target, backend=backend)
    image = torch.zeros(2, 3, 4, dtype=torch.int64)
    image[1, 2, 3] = bad
    with pytest.raises(IndexError, match=re.escape(f"target[1, 2, 3] is {bad}")):
        functional.cross_entropy(torch.randn(2, 5, 3, 4, requires_grad=requires_grad), image, backend=backend)
    with pytest.raises(IndexError, match=re.escape(f"is {bad}, which is outside")):
        functional.cross_entropy(torch.randn(5, requires_grad=requires_grad), torch.tensor(bad), backend=backend)


def test_a_bad_target_is_found_in_every_block_and_thread(backend):
    for row in (0, 8191, 8192, 40000, 49999):  # 8192 rows are a block of the scan
        target = torch.zeros(50000, dtype=torch.int64)
        target[row] = target[-1] = 3
        with pytest.raises(IndexError, match=re.escape(f"target[{row}] is 3")):
            functional.cross_entropy(torch.zeros(50000, 3), target, backend=backend)


def operator(name: str, **changes):
    operators = backends.choose("cpu", torch.device("cpu"))
    arguments = dict(
        logits=LOGITS, target=TARGET, weight=None, sample_weight=None, ignore_index=-100, reduction=0,
        label_smoothing=0.0, diversity=1, diversity_weight=1.0, z_loss=0.0,
    )  # fmt: skip
    if name == "forward":
        return operators.forward(**arguments | dict(parts=True, gradient=True) | changes)
    return operators.backward(**dict(upstream=torch.ones(3), moments=torch.empty(0)) | arguments | changes)


MANY = torch.zeros([1] * 80)  # more dimensions than TensorIterator knows


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(logits=torch.tensor(1.0), target=torch.tensor(0)),
        dict(logits=torch.tensor(1.0)),
        dict(logits=LOGITS.long()),
        dict(logits=LOGITS.cfloat()),
        dict(logits=torch.randn(3, 5, 2)),
        dict(logits=MANY, target=MANY.long()),
        dict(logits=torch.randn((2,) * 12).permute(*range(11, -1, -1)), target=torch.zeros((2,) * 11).long()),
        dict(target=TARGET[:2]),
        dict(target=TARGET[:0]),
        dict(target=TARGET[:, None]),
        dict(target=torch.tensor(0)),
        dict(target=TARGET.float()),
        dict(target=TARGET.to(torch.uint8)),
        dict(target=torch.tensor([0, 5, 1])),
        dict(target=torch.tensor([0, -1, 1])),
        dict(weight=torch.ones(4)),
        dict(weight=torch.ones(5, 1)),
        dict(weight=torch.ones(5).double()),
        dict(weight=torch.ones(10)[::2]),
        dict(sample_weight=torch.ones(2)),
        dict(sample_weight=torch.ones(3, 1)),
        dict(sample_weight=torch.ones(3).double()),
        dict(sample_weight=torch.ones(3).half()),
        dict(reduction=3),
        dict(reduction=-1),
        dict(diversity=6),
        dict(diversity=-1),
    ],
    ids=named,
)  # fmt: skip
def test_the_operators_raise_and_never_crash(name, changes):
    if name == "backward" and "target" in changes and changes["target"].shape != TARGET.shape:
        changes = changes | dict(upstream=torch.ones(changes["target"].shape))
    with pytest.raises((RuntimeError, IndexError, NotImplementedError, ValueError)):
        operator(name, **changes)


@pytest.mark.parametrize("name", ["logits", "target", "weight", "sample_weight"])
def test_a_meta_tensor_gives_an_error_or_a_meta_tensor(name):
    tensors = dict(logits=LOGITS, target=TARGET, weight=torch.ones(5), sample_weight=torch.ones(3))
    for which in ("forward", "backward"):
        try:
            result = operator(which, **tensors | {name: tensors[name].to("meta")})
        except (RuntimeError, NotImplementedError):
            continue
        assert (result if which == "backward" else result[0]).is_meta


@pytest.mark.parametrize(
    "changes",
    [
        dict(upstream=torch.ones(2)),
        dict(upstream=torch.ones(())),
        dict(upstream=torch.ones(3).double()),
        dict(upstream=torch.ones(3), reduction=1),
        dict(upstream=torch.ones((), dtype=torch.float16), reduction=1),
    ],
    ids=named,
)
def test_the_backward_operator_checks_the_upstream_gradient(changes):
    with pytest.raises((RuntimeError, NotImplementedError)):
        operator("backward", **changes)


def test_many_dimensions_of_one():
    """More than PyTorch's iterators know: an answer or an error, and no write past an array."""
    logits = torch.zeros([1, 3, *[1] * 78])
    target = torch.zeros([1] * 79, dtype=torch.int64)
    for reduction in ("none", "mean"):
        try:
            loss = functional.cross_entropy(logits.clone().requires_grad_(), target, reduction=reduction, backend="cpu")
        except RuntimeError:
            continue
        assert torch.allclose(loss, torch.tensor(3.0).log())


def theirs(logits: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    z = logits.clone().requires_grad_()
    loss = F.cross_entropy(z, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@pytest.mark.parametrize("classes", [2, 3, 10, 257, 4200, 40000])  # one-class complement, tiles, row, parts, shared rows
@pytest.mark.parametrize("diversity", DIVERSITIES)
def test_nan_and_infinities_go_where_pytorch_lets_them(backend, classes, diversity):
    """In the true class (the last), in another, in all others, in all. PyTorch knows no penalty: where its loss is NaN so is
    ours, and where a -inf leaves it finite ours is too."""
    base, target = torch.randn(20, classes), torch.full((20,), classes - 1)
    rows = list(product([NAN, INF, -INF], ["label", "first", "last but one", "others", "all"]))
    for i, (value, where) in enumerate(rows):
        place = {"label": [-1], "first": [0], "last but one": [-2], "others": slice(0, -1), "all": slice(None)}[where]
        base[i, place] = value
    loss, gradient = theirs(base, target, reduction="none")
    got = compute(backend, base, target, reduction="none", diversity=diversity)
    assert torch.equal(got.loss.isnan(), loss.isnan()), [
        row for row, a, b in zip(rows, got.loss, loss, strict=False) if a.isnan() != b.isnan()
    ]
    assert torch.equal(got.loss.isinf(), loss.isinf())
    assert torch.equal(got.gradient.isnan(), gradient.isnan())
    assert got.gradient[15:].isfinite().all()  # a bad row leaves the others alone
    if diversity is None:
        torch.testing.assert_close(got.loss, loss, equal_nan=True)
        torch.testing.assert_close(got.gradient, gradient, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_masked_classes_and_label_smoothing(backend, reduction, smoothing, weighted):
    logits, target = torch.randn(4, 6), torch.tensor([0, 1, 2, -100])
    logits[0, 3] = logits[1, 5] = -INF
    options = dict(reduction=reduction, label_smoothing=smoothing, weight=torch.rand(6) + 0.1 if weighted else None)
    loss, gradient = theirs(logits, target, **options)
    got = compute(backend, logits, target, diversity=None, **options)
    torch.testing.assert_close(got.loss, loss)
    torch.testing.assert_close(got.gradient, gradient)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("diversity", [None, "logit_variance"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (0, 0), (0, 200), (0, 40000)])
def test_no_rows(backend, shape, diversity, reduction):
    logits, target = torch.zeros(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    loss, gradient = theirs(logits, target, reduction=reduction)
    got = compute(backend, logits, target, reduction=reduction, diversity=diversity)
    torch.testing.assert_close(got.loss, loss, equal_nan=True)
    assert got.gradient.shape == gradient.shape


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 0), (0,), (2, 0, 3)])
def test_no_classes(backend, shape, reduction):
    """Rows that are ignored are fine, as in PyTorch; any target is out of range."""
    logits = torch.zeros(shape)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.full(rows, -100)
    got = compute(backend, logits, target, reduction=reduction)
    if len(shape) < 3:  # PyTorch forgets the last dimension then
        torch.testing.assert_close(got.loss, theirs(logits, target, reduction=reduction)[0], equal_nan=True)
    assert got.gradient.shape == shape
    smoothed = compute(backend, logits, target, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(smoothed.loss, got.loss, equal_nan=True)  # PyTorch: NaN, of a share of no classes
    with pytest.raises(IndexError, match="is 0, which is outside"):
        functional.cross_entropy(logits, target * 0, backend=backend)


@pytest.mark.parametrize("diversity", [None, "logit_variance"])
@pytest.mark.parametrize("classes", [10, 200, 40000])  # tile, row, shared
def test_all_rows_ignored(backend, classes, diversity):
    """NaN for the mean, 0 for the rest, and a gradient of zero."""
    logits, target = torch.full((4, classes), NAN), torch.full((4,), -100)
    for reduction in ("mean", "sum", "none"):
        got = compute(backend, logits, target, reduction=reduction, diversity=diversity)
        assert got.loss.isnan() if reduction == "mean" else (got.loss == 0).all()
        assert torch.equal(got.gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("name", BACKENDS)
def test_class_weights_of_zero(name):
    """0 / 0 for the mean where they are all of it, as in PyTorch; else the row does not count."""
    logits, target = torch.randn(3, 4), torch.tensor([0, 0, 1])
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0])
    loss, gradient = theirs(logits, target, weight=weight)
    got = compute(name, logits, target, weight=weight, diversity=None)
    torch.testing.assert_close(got.loss, loss)
    torch.testing.assert_close(got.gradient, gradient)
    loss, gradient = theirs(logits, target * 0, weight=weight)
    got = compute(name, logits, target * 0, weight=weight, diversity=None)
    assert loss.isnan() and got.loss.isnan()


def test_a_target_that_was_nan_is_out_of_range() -> None:
    target = torch.tensor([0, -(2**63), 1])  # what a NaN label becomes as an integer
    with pytest.raises(IndexError, match=r"target\[1\]"):
        functional.cross_entropy(torch.randn(3, 4), target)


@pytest.mark.parametrize("name", ["label_smoothing", "diversity_weight", "z_loss", "ignore_index"])
def test_an_option_of_the_wrong_type_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        functional.cross_entropy(torch.randn(3, 4), torch.zeros(3, dtype=torch.long), **{name: None})
