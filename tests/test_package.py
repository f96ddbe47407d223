"""Promise: the package is a drop-in that says what it is doing.

`python -m fastsoftloss` reports and checks itself; backends can be named and overridden; without the compiled kernels all of it
works in plain PyTorch after one warning; importing it is cheap; and `Loss` is a module like any other.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsoftloss
from fastsoftloss import Loss, backends, functional, ops

PACKAGE = Path(fastsoftloss.__file__).parent


def python(*arguments: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=path)


@pytest.fixture(scope="module")
def without_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    shutil.copytree(PACKAGE, root / "fastsoftloss", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    # found before what an editable install would offer in its place
    (root / "fastsoftloss" / "_C.py").write_text("raise ImportError('no kernel was built')\n")
    return root


def test_the_self_check_passes():
    done = python("-m", "fastsoftloss")
    assert done.returncode == 0, done.stdout + done.stderr
    assert fastsoftloss.__version__ in done.stdout and torch.__version__ in done.stdout
    for backend in ("cpu", "reference"):
        assert any(backend in line and "agrees with" in line for line in done.stdout.splitlines()), done.stdout
    assert "cuda" in done.stdout and "triton" in done.stdout


def test_the_self_check_can_fail():
    """A kernel that is wrong by a part in a thousand is found, and the exit status says so."""
    code = """
import sys
from fastsoftloss import __main__, backends, ops
real = backends._ready["cpu"]
def wrong(*arguments):
    loss, *rest = real.forward(*arguments)
    return (loss * 1.001, *rest)
backends._ready["cpu"] = real._replace(forward=wrong, eager=None)
sys.exit(__main__.main())
"""
    done = python("-c", code)
    assert done.returncode == 1 and "DISAGREES" in done.stdout, done.stdout + done.stderr


CALL = """
import warnings, torch, fastsoftloss
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        z = torch.randn(4, 5, requires_grad=True)
        loss = fastsoftloss.Loss()(z, torch.tensor([0, 1, 2, 3]))
        loss.backward()
print(loss.grad_fn.name(), z.grad.isfinite().all().item(), len(seen), *[str(w.message) + " @" + w.filename for w in seen], sep="\\n")
"""


def test_the_environment_overrides_the_backend():
    native, plain = python("-c", CALL), python("-c", CALL, FASTSOFTLOSS_BACKEND="reference")
    name, *rest = native.stdout.splitlines()
    assert "CrossEntropy" in name and rest == ["True", "0"], native.stdout + native.stderr
    assert plain.returncode == 0 and "CrossEntropy" not in plain.stdout, plain.stdout + plain.stderr
    wrong = python("-c", CALL, FASTSOFTLOSS_BACKEND="gpu")
    assert wrong.returncode != 0 and "backend must be None or one of" in wrong.stderr
    assert python("-c", CALL, FASTSOFTLOSS_BACKEND="").stdout == native.stdout


def test_without_kernels_it_works_with_one_warning(without_kernels):
    done = python("-c", CALL, path=without_kernels)
    name, finite, warnings, *message = done.stdout.splitlines()
    assert (finite, warnings) == ("True", "1"), done.stdout + done.stderr
    assert "CrossEntropy" not in name
    assert "plain PyTorch" in message[0] and "install g++" in message[0]


def test_without_kernels_it_says_why(without_kernels):
    done = python("-m", "fastsoftloss", path=without_kernels)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("cpu"))
    assert "not built" in line and "g++" in line and "pip install" in line
    named = python("-c", CALL.replace("Loss()", "Loss(backend='cpu')"), path=without_kernels)
    assert named.returncode != 0 and "RuntimeError: backend='cpu' is not available" in named.stderr and "pip install" in named.stderr


def test_the_warning_names_the_form_that_falls_back(monkeypatch):
    """Once for each: kernels that take class indices say nothing of a mixture."""
    kernels, cuda = ops.Operators(None, None, None, forms=("index",)), torch.device("cuda")
    monkeypatch.setattr(backends, "_best", {})
    monkeypatch.setattr(backends, "_ready", {"cuda": kernels})
    monkeypatch.setattr(backends, "_missing", {"triton": "not installed"})
    monkeypatch.setattr(backends, "_warned", set())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert backends.choose(None, cuda) is kernels
        for form in ("mixture", "probabilities", "mixture"):
            assert backends.choose(None, cuda, form) is None
    for warning, form in zip(seen, ("mixture", "probabilities"), strict=True):
        message = str(warning.message)
        assert f"in plain PyTorch on cuda for a target of the form '{form}'" in message
        assert message.endswith("cuda: it has no kernel for this form; triton: not installed")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_missing_backend_says_why(name):
    if name not in fastsoftloss.backends.missing():
        pytest.skip(f"{name} is there")
    with pytest.raises(RuntimeError, match=f"backend='{name}' is not available: .+"):
        functional.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), backend=name)


def test_importing_it_is_cheap():
    """Measured as processor time inside the process after torch is there, so that a busy machine does not count."""
    code = "import time, torch; start = time.process_time(); import fastsoftloss; print(time.process_time() - start)"
    assert statistics.median(float(python("-c", code).stdout) for _ in range(3)) < 0.2


def test_the_signature_is_that_of_cross_entropy_loss():
    ours = list(inspect.signature(Loss).parameters.values())
    theirs = inspect.signature(nn.CrossEntropyLoss).parameters
    for parameter in ours[:4]:
        assert parameter.default == theirs[parameter.name].default
    assert [p.name for p in ours[:4]] == ["weight", "ignore_index", "reduction", "label_smoothing"]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[4:])
    logits, target, weight = torch.randn(8, 5), torch.randint(5, (8,)), torch.rand(5)
    options = dict(weight=weight, ignore_index=2, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(Loss(**options, diversity=None)(logits, target), nn.CrossEntropyLoss(**options)(logits, target))


def test_loss_is_a_module_like_any_other():
    logits, target = torch.randn(8, 5), torch.randint(5, (8,))
    loss = Loss(torch.rand(5), 1, "sum", 0.1, diversity="kl", diversity_weight=0.3, z_loss=0.01)
    expected = loss(logits, target)
    stream = io.BytesIO()
    torch.save(loss, stream)
    stream.seek(0)
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), torch.load(stream, weights_only=False)):
        assert torch.equal(again(logits, target), expected)
        assert repr(again) == repr(loss)
    assert list(loss.state_dict()) == ["weight"] and not list(loss.parameters())
    other = Loss(torch.ones(5), 1, "sum", 0.1, diversity="kl", diversity_weight=0.3, z_loss=0.01)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(logits, target), expected)
    assert loss.double().weight.dtype is torch.float64
    assert Loss().state_dict() == {} and "diversity='logit_variance'" in repr(Loss())
    sample_weight = torch.rand(8)
    got = Loss()(logits, target, sample_weight)
    assert torch.equal(got, functional.cross_entropy(logits, target, sample_weight=sample_weight))
