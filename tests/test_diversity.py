"""Coverage: the embedding without a model, and greedy k-center against a slow oracle."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from alignkit.scoring.diversity import Floats, character_embeddings, k_center_greedy, nearest_centres


def oracle(embeddings: Floats, k: int, first: int) -> list[int]:
    """Greedy k-center from its definition: all distances anew at every step, in float64, duplicates never chosen."""
    rows = np.asarray(embeddings, dtype=np.float64)
    centres = [first]
    while len(centres) < k:
        distances = [min(float(np.sum((row - rows[centre]) ** 2)) for centre in centres) for row in rows]
        if max(distances) == 0:
            break
        centres.append(distances.index(max(distances)))
    return centres


@pytest.mark.parametrize(
    ("rows", "k", "expected"),
    [
        ([[0], [1], [2], [3], [10]], 5, [0, 4, 3, 1, 2]),  # 10 is farthest; then 3; then 1 and 2 tie: the lower row
        ([[0, 0], [1, 0], [0, 1], [1, 1]], 4, [0, 3, 1, 2]),  # the diagonal first
        ([[0], [0], [5], [5]], 2, [0, 2]),
        ([[0], [0], [5], [5]], 3, [0, 2]),  # what is left are copies
        ([[7]], 1, [0]),
    ],
)
def test_order_of_centres_by_hand(rows: list[list[int]], k: int, expected: list[int]) -> None:
    assert k_center_greedy(np.array(rows, dtype=np.float32), k).tolist() == expected


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_the_oracle(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(60, 8)).astype(np.float32)
    if seed % 2:  # ties and copies
        rows = np.round(rows)
    rows[40:50] = rows[:10]
    for offset in (0, 100):
        shifted = rows + np.float32(offset)
        first = int(generator.integers(60))
        assert k_center_greedy(shifted, 60, first).tolist() == oracle(shifted, 60, first)


def test_layout_and_block_borders_do_not_matter() -> None:
    rows = np.random.default_rng(1).normal(size=(2100, 6)).astype(np.float32)
    expected = k_center_greedy(rows, 30, 5).tolist()
    assert k_center_greedy(np.asfortranarray(rows), 30, 5).tolist() == expected
    assert k_center_greedy(rows.astype(np.float64), 30, 5).tolist() == expected
    assert k_center_greedy(np.repeat(rows, 2, axis=1)[:, ::2], 30, 5).tolist() == expected


@pytest.mark.parametrize(("k", "first"), [(0, 0), (4, 0), (1, 3), (1, -1)])
def test_out_of_range_is_refused(k: int, first: int) -> None:
    with pytest.raises(ValueError, match="within the 3 rows"):
        k_center_greedy(np.eye(3), k, first)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        k_center_greedy(np.array([[0.0], [np.nan]]), 1)


def test_nearest_centres_and_radius() -> None:
    rows = np.array([[0.0, 0], [3, 4], [0, 1], [6, 8]])
    nearest, distances = nearest_centres(rows, np.array([0, 3]))
    assert nearest.tolist() == [0, 0, 0, 1]  # (3, 4) is 5 from both: the first of equals
    assert distances == pytest.approx([0, 5, 1, 0])


def test_each_further_centre_shrinks_the_radius() -> None:
    rows = np.random.default_rng(2).normal(size=(200, 5))
    radii = [nearest_centres(rows, k_center_greedy(rows, k))[1].max() for k in (1, 5, 25, 125, 200)]
    assert radii == sorted(radii, reverse=True)
    assert radii[-1] == pytest.approx(0, abs=1e-6)


def test_embedding_is_normalised_and_repeatable() -> None:
    texts = ["Where was Pezus born?", "帕得拉的市长是谁？", "", "Where  was PEZUS born?"]
    embeddings = character_embeddings(texts)
    assert embeddings.shape == (4, 256)
    assert embeddings.dtype == np.float32
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx([1, 1, 0, 1], abs=1e-6)
    assert np.array_equal(embeddings[0], embeddings[3])  # case and spaces are folded: a copy, at distance zero
    assert np.array_equal(embeddings, character_embeddings(texts))
    assert character_embeddings([]).shape == (0, 256)


def test_similar_texts_lie_closer_than_others() -> None:
    a, b, c, d = character_embeddings(
        [
            "Which bus serves Padera on Monday morning?",
            "Which bus serves Vufura on Monday morning?",
            "水电费由乙方承担。",
            "水电费由甲方承担。",
        ]
    )
    assert a @ b > 0.4 > abs(a @ c)
    assert c @ d > 0.4 > abs(b @ d)


def test_projection_keeps_cosines() -> None:
    """With 4096 dimensions the sparse projection is nearly exact; 256 must agree with it to about 1 / sqrt(256)."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefghij"), 5)) for _ in range(40)]
    texts = [" ".join(generator.choice(words, 12)) for _ in range(60)]
    wide, narrow = (character_embeddings(texts, dimensions) for dimensions in (4096, 256))
    difference = (wide @ wide.T - narrow @ narrow.T)[~np.eye(60, dtype=bool)]
    assert np.sqrt(np.mean(difference**2)) < 1.5 / np.sqrt(256)


def test_needs_no_model_library() -> None:
    program = (
        "import sys; from alignkit.scoring.diversity import character_embeddings; character_embeddings(['a b']); "
        "print({'torch', 'transformers', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
