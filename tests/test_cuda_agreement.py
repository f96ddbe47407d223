"""The CUDA kernels agree with the definition in float64, through the host code that a GPU would get.

Evidence: simulated (PTX executed in ptxsim); every launch is checked for races and for accesses out of bounds. On a GPU,
test_cuda_suite.py is the test.
"""

from __future__ import annotations

from typing import Any

import cuda_mode
import pytest
import torch
from conftest import DIVERSITIES, agree
from forms import FORMS
from test_soft_targets import BOUND, check, near, probabilities
from torch import Tensor

from fastsoftloss import functional, ops, reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# staged tiles of 1, 2, .. 16 threads a row up to 512, rows held by half a warp, a warp, warps from there, passes from 16385 on
CLASSES = (1, 2, 3, 10, 17, 31, 32, 33, 100, 512, 1000, 1001, 1003, 4096, 16384, 32000, 50257, 128256, 262144)
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "diversity_weight": 0.7}


@pytest.fixture(autouse=True)
def _simulator() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    cuda_mode.simulator()


def batch(rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * classes + rows + seed)
    logits = (3 * torch.randn(rows, classes, generator=generator, dtype=F64)).to(dtype)
    return logits, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("classes", CLASSES)
def test_classes_dtypes_and_penalties(classes: int) -> None:
    """Each class count with every dtype and, over the counts, every penalty with every dtype."""
    for i, dtype in enumerate((F32, BF16, F16, F64)):
        if classes > 20000 and i != classes % 3 and not (dtype is BF16 and classes == 50257):
            continue
        logits, target = batch(37 if classes <= 100 else 3, classes, dtype)
        target[1], target[2] = -100, classes - 1
        agree("cuda", logits, target, diversity=DIVERSITIES[1 + (CLASSES.index(classes) + i) % 5])


@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize(("classes", "dtype"), [(10, BF16), (300, F16), (1003, F32), (20000, BF16)])
def test_every_penalty_with_every_option(classes: int, dtype: torch.dtype, diversity: str | None) -> None:
    logits, target = batch(3, classes, dtype)
    target[1] = -100
    options = dict(diversity=diversity, upstream=2.0, sample_weight=torch.rand(3) + 0.5)
    agree("cuda", logits, target, **options, **EVERYTHING)
    agree("cuda", logits, target, weight=torch.rand(classes) + 0.5, **options, **EVERYTHING | {"label_smoothing": 0.0})
    if classes < 1000:
        agree("cuda", logits, target, weight=torch.rand(classes) + 0.5, **options, **EVERYTHING)


def test_rows_of_any_alignment() -> None:
    for classes, start in ((1003, 0), (1000, 1), (600, 3), (20000, 7), (40, 1)):
        logits, target = batch(1, 4 * classes + start, BF16)[0].reshape(-1)[start:].view(4, classes), torch.tensor([0, 1, classes - 1, 7])
        agree("cuda", logits, target, reduction="none")
    wide, target = batch(4, 1105, F32)
    agree("cuda", wide[:, 3:1104], target.clamp(max=1100))


@pytest.mark.parametrize("classes", [5, 150, 700])
def test_strides(classes: int) -> None:
    image = torch.randn(2, classes, 3, 5)
    for logits in (image, image.contiguous(memory_format=torch.channels_last), image[:, :, 1:, 1:4], torch.randn(classes, 6).t()):
        rows = logits.shape[:1] + logits.shape[2:]
        agree("cuda", logits, torch.randint(classes, rows, dtype=torch.int32), sample_weight=torch.rand(*rows, 2)[..., 0], reduction="none")


