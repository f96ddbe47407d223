"""What the CUDA kernels cost: traffic and instructions. Evidence: simulated (PTX for sm_80, executed in ptxsim)."""

from __future__ import annotations

import bench_path
import cuda_mode
import pytest
import torch

# classes: pass: (bytes over the minimum, instructions an element), in bfloat16. The aims are 40 instructions fused at 10
# classes, 25 at 100, 18 at 1000, 12 at 4096, where 9.5 forward and 7 backward, 8.5 and 7 from 32000; 1.02 of the bytes from
# 1000 classes, below 1.10. Above them are 4096 fused and 10 classes: there finish takes two thirds of the instructions, and
# fused the labels are read once more for the divisor of the mean, 8 bytes on top of the 48 of a row: 56 / 48 = 1.17.
CEILINGS: dict[int, dict[str, tuple[float, float]]] = {
    10: {"forward": (1.02, 43), "backward": (1.04, 49), "fused": (1.18, 54.5)},
    100: {"forward": (1.01, 18), "backward": (1.02, 25), "fused": (1.03, 25)},
    1000: {"forward": (1.02, 10), "backward": (1.025, 13.5), "fused": (1.021, 13.5)},
    4096: {"forward": (1.02, 9.5), "backward": (1.02, 7), "fused": (1.02, 12.6)},
    32000: {"forward": (1.02, 8.5), "backward": (1.02, 7)},
}
# Special functions: an exponential a logit, with a tenth of slack, and what a row has of its own under logit_variance: 2
# divisions by n, 2 exponentials that put back what the reference lost and 1 of the true class's twin, 2 of the move (logarithm
# and exponential), 1 / s1, the margin's exponential, 1 / (1 + v), and 3 of its logarithms (division and log2 of log1p, log s1).
SPECIAL_AN_ELEMENT, SPECIAL_A_ROW = 1.1, 13


@pytest.mark.parametrize("classes", CEILINGS)
def test_traffic_and_instructions(classes: int) -> None:
    cuda_mode.simulator()
    assert bench_path
    import cuda_sim

    special = SPECIAL_AN_ELEMENT + SPECIAL_A_ROW / classes
    for name, (traffic, instructions) in CEILINGS[classes].items():
        found = cuda_sim.figures(name, torch.bfloat16, cuda_sim.rows_for(classes), classes)
        assert found is not None
        print(classes, name, found)
        assert found["bytes_over_minimum"] <= traffic and found["instructions"] <= instructions and found["special"] <= special, (
            name,
            found,
        )
