"""What the tests share: the backends, the float64 truth, and the bound on the distance from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import cuda_mode
import formula
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from triton_mode import INTERPRETED, SIMULATED, simulator

from fastsoftloss import backends, functional, reference

# One line a backend, and the device that it is tested on.
BACKENDS = {"cpu": "cpu", "reference": "cpu"}
if INTERPRETED or SIMULATED:  # the processes that test_triton_suite.py starts
    BACKENDS = {"triton": "cpu"}
    if SIMULATED:
        simulator()
elif os.environ.get("FASTSOFTLOSS_TEST_BACKEND") == "cuda":  # see test_cuda_suite.py
    if torch.cuda.is_available():
        BACKENDS = {"cuda": "cuda"}
    else:
        cuda_mode.simulator()
        BACKENDS = {"cuda": "cpu"}

DIVERSITIES = (None, *formula.PENALTIES)

# The relative error of one term, of the u = 2^-24 (2^-53) of the arithmetic: a logit less the row's largest one is rounded to
# u of itself, which the exp turns into a relative error of up to 88 u (708 u); 80 u more for the sums, the polynomials
# and the few operations around them. For float32 this is the 1e-5 that the package promises.
RELATIVE = {torch.float32: (88 + 80) * 2.0**-24, torch.float64: (708 + 80) * 2.0**-53}
# Below it float32 runs out of exponent. The truth may be there, a kernel need not.
SMALLEST = {torch.float32: 1e-35, torch.float64: 1e-300}

settings.register_profile("fixed", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("fixed")


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# who differentiates an eager call on the CPU: csrc/autograd.cpp, or ops._CrossEntropy where that is not built
NODES = ["C++", "Python"] if "cpu" in BACKENDS and backends._ready["cpu"].eager else ["Python"]


@pytest.fixture(params=NODES)
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "Python" and "cpu" in BACKENDS:
        monkeypatch.setattr(backends, "quick", None)
        monkeypatch.setitem(backends._ready, "cpu", backends._ready["cpu"]._replace(eager=None))
        monkeypatch.setattr(backends, "_best", {})
    return str(request.param)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """More than one, so that work is really shared, and the same for each test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Outcome(NamedTuple):
    loss: Tensor
    cross_entropy: Tensor
    diversity: Tensor
    gradient: Tensor


def compute(backend: str, logits: Tensor, target: Tensor, *, upstream: Tensor | None = None, **options: Any) -> Outcome:
    """Loss, parts and gradient by ``backend``, on the strides that logits have."""
    z = logits.detach().to(BACKENDS.get(backend, "cpu")).requires_grad_()
    parts = functional.cross_entropy(z, target.to(z.device), return_components=True, backend=backend, **options)
    (gradient,) = torch.autograd.grad(parts.loss, z, torch.ones_like(parts.loss) if upstream is None else upstream)
    return Outcome(parts.loss.detach(), parts.cross_entropy, parts.diversity, gradient)


def truth(logits: Tensor, target: Tensor, *, upstream: Tensor | None = None, **options: Any) -> Outcome:
    """The same in float64 by the reference, on the very same logits."""
    z = logits.detach().double().requires_grad_()
    for name in ("weight", "sample_weight"):
        if options.get(name) is not None:
            options[name] = options[name].double()
    loss, cross_entropy, diversity = reference.cross_entropy(z, target, **options)
    (gradient,) = torch.autograd.grad(loss, z, torch.ones_like(loss) if upstream is None else upstream.double())
    return Outcome(loss.detach(), cross_entropy, diversity, gradient)


def assert_near(got: Tensor, true: Tensor, bound: Any, what: str = "") -> None:
    """|got - true| <= bound, element by element; NaN and infinities must be the same."""
    got_, true_ = got.detach().double().numpy(), true.detach().double().numpy()
    bound_ = np.broadcast_to(np.asarray(bound), true_.shape)
    finite = np.isfinite(true_)
    assert got_.shape == true_.shape, what
    assert np.array_equal(got_[~finite], true_[~finite], equal_nan=True), f"{what}: not the same NaN and infinities"
    got_, true_, bound_ = got_[finite], true_[finite], bound_[finite]
    far = np.abs(got_ - true_) - bound_
    wrong = ~(far <= 0)
    if wrong.any():
        i = np.argmax(np.nan_to_num(far, nan=np.inf))
        pytest.fail(f"{what}: {wrong.sum()} of {far.size} off the truth; the farthest is {got_[i]} for {true_[i]}, bound {bound_[i]:.3g}")


def rounding(true: Tensor, dtype: torch.dtype) -> Any:
    """Half a unit in the last place of a 16-bit ``dtype``; 0 where the arithmetic is stored as it is.

    Triton's interpreter cuts a float32 down to bfloat16 where compiled code rounds it: a whole unit, there and only there.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    info = torch.finfo(dtype)
    units = 1.0 if INTERPRETED and dtype is torch.bfloat16 else 0.5
    return np.maximum(np.abs(true.numpy()), info.smallest_normal) * (info.eps * units)


def assert_true(got: Outcome, logits: Tensor, target: Tensor, *, upstream: Tensor | None = None, **options: Any) -> None:
    """Every value that ``compute`` gives is within the bound of ``formula`` of the truth."""
    dtype = reference.accumulation_dtype(logits.dtype)
    true = truth(logits, target, upstream=upstream, **options)
    terms = formula.cross_entropy(logits, target, upstream=upstream, **options)
    relative = RELATIVE[dtype] + RELATIVE[torch.float64]  # the truth has an error too
    for name in ("loss", "cross_entropy", "diversity"):
        value, size = getattr(got, name), getattr(terms, f"{name}_terms")
        assert value.dtype is dtype, name
        assert_near(value, getattr(true, name), relative * size + SMALLEST[dtype], name)
    assert got.gradient.dtype is logits.dtype
    size = terms.gradient_terms
    error = relative * size + SMALLEST[dtype] * (1 + size.max(where=np.isfinite(size), initial=0))
    assert_near(got.gradient, true.gradient, error + rounding(true.gradient, logits.dtype), "gradient")


def agree(
    backend: str, logits: Tensor, target: Tensor, *, upstream: Tensor | float | None = None, alone: bool = True, **options: Any
) -> None:
    """``compute`` is true, and so is the loss by itself, which may be summed in another order where no gradient is wanted."""
    if upstream is not None:
        options["upstream"] = torch.as_tensor(upstream, dtype=reference.accumulation_dtype(logits.dtype))
    got = compute(backend, logits, target, **options)
    if alone:
        forward = {name: value for name, value in options.items() if name != "upstream"}
        with torch.no_grad():
            loss = functional.cross_entropy(logits, target, backend=backend, **forward)
        assert_true(got._replace(loss=loss), logits, target, **options)
    assert_true(got, logits, target, **options)


def named(changes):
    """A test's name for arguments, the same in every process, whatever values were drawn."""
    return ", ".join(f"{k}={f'{v.dtype}{tuple(v.shape)}' if isinstance(v, torch.Tensor) else v}" for k, v in changes.items())


# files of one long test or a few, the longest first: at the end one core would wait for them
LONG = ("test_triton_suite", "test_cuda_compile", "test_cuda_suite", "test_headers", "test_cuda_figures", "test_triton_figures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
