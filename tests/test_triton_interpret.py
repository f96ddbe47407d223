"""What is asked of every backend, of Triton in its interpreter, which must be chosen before Triton is imported: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What of each file: the interpreter takes seconds for long rows and for many, and its programs have no way to raise.
FILES = {
    "test_triton_agreement": "triton",
    "test_kernel": "other_backends or (triton and sample_weight_of_two)",
    "test_exactness": "triton and not (1000 or 4097 or 32769 or million or 40000 or (129 and not logit_variance) or 128 or -2 or -3)",
    "test_bad_input": "triton and not (out_of_range or every_block or no_classes or 40000)",
    "test_autograd": "triton and not (loss_scaling or 40000)",
    "test_compile": "triton",
    # other forms of a target take the plain way here, as they do in the reference; finite differences once for each penalty
    "test_derivatives": "triton and not (mixture or probabilities or index-plain)",
    "test_module": "triton",
    "test_features": "triton",
}


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name: str) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is interpreted already")
    here = Path(__file__).parent
    options = ["-n0", "-x", "-W", "ignore", "-p", "no:cacheprovider", "-k", FILES[name]]
    command = [sys.executable, "-m", "pytest", *options, str(here / f"{name}.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, check=False, cwd=here.parent, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
