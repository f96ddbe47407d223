"""What is asked of every backend, of Triton: in its interpreter, and compiled, with every launch executed in ptxsim (evidence: simulated).

Each needs a process of its own: the interpreter is chosen before Triton is imported, and the backends do not meet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_mode import EVERY, INTERPRETED, SIMULATED

# What of each file: the interpreter takes seconds for long rows and for many, and its programs have no way to raise.
INTERPRETER = {
    "test_triton_agreement": "triton",
    "test_kernel": "other_backends or (triton and sample_weight_of_two)",
    # 10 classes, and nearly flat rows; what lanes do with more is for the simulator
    "test_exactness": "triton and not (1000 or 4097 or 32769 or million or 40000 or 257 or 256 or -2 or -3)",
    "test_bad_input": "triton and not (out_of_range or every_block or no_classes or 40000 or (4200 and not logit_variance))",
    # an upstream gradient of nothing, and one that rounds
    "test_autograd": "triton and not (loss_scaling or 40000 or 8192 or -1.0)",
    "test_compile": "triton",
    # other forms of a target take the plain way too; finite differences of the default: every
    # penalty's gradient is laid beside the truth above
    "test_derivatives": "triton and not (mixture or probabilities or index-plain or (finite_differences and not logit_variance))",
    "test_module": "triton",
    "test_features": "triton",
    # the dtypes, and rows that are no runs, are the simulator's; higher derivatives are PyTorch's
    "test_hessian": "triton and ((every_option and dtype0 and (triton-1- or triton-10-)) or (every_margin and dtype0 and 10-)"
    " or (masked and 10) or lowest_number or (layout and dtype0 and one_row) or refused or opcheck or nothing or poisoned)",
    "test_soft_targets": "triton and not (5000 or 300 or 130 or 150 or IndexError or dtype1 or 10000.0)",
}
# The simulator takes seconds for each kernel that is compiled, and is quick at margins and rows.
SIMULATOR = {
    "test_kernel": "other_backends",
    "test_exactness": "triton and (every_margin or gap_of_25) and (10- or 1000- or 25)",
    "test_features": "triton",
    "test_hessian": "triton and every_margin and dtype0 and (10-logit or 10-kl or 257-variance)",
    "test_soft_targets": "triton and ((expectation and dtype0-130 and (logit_variance or kl)) or (two_losses and dtype0-130-logit)"
    " or (16_bits and 300-dtype0-logit))",
}
WAYS = {
    "interpreted": ({"TRITON_INTERPRET": "1"}, INTERPRETER),
    "simulated": ({"FASTSOFTLOSS_TEST_BACKEND": "triton"}, SIMULATOR),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_suite_of_triton(way: str) -> None:
    pytest.importorskip("triton")
    if INTERPRETED or SIMULATED:
        pytest.skip("this is that process")
    if way == "simulated" and not os.environ.get("PTXSIM"):
        pytest.skip("the environment variable PTXSIM does not name a folder with ptxsim")
    environment, files = WAYS[way]
    here = Path(__file__).parent
    # one process for all files: each would import PyTorch and Triton anew
    chosen = " or ".join(f"({name}.py and ({tests}))" for name, tests in files.items())
    options = ["-n0", "-x", "-W", "ignore", "-p", "no:cacheprovider", "-k", chosen]
    command = [sys.executable, "-m", "pytest", *options, *(str(here / f"{name}.py") for name in files)]
    result = subprocess.run(
        command, check=False, cwd=here.parent, env=os.environ | environment, capture_output=True, text=True, timeout=3600 if EVERY else 900
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    print(result.stdout[-100:])
