"""The launch plan: a pure function, so its promises are plain arithmetic."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from fastsoftloss.triton_backend import collapse
from fastsoftloss.triton_plan import ALIGNED, FLAT, STRIDED, fits, plan


@pytest.mark.parametrize(("itemsize", "aligned", "class_stride"), itertools.product((2, 4, 8), (True, False), (1, 49)))
def test_tiles_cover_every_row_and_class(itemsize: int, aligned: bool, class_stride: int) -> None:
    for rows, classes in itertools.product((1, 7, 4096, 10**6), (0, 1, 2, 10, 17, 100, 256, 257, 1000, 1003, 4096, 16384, 50257, 2**20)):
        p = plan(rows, classes, class_stride, [classes * class_stride], itemsize, aligned, 132)
        assert all(n & (n - 1) == 0 for n in (p.a, p.r, p.b, p.warps))
        assert p.resident == fits(classes, itemsize) and 1 <= p.warps <= 32
        if p.resident:
            assert p.a * p.b >= classes and p.programs >= 1
            assert p.a * p.r * p.b * itemsize <= 32 * p.warps * 512 * max(1, itemsize // 4), "elements a thread"
            assert p.access != FLAT or (p.run >= p.r * classes and p.r * classes * itemsize % 16 == 0)
        else:
            assert p.splits * p.tiles * p.a * p.r * p.b >= classes and p.programs == rows * p.splits
            assert (p.splits - 1) * p.tiles * p.a * p.r * p.b < classes, "no program without work"


def test_few_classes_put_many_rows_in_a_program() -> None:
    assert plan(65536, 10, 1, [10], 2, True, 132).r >= 32


def test_few_long_rows_are_split_and_many_are_not() -> None:
    assert plan(2, 2**20, 1, [2**20], 2, True, 132).splits > 16
    assert plan(10**5, 128256, 1, [128256], 2, True, 132).splits == 1


def test_access() -> None:
    assert plan(64, 10, 1, [10], 2, True, 132).access == FLAT
    assert plan(64, 10, 1, [16], 2, True, 132).access == STRIDED
    assert plan(64, 1003, 1, [1003], 2, True, 132).access == ALIGNED
    assert plan(64, 1003, 1, [1003], 2, False, 132).access == STRIDED


def test_collapse_joins_what_strides_allow() -> None:
    assert collapse([2, 3, 4], [12, 4, 1], [12, 4, 1]) == ([24], [[1], [1]])
    assert collapse([2, 3, 4], [24, 4, 1], [12, 4, 1]) == ([2, 12], [[24, 1], [12, 1]])
    assert collapse([1, 5, 1], [9, 2, 7]) == ([5], [[2]])
    assert collapse([], []) == ([1], [[0]])
