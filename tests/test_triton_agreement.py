"""The Triton kernels agree with the definition in float64.

Runs compiled (PTX executed in ptxsim; evidence: simulated) and, from test_triton_interpret.py, interpreted.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import DIVERSITIES, agree
from test_exactness import assert_promised, rows_at
from test_soft_targets import check as check_soft
from torch import Tensor
from triton_mode import INTERPRETED, copies_may_differ, device

from fastsoftloss import functional, ops
from fastsoftloss.triton_plan import fits

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# 2: no penalty; 10, 100: flat runs; 1000: aligned rows, two a program; 1003: no two rows aligned alike; 4096: two warps;
# 32000, 50257, 128256: rows that do not fit, aligned and not
CLASSES = (2, 10, 100, 1000, 1003, 4096, 32000, 50257, 128256)
ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "diversity_weight": 0.7}


@pytest.fixture(autouse=True)
def _device() -> None:
    device()


def batch(rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * classes + rows + seed)
    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=F64)).to(dtype)
    return logits, torch.randint(classes, (rows,), generator=generator)


def check(logits: Tensor, target: Tensor, weight: Tensor | None = None, **options: object) -> None:
    # rows that do not fit have one forward, whether a gradient is wanted or not
    alone = INTERPRETED and fits(logits.shape[min(1, logits.dim() - 1)], logits.element_size())
    agree("triton", logits, target, weight=weight, alone=alone, **options)


# each case costs the interpreter seconds where rows are long, and the simulator a compilation or three
# (float16 differs from bfloat16 by its conversions alone)
INTERPRETED_CASES = [(k, t) for k in CLASSES for t in (F32, BF16) if k <= 4096] + [(k, F16) for k in (10, 1003)]
SIMULATED_CASES = [(k, BF16) for k in (*CLASSES, 16384)] + [(k, t) for k in (10, 1003, 50257) for t in (F32, F16)]


@pytest.mark.parametrize(("classes", "dtype"), INTERPRETED_CASES if INTERPRETED else SIMULATED_CASES)
def test_classes_and_dtypes(classes: int, dtype: torch.dtype) -> None:
    # 16384: the widest rows that fit
    logits, target = batch(3 if classes > 256 else 100 if INTERPRETED else 300, classes, dtype)
    target[1] = -100
    check(logits, target)


@pytest.mark.parametrize(
    ("classes", "dtype", "diversity"),
    list(itertools.product((10,), (BF16,), DIVERSITIES))
    + list(itertools.product((1003,), (F32,), ("kl", "variance")))
    + list(itertools.product((20000,), (BF16,), ("chi2", "reverse_kl", "kl"))),  # one for each set of moments,
)
def test_every_penalty_with_every_option(diversity: str | None, classes: int, dtype: torch.dtype) -> None:
    rows = 5 if classes < 10_000 else 3
    logits, target = batch(rows, classes, dtype)
    target[1] = -100
    weight = torch.rand(classes) + 0.5
    check(logits, target, weight, diversity=diversity, upstream=2.0, sample_weight=torch.rand(rows), **ALL)


# 3: one lane a row; 40: several; 600: chunks, whose moments with a squared sum and without are all that differs there
@pytest.mark.parametrize(
    ("classes", "diversity"),
    [*itertools.product((3, 40), DIVERSITIES), (600, "logit_variance"), (600, "variance")] if INTERPRETED else [(40, "logit_variance")],
)
def test_float64(diversity: str | None, classes: int) -> None:
    logits, target = batch(4, classes, F64)
    check(logits, target, torch.rand(classes, dtype=F64), diversity=diversity, upstream=0.1, **ALL)


@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
# long rows are reduced by "mean" and by "none" in the tests below
@pytest.mark.parametrize("classes", [1, 2, 7, 300] if INTERPRETED else [7])
def test_reductions(reduction: str, classes: int) -> None:
    rows = 9
    logits, target = batch(rows, classes, F32)
    target[1] = -100
    check(logits, target, reduction=reduction)
    check(logits, target, reduction=reduction, upstream=torch.linspace(-1, 2, rows) if reduction == "none" else 3.0)


def layouts(classes: int) -> Iterator[tuple[str, Tensor]]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(classes)) * 3

    yield "one row", noise(classes)
    yield "column major", noise(classes, 6).t()
    yield "image", noise(2, classes, 2, 3)
    yield "channels last", noise(2, classes, 2, 3).to(memory_format=torch.channels_last)
    yield "crop", noise(3, classes, 6, 7)[1:, :, 1:4, 2:6]
    yield "volume crop", noise(2, classes, 4, 4, 4)[:, :, 1:3, 1:3, 1:3]
    yield "every other row", noise(8, classes)[::2]
    yield "every other class", noise(4, 2 * classes)[:, ::2]
    yield "class crop", noise(4, classes + 5)[:, 3 : classes + 3]
    yield "unaligned start", noise(4 * classes + 1)[1:].view(4, classes)
    yield "expanded", noise(1, classes).expand(4, classes)
    yield "five row dimensions, permuted", noise(2, 2, 3, classes, 2, 2).permute(5, 3, 1, 0, 4, 2)
    yield "five row dimensions, none of them joined", noise(3, classes, 3, 3, 3, 3)[1:, :, 1:, 1:, 1:, 1:]


@pytest.mark.parametrize(
    ("name", "classes"),
    [(name, k) for k in (5, 300) for name, _ in layouts(2) if k < 100 or "five" not in name]
    if INTERPRETED
    else [(name, 40) for name in ("column major", "volume crop", "class crop", "unaligned start")],
)
def test_strides(name: str, classes: int) -> None:
    logits = dict(layouts(classes))[name]
    rows = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(classes, rows, generator=generator, dtype=torch.int32)
    sample_weight = torch.rand((*rows, 2), generator=generator)[..., 0]
    check(logits, target, sample_weight=sample_weight, reduction="none", upstream=torch.rand(rows, generator=generator))
    if INTERPRETED and len(rows) > 1:
        check(logits, target.transpose(0, -1).contiguous().transpose(0, -1), torch.rand(classes), **ALL)


@pytest.mark.parametrize(
    ("classes", "diversity"),
    # 20003: splits of a row that is not aligned
    [(k, d) for k in (10, 1003, 20003) for d in (DIVERSITIES if INTERPRETED and k < 10000 else ("logit_variance",))],
)
def test_margins_and_offsets(diversity: str | None, classes: int) -> None:
    # what a margin does is done by finish, the same for all rows; a long one needs the ends alone
    margins = {10: [-80.0, -40.0, -20.0, -5.0, 0.0, 5.0, 20.0, 40.0, 80.0], 1003: [-80.0, -5.0, 20.0, 80.0], 20003: [-80.0, 80.0]}[classes]
    for offset in (0.0, 1e4, -1e4) if INTERPRETED and classes == 10 else (0.0, 1e4):
        logits, target = batch(len(margins), classes, F32)
        logits[torch.arange(len(margins)), target] = 0
        complement = logits.double().scatter(1, target[:, None], -torch.inf).logsumexp(1)
        logits[torch.arange(len(margins)), target] = (complement - torch.tensor(margins)).float()
        check(logits + offset, target, diversity=diversity, diversity_weight=0.0 if diversity is None else 1e-3, reduction="none")


@pytest.mark.parametrize("classes", [6, 1003, 20000])
def test_extreme_logits(classes: int) -> None:
    inf = torch.inf
    every: list[dict[str, object]] = [{}, {"diversity": "kl", "label_smoothing": 0.1}, {"diversity": "reverse_kl", "z_loss": 0.1}]
    for options in every if classes < 1000 or not INTERPRETED else every[1:2]:
        logits, target = batch(12, classes, F32)
        target[:] = 2
        logits[0, 0] = inf
        logits[1, 2] = inf
        logits[2, 1] = torch.nan
        logits[3, 2] = torch.nan
        logits[4, 3:] = -inf
        logits[5, 2] = -inf
        logits[6, :2] = logits[6, 3:] = -inf  # the true class alone
        logits[7, :3] = logits[7, 4:] = -inf  # the true class masked, one other
        logits[8] = torch.nan
        target[8] = -100
        logits[9] = -inf
        target[9] = -100
        logits[10, classes // 2 :] = 200.0
        if INTERPRETED and classes > 10_000:  # what finish does is the same for all: the rows whose splits are masked
            logits, target = logits[4:8], target[4:8]
        # a NaN's sign and payload are those of either operand in the simulator, and so not the same in all lanes of a long row
        with copies_may_differ() if classes > 10_000 else contextlib.nullcontext():
            check(logits, target, reduction="none", **options)


# a sum of NaN is NaN whatever the rows' length
@pytest.mark.parametrize(
    ("classes", "reduction"),
    [*itertools.product((6, 1003, 20000), ("none",)), *itertools.product((6,), ("mean", "sum") if INTERPRETED else ())],
)
def test_label_out_of_range_is_nan_with_no_gradient(classes: int, reduction: str) -> None:
    operators = functional.backends.choose("triton", torch.device("cpu"))
    logits, target = batch(4, classes, F32)
    target[0], target[1], target[2] = classes, -7, 2**40
    arguments = (logits, target, None, None, -100, ops.REDUCTIONS.index(reduction), 0.0, 1, 1.0, 0.0)
    loss, _, dlogits, moments = operators.forward(*arguments, False, True)
    assert loss.reshape(-1)[:3].isnan().all() and (reduction != "none" or loss[3].isfinite())
    gradient = operators.backward(torch.ones(()), moments, *arguments)
    for g in (gradient, dlogits) if dlogits.numel() else (gradient,):
        assert (g[:3] == 0).all() and (g[3] != 0).any()


# where the two labels of a row of ``classes`` are; -100: ignored
PAIRS = (
    lambda k: (3, 3),  # one class
    lambda k: (0, k - 1),  # the edges of a row that is not aligned
    lambda k: (k - 1, k - 2),
    lambda k: (8, 9),  # of one lane
    lambda k: (5, k // 2),  # of two chunks
    lambda k: (k // 3, 2),
    lambda k: (5, -100),
    lambda k: (-100, k - 2),
    lambda k: (-100, -100),
)


@pytest.mark.parametrize(
    ("classes", "dtype", "diversity"),
    [
        (1000, BF16, "variance"),  # half sectors
        (1000, F16, "kl"),  # from what the forward has kept
        (1003, F32, "logit_variance"),  # edges
        (4096, F32, "logit_variance"),  # one row a program
        (5000, BF16, "reverse_kl"),  # rows that fit with one label, and do not with two
        (20003, F32, "logit_variance"),  # splits of a row that is not aligned
    ],
)
def test_mixtures_wherever_the_labels_are(classes: int, dtype: torch.dtype, diversity: str) -> None:
    pairs = [pair(classes) for pair in PAIRS] * 4
    first, second = torch.tensor(pairs).unbind(1)
    logits, _ = batch(len(pairs), classes, F32)
    part = len(PAIRS)
    logits[:part] /= 10  # one class too many in a sum shows where all are alike
    labels = logits[part : 3 * part].scatter(1, first[part : 3 * part, None].clamp(0), 60.0)  # one, then both far above
    logits[part : 3 * part] = labels
    logits[2 * part : 3 * part].scatter_(1, second[2 * part : 3 * part, None].clamp(0), 50.0)
    for i in (*range(3 * part, 3 * part + 2), 3 * part + 4):  # read once more: masked, and all but the labels masked
        keep = logits[i, [max(0, y) for y in pairs[i]]].clone()
        logits[i, :: 2 if i > 3 * part + 1 else 1] = -torch.inf
        logits[i, [max(0, y) for y in pairs[i]]] = keep
    logits[3 * part + 5] += 1e4 if dtype is F32 else 0.0
    logits = logits.to(dtype)
    if INTERPRETED and classes > 4096:  # rows one by one take seconds
        chosen = slice(part - 8, None, 3)
        logits, first, second = logits[chosen], first[chosen], second[chosen]
    mix = torch.linspace(0, 1, len(logits))
    check_soft("triton", logits, (first, second, mix), diversity=diversity)
    if classes < 2000:
        options = dict(label_smoothing=0.1, z_loss=0.01, weight=torch.rand(classes) + 0.1)
        finite = (logits > -torch.inf).all(1)  # label smoothing asks for a masked class: an infinite loss
        check_soft("triton", logits[finite], (first[finite], second[finite], mix[finite]), diversity=diversity, **options)


@pytest.mark.parametrize("classes", [10, 20000])
def test_all_rows_ignored(classes: int) -> None:
    logits, target = batch(3, classes, F32)
    logits[1] = torch.nan
    z = logits.requires_grad_()
    loss = functional.cross_entropy(z, target.fill_(-100), backend="triton")
    loss.backward()
    assert loss.isnan() and (z.grad == 0).all()


@pytest.mark.parametrize(("classes", "dtype"), [(10, F32), (300, BF16)])
def test_rescale_decides_by_the_value(classes: int, dtype: torch.dtype) -> None:
    operators = functional.backends.choose("triton", torch.device("cpu"))
    logits, target = batch(5, classes, dtype)
    arguments = (logits, target, None, None, -100, 1, 0.0, 1, 1.0, 0.0)
    _, _, dlogits, moments = operators.forward(*arguments, False, True)
    marked = torch.full_like(dlogits, 7)
    assert operators.rescale(marked, torch.tensor(1.0), moments, *arguments) is marked and (marked == 7).all()
    operators.rescale(marked, torch.tensor(2.0), moments, *arguments)
    assert torch.equal(marked, 2 * dlogits)  # exact: a power of two


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no lanes that could come in another order")
@pytest.mark.parametrize("classes", [10, 600, 20000])
def test_bitwise_the_same_again_and_few_launches(classes: int) -> None:
    sim = device()
    logits, target = batch(40 if classes < 10000 else 3, classes, F32)

    def run() -> tuple[Tensor, Tensor]:
        z = logits.clone().requires_grad_()
        start = len(sim.launches)
        loss = functional.cross_entropy(z, target, backend="triton")
        assert len(sim.launches) - start <= 2
        start = len(sim.launches)
        loss.backward(torch.tensor(0.3))
        assert len(sim.launches) - start == 1
        return loss.detach(), z.grad

    (a, da), (b, db) = run(), run()
    assert torch.equal(a, b) and torch.equal(da, db)


@pytest.mark.parametrize("classes", [10, 1003, 20000])
def test_noise_in_approximate_instructions(classes: int) -> None:
    if INTERPRETED:
        pytest.skip("the interpreter has no approximate instructions")
    with copies_may_differ(approx_noise=1.0):  # each lane has its own noise
        check(*batch(4, classes, F32))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no approximate instructions")
@pytest.mark.parametrize(("classes", "rows", "masked"), [(40, 300, 0.3), (1003, 33, 0.0)])
def test_noise_where_terms_of_different_sign_meet(classes: int, rows: int, masked: float) -> None:
    """A logit near the mean is pulled at by a difference: a mean relative to the largest logit, far away, must be divided exactly."""
    logits, target = rows_at(np.linspace(-80, 80, rows), classes, 0.0, 10.0)
    there = (torch.rand(logits.shape) >= masked).scatter(1, target[:, None], True)
    with copies_may_differ(approx_noise=1.0):
        assert_promised(logits.masked_fill(~there, -torch.inf), target, "triton")


@pytest.mark.skipif(not INTERPRETED, reason="the simulator copies what a tensor views")
@pytest.mark.parametrize("strides", [(2**31, 1), (1, 2**31 // 2)])
def test_offsets_beyond_32_bits(strides: tuple[int, int]) -> None:
    try:
        memory = torch.empty(2**31 + 2**30, dtype=BF16)  # untouched pages cost nothing
    except RuntimeError:
        pytest.skip("no 6 GB of address space")
    logits = memory.as_strided((2, 3), strides)
    logits.copy_(torch.randn(2, 3))
    check(logits, torch.tensor([0, 2]))


def test_a_run_of_more_logits_than_32_bits_count() -> None:
    """The first tile of rows that are that many; of the others there is no memory here."""
    from triton_tiles import first_tile

    classes, tile = 100, 16 * 100
    logits, copy = torch.randn(tile), torch.zeros(tile)
    for rows in (2**31 // classes + 1, 17, 16, 3):  # 3: the last tile, not whole
        copy.zero_()
        first_tile[(1,)](logits, copy, rows, K=classes, A=32, R=16, B=4, P=2048, num_warps=2)
        there = min(rows, 16) * classes
        assert torch.equal(copy[:there], logits[:there]) and not copy[there:].any()


def test_a_cpu_tensor_without_either_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsoftloss import triton_backend

    monkeypatch.setattr(triton_backend, "runs_on_cpu", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        functional.cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend="triton")
