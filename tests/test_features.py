"""Promise: the README's table of what each backend does says what happens.

Each row is run, and the operators that it calls are looked at: a cell says "kernel" where a fused one has run, "plain" where the
definition in PyTorch's own operators has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from forms import FORMS, target_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastsoftloss import backends
from fastsoftloss.functional import cross_entropy

README = Path(__file__).parents[1] / "README.md"
ROWS, CLASSES = 4, 6


class Seen(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


def verdict(names: list[str]) -> str:
    return "kernel" if any("fastsoftloss" in name for name in names) else "plain"


def logits(**options: Any) -> Tensor:
    return torch.randn(ROWS, CLASSES, requires_grad=True, **options)


def forward_of(form: str) -> Callable[[str], str]:
    def run(backend: str) -> str:
        with Seen() as seen:
            cross_entropy(logits(), target_of(form, ROWS, CLASSES), backend=backend)
        return verdict(seen.names)

    return run


def backward_of(form: str) -> Callable[[str], str]:
    def run(backend: str) -> str:
        z = logits(dtype=torch.float16)  # whose gradient is left to the backward
        loss = cross_entropy(z, target_of(form, ROWS, CLASSES), backend=backend)
        with Seen() as seen:
            loss.backward()
        assert z.grad is not None and z.grad.any()
        return verdict(seen.names)

    return run


def second_derivative_of(*forms: str) -> Callable[[str], str]:
    def run(backend: str) -> str:
        verdicts = set()
        for form in forms:
            z = logits()
            loss = cross_entropy(z, target_of(form, ROWS, CLASSES), backend=backend)
            (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
            with Seen() as seen:
                gradient.square().sum().backward()
            assert z.grad is not None and z.grad.any()
            verdicts.add(verdict(seen.names))
        return " or ".join(sorted(verdicts))

    return run


def forward_mode(backend: str) -> str:
    with forward_ad.dual_level(), Seen() as seen:
        dual = forward_ad.make_dual(logits(), torch.ones(ROWS, CLASSES))
        loss = cross_entropy(dual, target_of("index", ROWS, CLASSES), backend=backend)
        assert forward_ad.unpack_dual(loss).tangent is not None
    return verdict(seen.names)


def function_transforms(backend: str) -> str:
    target = target_of("index", ROWS, CLASSES)
    per_sample = torch.func.vmap(torch.func.grad(lambda z, t: cross_entropy(z, t, backend=backend)))
    with Seen() as seen:
        assert per_sample(logits(), target).any()
    return verdict(seen.names)


def learned_weights(backend: str) -> str:
    w = torch.rand(ROWS, requires_grad=True)
    with Seen() as seen:
        cross_entropy(logits(), target_of("index", ROWS, CLASSES), sample_weight=w, backend=backend).backward()
    assert w.grad is not None
    return verdict(seen.names)


def learned_target(backend: str) -> str:
    t = target_of("probabilities", ROWS, CLASSES).requires_grad_()
    with Seen() as seen:
        cross_entropy(logits(), t, backend=backend).backward()
    assert t.grad is not None
    return verdict(seen.names)


def compiled(backend: str) -> str:
    graphs: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    step = torch.compile(lambda z, t: cross_entropy(z, t, backend=backend), fullgraph=True, backend=aot_autograd(fw_compiler=look))
    step(logits(), target_of("index", ROWS, CLASSES)).backward()
    return verdict(graphs)


def exported(backend: str) -> str:
    class Model(torch.nn.Module):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return cross_entropy(z, t, backend=backend)

    program = torch.export.export(Model(), (logits().detach(), target_of("index", ROWS, CLASSES)))
    return verdict([str(node.target) for node in program.graph.nodes])


FEATURES: dict[str, Callable[[str], str]] = {
    "class indices, forward": forward_of("index"),
    "class indices, backward": backward_of("index"),
    "`(y_a, y_b, mix)`, forward": forward_of("mixture"),
    "`(y_a, y_b, mix)`, backward": backward_of("mixture"),
    "class probabilities, forward": forward_of("probabilities"),
    "class probabilities, backward": backward_of("probabilities"),
    "`torch.compile(fullgraph=True)`": compiled,
    "`torch.export`, AOTInductor": exported,
    "second derivative (`create_graph`): indices, `(y_a, y_b, mix)`": second_derivative_of("index", "mixture"),
    "second derivative: class probabilities": second_derivative_of("probabilities"),
    "forward mode": forward_mode,
    "`torch.func`: grad, vmap, jvp, jacrev": function_transforms,
    "gradient for `weight`, `sample_weight`": learned_weights,
    "gradient for probabilities, `mix`": learned_target,
}


def table() -> dict[str, dict[str, str]]:
    """feature -> backend -> cell."""
    text = README.read_text()
    found = re.search(r"<!-- features -->\n(.*?)\n\n", text, re.DOTALL)
    assert found, "README.md has no table below <!-- features -->"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    names = [name.strip("`") for name in lines[0][1:]]
    return {line[0]: dict(zip(names, line[1:], strict=True)) for line in lines[2:]}


def test_the_table_has_these_rows_and_no_others():
    assert list(table()) == list(FEATURES)


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_the_forms_of_a_target_are_those_the_backend_names(name):
    """Of a backend that cannot run here too."""
    operators = {"cuda": backends._cuda}.get(name) or backends._ready.get(name)
    if operators is None:
        pytest.skip(f"{name} is not built")
    for form, words in {"index": "class indices", "mixture": "`(y_a, y_b, mix)`", "probabilities": "class probabilities"}.items():
        for way in ("forward", "backward"):
            assert table()[f"{words}, {way}"][name] == ("kernel" if form in operators.forms else "plain")


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_cell_says_what_happens(feature, name):
    assert FEATURES[feature](name) == table()[feature][name]


WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "masked_select")


@pytest.mark.parametrize("name", [name for name in BACKENDS if name in ("cuda", "triton")])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_step_can_be_captured_in_a_graph(name, form, reduction):
    """A CUDA graph replays what was launched once: no operator may look at the device's values, nor what runs depend on them."""
    runs = []
    for scale, upstream in ((1.0, 1.0), (100.0, float("nan"))):
        z, target = (scale * logits().detach()).requires_grad_(), target_of(form, ROWS, CLASSES)
        if form == "index" and upstream != 1.0:
            target[:] = -100
        with Seen() as seen:
            loss = cross_entropy(z, target, reduction=reduction, backend=name)
            torch.autograd.grad(loss, z, torch.full_like(loss, upstream))
        assert not [one for one in seen.names if any(word in one for word in WAITS)]
        runs.append(seen.names)
    assert runs[0] == runs[1] and any("fastsoftloss" in one for one in runs[0])
