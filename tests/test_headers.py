"""Promise: the C++ is right by itself, without torch.

Merging moments in any order and any split gives the same moments; finish gives the loss and the gradient of DESIGN §2;
and under the address and undefined-behaviour sanitizers the kernels of every instruction set read and write only what is theirs.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import platform
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import formula
import numpy as np
import pytest
import torch
from conftest import DIVERSITIES, RELATIVE
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    import pybind11

    path = tmp_path_factory.mktemp("headers") / "headers_module.so"
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    run(CXX, "-shared", "-fPIC", "-O1", *FLAGS, *includes, ROOT / "tests/headers_module.cpp", "-o", path)
    spec = importlib.util.spec_from_file_location("headers_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIELDS = ("n", "m", "s1", "s2", "sx", "mean", "m2", "sw", "swx")


def true_moments(z: np.ndarray, w: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """The moments in float64, and the sum of the absolute values of their terms."""
    there = z > -np.inf
    z, w = z[there].astype(float), w[there].astype(float)
    if not len(z):
        return dict.fromkeys(FIELDS, 0.0) | {"m": -np.inf}, dict.fromkeys(FIELDS, 0.0)
    x = z - z.max()
    e = np.exp(x)
    values = [len(z), z.max(), e.sum(), (e * e).sum(), (e * x).sum(), x.mean(), len(z) * x.var(), w.sum(), (w * x).sum()]
    return dict(zip(FIELDS, values, strict=True)), dict(zip(FIELDS, map(abs, values), strict=True))


@st.composite
def rows(draw: st.DrawFn, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    count = draw(st.integers(least, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    offset, scale = draw(st.sampled_from([(0, 1), (0, 30), (1e4, 1), (-1e4, 0.01), (0, 300)]))
    z = (offset + scale * generator.standard_normal(count)).astype(np.float32)
    z[generator.random(count) < draw(st.sampled_from([0, 0.3, 1]))] = -np.inf
    return z, (generator.random(count) + 0.1).astype(np.float32)


@settings(max_examples=200)
@given(row=rows(), data=st.data())
def test_any_order_and_any_split_give_the_same_moments(headers, row, data):
    """Each of at most 60 merges rounds a sum, a shift x of up to 88 in an exp, and Chan's few products: 60 (a few u) + 88 u,
    which RELATIVE stands for twice; a shift of the mean and of swx is a difference, rounded in the size of the shift."""
    z, w = row
    order = np.array(data.draw(st.permutations(range(len(z)))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(z)), max_size=6)))
    for kind, dtype in ((headers.Float, torch.float32), (headers.Double, torch.float64)):
        parts = [kind.of(z[i], w[i]) for i in np.split(order, cuts)]
        while len(parts) > 1:
            i = data.draw(st.integers(0, len(parts) - 2))
            parts[i : i + 2] = [parts[i].merge(parts[i + 1]) if data.draw(st.booleans()) else parts[i + 1].merge(parts[i])]
        true, size = true_moments(z, w)
        shift = float(np.ptp(z[z > -np.inf])) if (z > -np.inf).any() else 0.0
        size["mean"] += shift
        size["swx"] += shift * size["sw"]
        size["m2"] += size["n"] * shift * np.sqrt(size["m2"] / max(size["n"], 1))
        for name in FIELDS:
            assert (
                abs(getattr(parts[0], name) - true[name]) <= 2 * RELATIVE[dtype] * size[name] + 1e-35
                or getattr(parts[0], name) == true[name]
            ), name


def test_the_empty_part_is_neutral(headers):
    one = headers.Float.of(np.array([1.0, 2.0, 4.0]), np.ones(3))
    for merged in (one.merge(headers.Float()), headers.Float().merge(one)):
        assert all(getattr(merged, name) == getattr(one, name) for name in FIELDS)
    both = headers.Float().merge(headers.Float())
    assert both.n == 0 and both.m == -np.inf and both.s1 == 0


@settings(max_examples=200)
@given(row=rows(), z=st.sampled_from([-math.inf, -300.0, -1.0, 0.0, 2.5, 300.0]), empty=st.booleans())
def test_one_class_more_is_the_merge_with_it(headers, row, z, empty):
    """Two operations a moment, some of them in another order, and an exp in both: RELATIVE covers each several times over."""
    for kind, dtype in ((headers.Float, torch.float32), (headers.Double, torch.float64)):
        part = kind() if empty else kind.of(*row)
        last = kind.of(np.array([z]), np.array([0.5])) if z > -math.inf else kind()
        whole, down, e_down, x, e = part.with_class(z, 0.5)
        merged = part.merge(last)
        for name in FIELDS:
            true, terms = getattr(merged, name), abs(getattr(part, name)) + abs(getattr(last, name))
            terms += abs(x) + abs(down) + (part.n * (abs(down) + abs(x) + abs(part.mean)) ** 2 if name == "m2" else 0.0)
            terms += abs(down) * (part.sw + part.s1) if name in ("swx", "sx") else 0.0
            assert abs(getattr(whole, name) - true) <= RELATIVE[dtype] * terms or getattr(whole, name) == true, name
        near = functools.partial(pytest.approx, rel=RELATIVE[dtype], abs=1e-38)
        assert down == near(part.m - whole.m if part.n else 0) and e_down == near(math.exp(down))
        assert x == near(z - whole.m if z > -math.inf else 0) and e == near(math.exp(x) if z > -math.inf else 0)
    bad = headers.Float.of(*row)
    for z in (math.nan, math.inf):
        assert math.isnan(bad.with_class(z, 1.0)[0].s1)


@settings(max_examples=300)
@given(
    row=rows(least=2),
    kind=st.sampled_from(range(len(DIVERSITIES))),
    smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 0.01]),
    weighted=st.booleans(),
    data=st.data(),
)
def test_finish_is_the_definition(headers, row, kind, smoothing, z_loss, weighted, data):
    z, w = row
    y = data.draw(st.integers(0, len(z) - 1))
    z[y] = z[y] if z[y] > -np.inf else 0.0
    options = dict(diversity=DIVERSITIES[kind], diversity_weight=0.5, z_loss=z_loss, label_smoothing=smoothing, reduction="none")
    weight, sample_weight = torch.from_numpy(w) if weighted else None, torch.tensor(1.5)
    true = formula.cross_entropy(torch.from_numpy(z), torch.tensor(y), weight, sample_weight=sample_weight, **options)
    complement = np.delete(z, y), np.delete(w, y)
    for of, dtype in ((headers.Float, torch.float32), (headers.Double, torch.float64)):
        moments = of.of(*complement)
        loss, cross_entropy, diversity, gradient = moments.loss(z, y, 1.5, 1.0, kind, 0.5, smoothing, z_loss, w, weighted)
        relative = 2 * RELATIVE[dtype]
        values = (("loss", loss), ("cross_entropy", cross_entropy), ("diversity", diversity), ("gradient", gradient))
        for name, value in values:
            expected, size = np.asarray(getattr(true, name)), np.asarray(getattr(true, f"{name}_terms"))
            finite = np.isfinite(expected)
            assert np.array_equal(np.asarray(value)[~finite], expected[~finite], equal_nan=True), name
            error = np.abs(np.asarray(value, float)[finite] - expected[finite])
            assert (error <= relative * size[finite] + 1e-35 * (1 + size[finite].max(initial=0))).all(), (name, value, expected)


def test_the_kernels_under_the_sanitizers(tmp_path):
    """-O0 and without forced inlining: what is looked for are addresses and undefined operations, and -O1 takes minutes to compile."""
    sanitize = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-DFSL_FN=inline"]
    x86 = platform.machine() in ("x86_64", "AMD64")
    own = {
        "kernels_avx2": ["-mavx2", "-mfma"],
        "kernels_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    }
    sources = [ROOT / "tests/sanitized_main.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]

    def build(source: Path) -> Path:
        to = tmp_path / f"{source.stem}.o"
        run(CXX, "-c", *FLAGS, *sanitize, *(own.get(source.stem, []) if x86 else []), source, "-o", to)
        return to

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    program = tmp_path / "sanitized"
    run(CXX, "-fsanitize=address,undefined", *objects, "-o", program)
    out = run(program, env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"})
    assert "baseline kernels" in out and out.endswith("0 failures\n"), out
