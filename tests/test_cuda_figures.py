"""What the CUDA kernels cost: traffic and instructions. Evidence: simulated (PTX for sm_80, executed in ptxsim)."""

from __future__ import annotations

import bench_path
import cuda_mode
import pytest
import torch

# classes: pass: (bytes over the minimum, instructions an element, special functions an element), in bfloat16. The aims are 40
# instructions fused at 10 classes, 25 at 100, 18 at 1000, 12 at 4096, where 9.5 forward and 7 backward, 8.5 and 7 from 32000; 1.1
# special functions, a row's own aside; 1.02 of the bytes from 1000 classes, below 1.10. Here 10 classes are above: the
# divisor of the mean reads the labels twice, and finish takes two thirds of the instructions; and 4096 fused.
CEILINGS = {
    10: {"forward": (1.02, 43, 2.3), "backward": (1.04, 49, 2.3), "fused": (1.18, 54.5, 2.3)},
    100: {"forward": (1.01, 18, 1.2), "backward": (1.02, 25, 1.2), "fused": (1.03, 25, 1.2)},
    1000: {"forward": (1.02, 10, 1.1), "backward": (1.025, 13.5, 1.1), "fused": (1.021, 13.5, 1.1)},
    4096: {"forward": (1.02, 9.5, 1.1), "backward": (1.02, 7, 1.1), "fused": (1.02, 12.6, 1.1)},
    32000: {"forward": (1.02, 8.5, 1.1), "backward": (1.02, 7, 1.1)},
}


@pytest.mark.parametrize("classes", CEILINGS)
def test_traffic_and_instructions(classes: int) -> None:
    cuda_mode.simulator()
    assert bench_path
    import cuda_sim

    for name, (traffic, instructions, special) in CEILINGS[classes].items():
        found = cuda_sim.figures(name, torch.bfloat16, cuda_sim.rows_for(classes), classes)
        assert found is not None
        print(classes, name, found)
        assert found["bytes_over_minimum"] <= traffic and found["instructions"] <= instructions and found["special"] <= special, (
            name,
            found,
        )
