"""What the compiled Triton kernels cost: traffic and instructions. Evidence: simulated (PTX for sm_80, executed in ptxsim)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import target_of
from triton_mode import INTERPRETED, simulator

from fastsoftloss import functional, ops, reference

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

DEFAULT = (None, None, -100, ops.REDUCTIONS.index("mean"), 0.0, ops.DIVERSITIES.index("logit_variance"), 1.0, 0.0)
# classes: (traffic over the minimum: forward, backward, fused), (instructions an element: the same), in bfloat16.
# The minimum: logits and labels read once, and the gradient written once where there is one.
CEILINGS = {
    10: ((1.05, 1.05, 1.3), (36, 46, 54)),
    100: ((1.03, 1.03, 1.05), (28.5, 35.5, 40)),
    1000: ((1.03, 1.03, 1.03), (10.5, 11.5, 16)),
    # no two rows aligned alike: the backward reduces again, and needs M2 to know a flat row
    1003: ((1.03, 1.03, 1.03), (13.5, 19.5, 20.4)),
    4096: ((1.03, 1.03, 1.03), (8.7, 8, 14)),
    50257: ((1.03, 1.03), (9.6, 8)),
    128256: ((1.03, 1.03), (7.8, 7.2)),
}
# Special functions an element and pass: an exponential a place. A row's own are arithmetic; what is left over are the places
# beyond a row's ends, the edges of one of 1003 classes twice, and a program's division by the mean's divisor.
SPECIAL = 1.1


def measure(sim: Any, run: Callable[[], Any]) -> tuple[Any, int, int, int]:
    """(result, bytes in 32-byte sectors, instructions, special functions) of the launches of ``run``."""
    import roofline  # type: ignore[import-not-found]

    start = len(sim.launches)
    result = run()
    stats = [launch[-1] for launch in sim.launches[start:]]
    moved = sum(way["sector_bytes"] for s in stats for argument in s["traffic"].values() for way in argument.values())
    counts = [(op, n) for s in stats for op, n in s["opcodes"].items() if op not in roofline.FREE]
    return result, moved, sum(n for _, n in counts), sum(n for op, n in counts if op in roofline.SFU)


def rows_of(classes: int) -> int:
    return 4096 if classes <= 100 else max(3, 1_200_000 // classes)


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The simulator, of one multiprocessor: programs have many rows each, as they do where a batch fills a device."""
    simulated = simulator()
    from fastsoftloss import triton_backend

    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 1)
    return simulated


@pytest.mark.parametrize("classes", CEILINGS)
def test_traffic_and_instructions(sim: Any, classes: int) -> None:
    from fastsoftloss import triton_plan

    operators = functional.backends.choose("triton", torch.device("cpu"))
    rows = rows_of(classes)
    logits = (2 * torch.randn(rows, classes)).bfloat16()
    target = torch.randint(classes, (rows,))
    (_, _, _, moments), *forward = measure(sim, lambda: operators.forward(logits, target, *DEFAULT, False, False))
    _, *backward = measure(sim, lambda: operators.backward(torch.tensor(2.0), moments, logits, target, *DEFAULT))
    figures = [forward, backward]
    if triton_plan.fits(classes, 2):
        _, *fused = measure(sim, lambda: operators.forward(logits, target, *DEFAULT, False, True))
        figures.append(fused)
    passes = ("forward", "backward", "fused")
    for name, (moved, instructions, special), traffic, ceiling in zip(passes, figures, *CEILINGS[classes], strict=False):
        minimum = logits.nbytes * (1 if name == "forward" else 2) + target.nbytes
        print(
            f"K={classes} {name}: {moved / minimum:.3f} x the minimum traffic, {instructions / logits.numel():.1f} instructions "
            f"and {special / logits.numel():.2f} special functions an element"
        )
        assert moved <= traffic * minimum, name
        assert instructions <= ceiling * logits.numel(), name
        assert special <= SPECIAL * logits.numel(), name


# (form, classes): instructions an element, forward and fused, of rows that do not fit forward and backward. Of probabilities 10:
# a thread has a row; 100: four lanes; 1000: a warp. Of a mixture 10: a thread
# goes through both labels; 100: lanes share them; 1000, 4096: chunks of two rows and of one; 50257: a row that does not fit
SOFT = {
    ("probabilities", 10): (59, 76), ("probabilities", 100): (46, 58.5), ("probabilities", 1000): (41, 51.5),
    ("mixture", 10): (62, 88.5), ("mixture", 100): (34, 48.5), ("mixture", 1000): (12.9, 22), ("mixture", 4096): (10.8, 18.8),
    ("mixture", 50257): (10.6, 8.5),
}  # fmt: skip


@pytest.mark.parametrize(("form", "classes"), SOFT)
def test_instructions_of_soft_targets(sim: Any, form: str, classes: int) -> None:
    operators = functional.backends.choose("triton", torch.device("cpu"), form)
    logits = (2 * torch.randn(rows_of(classes), classes)).bfloat16()
    target, sample_weight = target_of(form, *logits.shape), None
    if form == "mixture":
        target, sample_weight = reference.pack_mixture(target, None, torch.float32)
    inputs = (logits, target, None, sample_weight, *DEFAULT[2:])
    (_, _, _, moments), _, alone, _ = measure(sim, lambda: operators.forward(*inputs, False, False))
    again = "fused" if classes <= 4096 else "backward"
    if again == "fused":
        *_, instructions, _ = measure(sim, lambda: operators.forward(*inputs, False, True))
    else:
        *_, instructions, _ = measure(sim, lambda: operators.backward(torch.tensor(2.0), moments, *inputs))
    for name, count, ceiling in zip(("forward", again), (alone, instructions), SOFT[form, classes], strict=True):
        print(f"{form} K={classes} {name}: {count / logits.numel():.1f} instructions an element")
        assert count <= ceiling * logits.numel(), name


# classes: bytes over the minimum (logits, v and labels read once, H v written once), instructions an element. 10, 100: runs; 1000: one
# tile, whose accesses are 2 bytes wide and begin between sectors; 4096: one tile of sectors
HESSIAN = {10: (1.16, 80), 100: (1.04, 71), 1000: (1.29, 54.5), 4096: (1.03, 67)}


@pytest.mark.parametrize("classes", HESSIAN)
def test_the_second_derivative(sim: Any, classes: int) -> None:
    operators = functional.backends.choose("triton", torch.device("cpu"))
    logits = (2 * torch.randn(rows_of(classes), classes)).bfloat16()
    v, target = torch.randn_like(logits), torch.randint(classes, logits.shape[:1])
    _, moved, instructions, _ = measure(sim, lambda: operators.double_backward(v, torch.tensor(2.0), logits, target, *DEFAULT))
    minimum = 3 * logits.nbytes + target.nbytes
    print(f"H v K={classes}: {moved / minimum:.3f} x the minimum traffic, {instructions / logits.numel():.1f} instructions an element")
    assert moved <= HESSIAN[classes][0] * minimum and instructions <= HESSIAN[classes][1] * logits.numel()
