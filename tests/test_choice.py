"""Choosing rows by place: chance, quality, coverage, necessity, and why the others are left out."""

from __future__ import annotations

import numpy as np
import pytest

from alignkit.scoring.choice import cover, draw, explain, extend, take_best

LINE = np.array([[0.0], [1.0], [2.0], [3.0], [10.0], [10.0]], np.float32)


def test_a_draw_takes_k_different_rows_and_accounts_for_the_others() -> None:
    choice = draw(10, 4, seed=1)
    assert len(set(choice.order)) == 4
    assert sorted([*choice.order, *choice.left_out]) == list(range(10))
    assert set(choice.left_out.values()) == {("not drawn", "")}
    assert draw(10, 4, seed=1).order == choice.order != draw(10, 4, seed=2).order


def test_a_draw_of_more_than_there_are_takes_all() -> None:
    assert sorted(draw(3, 5, seed=1).order) == [0, 1, 2]


def test_the_best_come_in_the_order_of_their_quality() -> None:
    choice = take_best([1.0, 5.0, 3.0, 4.0], 3, seed=1)
    assert choice.order == [1, 3, 2]
    assert list(choice.left_out) == [0]


def test_among_equals_chance_decides_and_not_the_place() -> None:
    orders = {tuple(take_best([2.0, 2.0, 2.0, 9.0], 2, seed=seed).order) for seed in range(20)}
    assert {order[0] for order in orders} == {3}
    assert {order[1] for order in orders} == {0, 1, 2}


def test_coverage_begins_with_the_best_row() -> None:
    found = cover(LINE, [0, 1, 0, 0, 0, 0], k=3, radius=None)
    assert found.centres == [1, 4, 3]  # farthest from 1 is 10; then 3, at distance 2
    assert found.radii == [9.0, 2.0, 1.0]


def test_coverage_to_a_radius() -> None:
    assert cover(LINE, [1, 0, 0, 0, 0, 0], k=None, radius=3.0).centres == [0, 4]


def test_necessary_rows_come_first_and_what_is_left_is_filled_up() -> None:
    found = extend(LINE, [0], necessary=[2, 3], k=4)
    assert found.order == [0, 3, 2, 4]
    assert found.kinds == {0: "seed", 3: "necessary", 2: "necessary", 4: "seed"}
    assert (found.seeds, found.needed) == (1, 2)


def test_a_necessary_row_that_is_a_copy_of_a_seed_is_not_chosen() -> None:
    found = extend(LINE, [4], necessary=[5], k=2)
    assert found.order == [4, 0] and found.needed == 0


def test_why_the_others_are_left_out() -> None:
    left_out, radius = explain(LINE, [3, 4], list("abcdef"), spared={1: 8.0, 5: 9.0})
    assert left_out == {
        0: ("covered by a selected row", "nearest is d, at distance 3.000"),
        1: ("not necessary", "initial answer scores 8; nearest is d, at distance 2.000"),
        2: ("covered by a selected row", "nearest is d, at distance 1.000"),
        5: ("copy of a selected row", "nearest is e, at distance 0.000"),
    }
    assert radius == pytest.approx(3.0)
