"""The launch plan: a pure function, so its promises are plain arithmetic."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from fastsoftloss import ops
from fastsoftloss.triton_backend import collapse
from fastsoftloss.triton_plan import FLAT, ROWS, STRIDED, Plan, fits, hessian_plan, plan, soft_plan

ROWS_AND_CLASSES = tuple(itertools.product((1, 7, 4096, 10**6), (0, 1, 2, 10, 17, 100, 256, 257, 1000, 1003, 4096, 16384, 50257, 2**20)))


@pytest.mark.parametrize("labels", (1, 2))
@pytest.mark.parametrize(("itemsize", "aligned", "class_stride"), list(itertools.product((2, 4, 8), (True, False), (1, 49))))
def test_tiles_cover_every_row_and_class(itemsize: int, aligned: bool, class_stride: int, labels: int) -> None:
    for (rows, classes), gradient in itertools.product(ROWS_AND_CLASSES, (False, True)):
        p = plan(rows, classes, class_stride, [classes * class_stride], itemsize, aligned, 132, gradient, labels=labels)
        assert all(n & (n - 1) == 0 for n in (p.r, p.b, p.vector, p.warps))
        assert p.resident == fits(classes, itemsize, labels) and 1 <= p.warps <= 32
        assert p.registers is not None and 32 * p.warps * p.registers <= 65536, "ptxas does not look whether a multiprocessor has them"
        if not p.resident:
            assert_shared(p, rows, classes)
        elif p.access == ROWS:
            chunk = p.b * p.vector
            edges = 2 * p.align if p.start == 1 else 0
            assert p.a * chunk + edges >= classes and (p.a - 1) * chunk < classes and p.programs >= 1
            assert 2 <= p.a < 32, "the first chunk is full, and a bit for each"
            assert p.a * p.r * chunk <= 32 * p.warps * (64 if gradient else 128) * (1.5 if classes < 512 else 1.25), "elements a thread"
        else:
            assert p.a * p.b >= classes and p.programs >= 1
            assert p.a * p.r * p.b * itemsize <= 32 * p.warps * 512 * max(1, itemsize // 4), "elements a thread"
            assert p.access != FLAT or (p.run >= p.r * classes and p.r * classes * itemsize % 16 == 0)
        if p.keeps and classes > 256:
            assert_shared(plan(rows, classes, class_stride, [classes * class_stride], itemsize, aligned, 132, True, True), rows, classes)


@pytest.mark.parametrize("diversity", range(len(ops.DIVERSITIES)))
@pytest.mark.parametrize(("itemsize", "class_stride"), list(itertools.product((2, 4, 8), (1, 49))))
def test_tiles_of_class_probabilities(itemsize: int, class_stride: int, diversity: int) -> None:
    for rows, classes in ROWS_AND_CLASSES:
        p = soft_plan(rows, classes, [class_stride], [[classes * class_stride]], itemsize, 132, diversity)
        assert all(n & (n - 1) == 0 for n in (p.a, p.r, p.b, p.vector, p.warps)) and p.programs >= 1
        assert classes % p.vector == 0 and p.vector * max(itemsize, 4) <= 16 and (p.vector == 1 or class_stride == 1)
        assert p.b * p.vector >= 2, "with one the classes would be dealt out to threads as neighbours"
        assert p.r * p.b == 32 * p.warps, "a thread has part of one row, which no other thread has too"
        assert p.a * p.vector <= (32 if itemsize < 8 else 8), "elements a thread"
        assert 32 * p.warps * p.registers <= 65536


@pytest.mark.parametrize("labels", (1, 2))
@pytest.mark.parametrize(("itemsize", "contiguous"), list(itertools.product((2, 4, 8), (True, False))))
def test_tiles_of_the_second_derivative(itemsize: int, contiguous: bool, labels: int) -> None:
    for rows, classes in ROWS_AND_CLASSES:
        p = hessian_plan(rows, classes, contiguous, itemsize, 132, labels)
        assert all(n & (n - 1) == 0 for n in (p.a, p.r, p.b, p.warps)) and p.programs >= 1 and 1 <= p.warps <= 32
        assert p.r * p.b == 32 * p.warps, "a thread has part of one row, which no other thread has too"
        assert p.a <= (32 if itemsize < 8 else 8) // labels, "elements a thread"
        assert 32 * p.warps * p.registers <= 65536
        if p.run:
            assert contiguous and p.a * p.b >= classes and p.run >= p.r * classes and p.r * classes * itemsize % 16 == 0
        if classes <= 1024:
            assert p.a * p.b >= classes, "read once"


def test_neighbours_of_class_probabilities_begin_where_every_row_does() -> None:
    assert soft_plan(64, 1000, [1, 1], [[1000], [1000]], 2, 132, 1).vector == 4
    assert soft_plan(64, 1000, [1, 1], [[1000], [1002]], 2, 132, 1).vector == 2
    assert soft_plan(64, 1003, [1, 1], [[1003], [1003]], 2, 132, 1).vector == 1


def assert_shared(p: Plan, rows: int, classes: int) -> None:
    chunks = p.a * p.b * p.vector
    edges = 2 * p.align if p.start == 1 else 0
    assert p.splits * chunks + edges >= classes and p.programs == -(-rows // p.r) * p.splits
    assert (p.splits - 1) * chunks < classes + p.vector, "no program without work"


def test_few_classes_put_many_rows_in_a_program() -> None:
    assert plan(65536, 10, 1, [10], 2, True, 132).r >= 32


def test_few_long_rows_are_split_and_many_are_not() -> None:
    assert plan(2, 2**20, 1, [2**20], 2, True, 132).splits > 16
    assert plan(10**5, 128256, 1, [128256], 2, True, 132).splits == 1


def test_access() -> None:
    assert plan(64, 10, 1, [10], 2, True, 132).access == FLAT
    assert plan(64, 10, 1, [16], 2, True, 132).access == STRIDED
    assert plan(64, 10, 1, [10], 2, True, 132, same=False).access == STRIDED
    assert plan(64, 1003, 1, [1003], 2, True, 132).access == ROWS
    assert plan(64, 1003, 1, [1003], 2, False, 132).access == STRIDED


def test_where_rows_start() -> None:
    assert plan(64, 4096, 1, [4096], 2, True, 132).start == 16  # a memory sector of 32 bytes
    assert plan(64, 1000, 1, [1000], 2, True, 132).start == 8  # half of one
    assert plan(64, 1003, 1, [1003], 2, True, 132).start == 1
    assert plan(64, 1003, 1, [1008], 2, True, 132).start == 1, "its last vector is not whole"


def test_collapse_joins_what_strides_allow() -> None:
    assert collapse([2, 3, 4], [12, 4, 1], [12, 4, 1]) == ([24], [[1], [1]])
    assert collapse([2, 3, 4], [24, 4, 1], [12, 4, 1]) == ([2, 12], [[24, 1], [12, 1]])
    assert collapse([1, 5, 1], [9, 2, 7]) == ([5], [[2]])
    assert collapse([], []) == ([1], [[0]])