def test_five_row_dimensions_that_cannot_be_joined() -> None:
    """Of the logits, of a target, of weights, of probabilities, and of logits whose gradient has their order of dimensions."""
    logits = torch.randn(3, 6, 3, 3, 3, 3)[1:, :, 1:, 1:, 1:, 1:]
    target, weights = torch.randint(6, (3, 3, 3, 3, 3)), torch.rand(3, 3, 3, 3, 3) + 0.5
    inner = (slice(1, None),) * 5
    agree("cuda", logits, target[inner].contiguous())
    agree("cuda", logits.contiguous(), target[inner])
    agree("cuda", logits.contiguous(), target[inner].contiguous(), sample_weight=weights[inner], reduction="sum")
    mixed = (target[inner], target[inner].flip(0), 0.3)
    check("cuda", logits.contiguous(), mixed)
    soft("cuda", logits.contiguous(), torch.randn(3, 6, 3, 3, 3, 3).softmax(1)[1:, :, 1:, 1:, 1:, 1:])
    turned = torch.randn(2, 3, 2, 6, 3, 2).permute(5, 3, 1, 4, 0, 2)
    soft("cuda", turned, torch.randn(turned.shape).softmax(1))
    agree("cuda", turned, torch.randint(6, (2, 3, 3, 2, 2)), upstream=2.0)


@pytest.mark.parametrize("classes", [6, 700, 20000, 100_000])
def test_masked_and_extreme_logits(classes: int) -> None:
    logits, target = batch(6, classes, F32)
    target[:] = 2
    logits[0, 3:] = -torch.inf
    logits[1, :2] = logits[1, 3:] = -torch.inf  # the true class alone
    logits[2, 4:] = 200.0
    logits[3, 1] = torch.nan
    logits[4, 0] = torch.inf
    if classes == 100_000:
        logits[5, :2] = logits[5, 3 : 3 + 98_000] = -torch.inf
    for diversity in ("logit_variance", "kl") if classes < 10_000 else ("logit_variance",):
        agree("cuda", logits, target, reduction="none", diversity=diversity)


@pytest.mark.parametrize("classes", [10, 1003, 20000])
def test_margins_and_offsets(classes: int) -> None:
    margins = torch.tensor([-80.0, -40.0, -5.0, 0.0, 20.0, 80.0])
    for offset in (0.0, 1e4):
        logits, target = batch(len(margins), classes, F32)
        at = torch.arange(len(margins))
        complement = logits.double().scatter(1, target[:, None], -torch.inf).logsumexp(1)
        logits[at, target] = (complement - margins).float()
        agree("cuda", logits + offset, target, diversity_weight=1e-3, reduction="none")


@pytest.mark.parametrize("classes", [10, 1003, 4096, 20000])
def test_noise_in_approximate_instructions(classes: int) -> None:
    sim = cuda_mode.simulator()
    # each lane has its own noise, so copies of one value differ, which is no race on a device
    sim.options |= {"approx_noise": 1.0, "racecheck": False}
    try:
        agree("cuda", *batch(4, classes, F32))
    finally:
        sim.options |= {"approx_noise": 0.0, "racecheck": True}


@pytest.mark.parametrize("classes", [6, 700, 20000])
def test_label_out_of_range_is_nan_with_no_gradient(classes: int) -> None:
    operators = functional.backends.choose("cuda", torch.device("cpu"))
    assert operators is not None
    logits, target = batch(4, classes, F32)
    target[0], target[1], target[2] = classes, -7, 2**40
    arguments = (logits, target, None, None, -100, ops.REDUCTIONS.index("none"), 0.0, 1, 1.0, 0.0)
    loss, _, dlogits, moments = operators.forward(*arguments, False, True)
    assert loss[:3].isnan().all() and loss[3].isfinite()
    gradient = operators.backward(torch.ones(4), moments, *arguments)
    for g in (gradient, dlogits) if dlogits.numel() else (gradient,):
        assert (g[:3] == 0).all() and (g[3] != 0).any()


