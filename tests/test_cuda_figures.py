"""What the CUDA kernels cost: traffic and instructions. Evidence: simulated (PTX for sm_80, executed in ptxsim).

bench/kernels.py has the same and more beside the peers; here are the limits.
"""

from __future__ import annotations

import cuda_mode
import pytest
import torch

from fastsoftloss import backends, functional, reference

# classes: pass: (bytes over the minimum, instructions an element), in bfloat16. The aims are 40 instructions fused at 10
# classes, 25 at 100, 18 at 1000, 12 at 4096, where 9.5 forward and 7 backward, 8.5 and 7 from 32000; 1.02 of the bytes from
# 1000 classes, below 1.10. Where less is reached, that is the limit.
CEILINGS: dict[int, dict[str, tuple[float, float]]] = {
    10: {"forward": (1.01, 30), "backward": (1.01, 35), "fused": (1.09, 37.5)},
    100: {"forward": (1.01, 16), "backward": (1.01, 22.5), "fused": (1.02, 22.5)},
    1000: {"forward": (1.02, 9.5), "backward": (1.02, 12.5), "fused": (1.02, 12.5)},
    4096: {"forward": (1.02, 8), "backward": (1.01, 7), "fused": (1.01, 12)},
    32000: {"forward": (1.01, 7.5), "backward": (1.01, 6.8)},
}
# The same for mixtures, which leave two classes out of the sums and finish twice: near an index target where rows are long. Their
# labels and weights, 24 bytes a row, are read twice where the mean's divisor comes first.
MIXED: dict[int, dict[str, tuple[float, float]]] = {
    10: {"forward": (1.01, 79), "backward": (1.01, 84), "fused": (1.39, 94)},
    100: {"forward": (1.01, 22.5), "backward": (1.01, 29.5), "fused": (1.07, 30.5)},
    1000: {"forward": (1.03, 10.5), "backward": (1.04, 13.8), "fused": (1.05, 13.9)},
    4096: {"forward": (1.04, 8.8), "backward": (1.02, 7.4), "fused": (1.03, 13.2)},
    32000: {"forward": (1.01, 7.9), "backward": (1.01, 6.8)},
}
# For class probabilities, given in bfloat16 too. Below 512 classes a warp has several rows, and each of its accesses takes part of
# their sectors: the bytes are those, as if no cache kept the rest.
PROBABILITIES: dict[int, dict[str, tuple[float, float]]] = {
    10: {"forward": (10.1, 96), "fused": (10.7, 113)},
    100: {"forward": (4.1, 46), "fused": (4.2, 58.5)},
    1000: {"forward": (1.02, 41), "fused": (1.03, 53)},
    4096: {"forward": (1.01, 43), "fused": (1.01, 55.5)},
}
# Special functions: an exponential a logit and that of the true class, whose logarithm and reciprocal are arithmetic; and at 100
# classes and more the rows that go the careful way, and what moves the sums of the long ones.
SPECIAL = {10: 1.1, 100: 1.03, 1000: 1.01, 4096: 1.01, 32000: 1.01}


def figures(name: str, classes: int, form: str = "index") -> tuple[float, float, float]:
    """Of one pass in bfloat16: bytes over the minimum, which is logits and target read once and the gradient written once where
    there is one; instructions (moves not counted) and special functions an element."""
    sim = cuda_mode.simulator()
    import cudasim
    import roofline

    operators = backends.choose("cuda", torch.device("cpu"), form)
    assert operators is not None
    options = functional.options_of(-100, "mean", 0.0, "logit_variance", 1.0, 0.0)
    rows = 8192 if classes <= 100 else max(16, 2_000_000 // classes)
    generator = torch.Generator().manual_seed(classes)
    logits = (2 * torch.randn(rows, classes, generator=generator)).to(torch.bfloat16)
    target, shares = torch.randint(classes, (rows,), generator=generator), None
    if form == "mixture":
        pair = (target, torch.randint(classes, (rows,), generator=generator), torch.rand(rows, generator=generator))
        target, shares = reference.pack_mixture(pair, None, torch.float32)
    if form == "probabilities":
        target = torch.randn(rows, classes, generator=generator).softmax(1).to(torch.bfloat16)
    inputs = (logits, target, None, shares, *options)
    # one multiprocessor: blocks have many rows each, as they do where a batch fills a device
    cudasim._runtime.cudasim_set(sim._callback, 1, 9, 0, 232448)
    try:
        sim.launches.clear()  # another test's
        outcome = operators.forward(*inputs, False, name == "fused")
        assert name != "fused" or outcome[2].numel()
        if name == "backward":
            sim.launches.clear()
            operators.backward(torch.tensor(2.0), outcome[3], *inputs)
        stats = [launch[-1] for launch in sim.launches]
    finally:
        cudasim._runtime.cudasim_set(sim._callback, 132, 9, 0, 232448)
        sim.launches.clear()
    minimum = logits.nbytes * (1 if name == "forward" else 2) + target.nbytes + (0 if shares is None else shares.nbytes)
    reports = [roofline.report(one, logits.numel(), minimum, "A100") for one in stats]
    moved, instructions, special = (
        sum(report[key] for report in reports) for key in ("bytes_over_minimum", "instructions_per_element", "special_per_element")
    )
    return round(moved, 3), round(instructions, 2), round(special, 2)


@pytest.mark.parametrize("classes", CEILINGS)
def test_traffic_and_instructions(classes: int) -> None:
    for name, (traffic, instructions) in CEILINGS[classes].items():
        found = figures(name, classes)
        print(classes, name, found)
        assert all(a <= b for a, b in zip(found, (traffic, instructions, SPECIAL[classes]), strict=True)), (name, found)


@pytest.mark.parametrize("classes", MIXED)
def test_traffic_and_instructions_of_a_mixture(classes: int) -> None:
    for name, limits in MIXED[classes].items():
        found = figures(name, classes, "mixture")
        print("mixture", classes, name, found)
        assert found[0] <= limits[0] and found[1] <= limits[1], (name, found)


@pytest.mark.parametrize("classes", PROBABILITIES)
def test_traffic_and_instructions_of_probabilities(classes: int) -> None:
    for name, limits in PROBABILITIES[classes].items():
        found = figures(name, classes, "probabilities")
        print("probabilities", classes, name, found)
        assert found[0] <= limits[0] and found[1] <= limits[1], (name, found)