@pytest.mark.parametrize("classes", [6, 700, 20000])
def test_either_label_of_a_mixture_out_of_range_is_nan_with_no_gradient(classes: int) -> None:
    operators = functional.backends.choose("cuda", torch.device("cpu"))
    assert operators is not None
    logits, target = batch(5, classes, F32)
    target, shares = reference.pack_mixture(mixture(target, classes), None, F32)
    target[0, 0], target[1, 1], target[0, 2], target[1, 2], target[0, 3] = classes, -7, -100, 2**40, -100
    arguments = (logits, target, None, shares, -100, ops.REDUCTIONS.index("none"), 0.0, 1, 1.0, 0.0)
    loss, _, dlogits, moments = operators.forward(*arguments, False, True)
    assert loss[:3].isnan().all() and loss[3:].isfinite().all()
    gradient = operators.backward(torch.ones(5), moments, *arguments)
    for g in (gradient, dlogits) if dlogits.numel() else (gradient,):
        assert (g[:3] == 0).all() and (g[3:] != 0).any(1).all()


def mixture(target: Tensor, classes: int, apart: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Labels that far apart, the same one twice in the last row."""
    second = (target + apart) % classes
    second[-1] = target[-1]
    return target, second, torch.rand(target.shape)


@pytest.mark.parametrize("classes", CLASSES)
def test_mixtures(classes: int) -> None:
    """As for one label: each class count with every dtype, over the counts every penalty with every dtype."""
    for i, dtype in enumerate((F32, BF16, F16, F64)):
        if classes > 20000 and i != classes % 3:
            continue
        logits, target = batch(37 if classes <= 100 else 3, classes, dtype)
        first, second, mix = mixture(target, classes)
        first[0] = -100
        target_ = first, second, mix.to(reference.accumulation_dtype(dtype))
        check("cuda", logits, target_, diversity=DIVERSITIES[(CLASSES.index(classes) + i) % 6])


@pytest.mark.parametrize("diversity", DIVERSITIES)
@pytest.mark.parametrize(("classes", "dtype"), [(10, BF16), (300, F16), (1003, F32), (20000, BF16)])
def test_mixtures_with_every_option(classes: int, dtype: torch.dtype, diversity: str | None) -> None:
    logits, target = batch(3, classes, dtype)
    options = dict(diversity=diversity, sample_weight=torch.rand(3) + 0.5, **EVERYTHING)
    exactly = options | {"sample_weight": options["sample_weight"].double()}
    for mixed in (mixture(target, classes), (target, torch.tensor([-100, 0, 1]), 0.3)):
        z, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss = functional.cross_entropy(z, mixed, backend="cuda", **options)
        true = functional.cross_entropy(exact, mixed, backend="reference", **exactly)
        near(loss.detach(), true.detach(), BOUND[F32])
        upstream = 2.0**6  # out of float16's smallest numbers
        (dz,), (true_dz,) = torch.autograd.grad(upstream * loss, z), torch.autograd.grad(upstream * true, exact)
        near(dz, true_dz, BOUND[F32], dtype, 1)


@pytest.mark.parametrize("size", [4, 2])  # bytes of a logit: 4 and 8 to a vector
@pytest.mark.parametrize("classes", [40, 1003, 20000])  # a tile, a row in registers, a row in passes
def test_two_labels_wherever_they_are(classes: int, size: int) -> None:
    """In one word, one vector, two, before the first, behind the last, in rows of any alignment. The one that counts is far above
    all others, so that whoever lets it into the sums sees it: they are its whole loss."""
    pairs = [(0, 1), (1, 0), (9, 8), (16, 19), (17, 16), (19, 17), (5, classes - 1), (classes - 1, classes - 2), (33, 35), (11, 12)]
    first, second = torch.tensor(pairs).unbind(1)
    for start in (0, 3):
        logits = torch.randn(len(pairs) * classes + start, generator=torch.Generator().manual_seed(classes)).to(F32 if size == 4 else BF16)
        logits = logits[start:].view(len(pairs), classes)
        rows = torch.arange(len(pairs))
        logits[rows, first] = 30.0
        check("cuda", logits, (first, second, 1.0), diversity=None)
        check("cuda", logits, (second, first, 0.0), diversity=None)


@pytest.mark.parametrize("classes", [6, 700, 20000, 100_000])
def test_masked_and_extreme_logits_of_a_mixture(classes: int) -> None:
    logits, target = batch(8, classes, F32)
    first, second = target * 0 + 2, target * 0 + 4
    logits[0, 5:] = -torch.inf
    logits[1, :2] = logits[1, 3] = logits[1, 5:] = -torch.inf  # the two labels alone
    logits[2, 5:] = 200.0
    logits[3, 2], logits[4, 4] = 80.0, 80.0
    logits[5, 2], logits[5, 4] = -80.0, -90.0
    if classes == 100_000:
        logits[6, 5 : 5 + 98_000] = -torch.inf
    logits[7] += 1e4
    for diversity in ("logit_variance", "kl") if classes < 10_000 else ("logit_variance",):
        check("cuda", logits, (first, second, 0.3), diversity=diversity)
    for bad in (torch.nan, torch.inf):
        for where in (0, 2, 4):
            z = logits[7:].clone()
            z[0, where] = bad
            z.requires_grad_()
            loss = functional.cross_entropy(z, (first[:1], second[:1], 0.3), backend="cuda")
            assert loss.isnan() and torch.autograd.grad(loss, z)[0].isnan().all()


# a thread a row, four, a warp, a warp whose rows start anywhere in a sector, a block, the last and the first of the passes
SOFT_CLASSES = (1, 2, 3, 10, 36, 37, 100, 1003, 4096, 9201, 9202)


@pytest.mark.parametrize("classes", SOFT_CLASSES)
def test_probabilities(classes: int) -> None:
    """Each class count with every dtype of logits and target, over the counts every penalty with every dtype."""
    for i, (dtype, of_target) in enumerate(((F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F32, F16), (F64, F64))):
        if classes > 5000 and i % 3 != classes % 3:
            continue
        logits, _ = batch(37 if classes <= 100 else 3, classes, dtype)
        target = probabilities(len(logits), classes, of_target, sparse=i % 2 == 1)
        for options in ({}, EVERYTHING | {"weight": torch.rand(classes, dtype=F64 if dtype is F64 else F32) + 0.5}):
            kind = DIVERSITIES[(SOFT_CLASSES.index(classes) + i) % 6]
            soft("cuda", logits, target, diversity=kind, **options)


def soft(backend: str, logits: Tensor, target: Tensor, **options: object) -> None:
    """Against the reference, in float64 on the same numbers."""
    z, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    exactly = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = functional.cross_entropy(z, target, reduction="none", backend=backend, **options)
    true = functional.cross_entropy(exact, target.double(), reduction="none", backend="reference", **exactly)
    near(loss.detach(), true.detach(), BOUND[loss.dtype])
    (dz,), (true_dz,) = torch.autograd.grad(loss.sum() * 64, z), torch.autograd.grad(true.sum() * 64, exact)  # float16's smallest
    near(dz, true_dz, BOUND[loss.dtype], logits.dtype, 1)


@pytest.mark.parametrize("kind", DIVERSITIES)
def test_probabilities_of_many_masked_classes(kind: str | None) -> None:
    """So many that a thread has nothing else; and the largest classes, or all, in one of them."""
    logits, target = torch.randn(4, 1003), probabilities(4, 1003, F32)
    logits[0, 40:] = -torch.inf
    logits[1, :900] = -torch.inf
    logits[2, 5] = 90.0
    logits[3] = 1e4
    target[logits == -torch.inf] = 0
    soft("cuda", logits, target / target.sum(1, keepdim=True), diversity=kind)


@pytest.mark.parametrize("kind", DIVERSITIES)
def test_probabilities_whose_extremes_are_tied(kind: str | None) -> None:
    """With the fewest classes that have a middle one, a thread a row, several, and a warp: the next class stands in for the largest
    and for the smallest, and is there itself; of two alike neither is taken."""
    for classes in (3, 10, 100, 1003):
        logits, target = torch.randn(6, classes), probabilities(6, classes, F32)
        logits[0] = 0.5
        logits[1, -2:] = 30.0
        logits[2, :2] = -60.0
        logits[3, 0] = logits[3, -1] = -60.0
        logits[4, 0], logits[4, -1] = 80.0, -80.0
        logits[5, 1:] = -4.0
        for smoothing in (0.0, 0.1):
            soft("cuda", logits, target, diversity=kind, label_smoothing=smoothing)


def test_probabilities_that_do_not_fit_are_refused() -> None:
    operators = functional.backends.choose("cuda", torch.device("cpu"), "probabilities")
    assert operators is not None
    for target in (torch.rand(3, 5), torch.rand(3, 4, 1), torch.rand(3, 4, dtype=F64)):
        with pytest.raises(RuntimeError, match="target must"):
            operators.forward(torch.randn(3, 4), target, None, None, -100, 1, 0.0, 1, 1.0, 0.0, False, True)


def of_form(form: str, labels: Tensor, classes: int) -> tuple[Any, Tensor | None]:
    """The target of an operator, and its sample weights."""
    if form == "mixture":
        return reference.pack_mixture(mixture(labels, classes), None, F32)
    return (labels if form == "index" else probabilities(len(labels), classes, F32)), None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [10, 700, 4096, 20000])
def test_the_same_bits_again_and_few_launches(classes: int, form: str) -> None:
    sim = cuda_mode.simulator()
    logits, labels = batch(9, classes, F32)
    target = mixture(labels, classes) if form == "mixture" else of_form(form, labels, classes)[0]

    def run() -> tuple[Tensor, Tensor]:
        z = logits.clone().requires_grad_()
        sim.launches.clear()
        loss = functional.cross_entropy(z, target, backend="cuda")
        assert len(sim.launches) <= 2
        sim.launches.clear()
        loss.backward(torch.tensor(0.3))
        assert len(sim.launches) == 1
        return loss.detach(), z.grad

    (a, da), (b, db) = run(), run()
    assert torch.equal(a, b) and torch.equal(da, db)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [10, 700, 4096])
def test_rescale_decides_on_the_device(classes: int, form: str) -> None:
    operators = functional.backends.choose("cuda", torch.device("cpu"))
    assert operators is not None
    logits, target = batch(5, classes, F32)
    target, shares = of_form(form, target, classes)
    arguments = (logits, target, None, shares, -100, 1, 0.0, 1, 1.0, 0.0)
    _, _, dlogits, moments = operators.forward(*arguments, False, True)
    marked = torch.full_like(dlogits, 7)
    assert operators.rescale(marked, torch.tensor(1.0), moments, *arguments) is marked and (marked == 7).all()
    operators.rescale(marked, torch.tensor(2.0), moments, *arguments)
    torch.testing.assert_close(marked, 2 * dlogits, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_rescaling_operator_passes_opcheck(form: str) -> None:
    """The backend's third operator, which writes into its first argument; test_autograd.py and test_hessian.py ask the others."""
    logits, target = batch(5, 10, F32)
    target, shares = of_form(form, target, 10)
    arguments = (logits, target, None, shares, -100, 1, 0.0, 1, 1.0, 0.0)
    operators = functional.backends.choose("cuda", torch.device("cpu"))
    assert operators is not None
    _, _, dlogits, moments = operators.forward(*arguments, False, True)
    rescale = torch.ops.fastsoftloss.cuda_cross_entropy_rescale.default
    torch.library.opcheck(rescale, (dlogits, torch.tensor(2.0), moments, *arguments), test_utils=["test_schema", "test_faketensor"])
