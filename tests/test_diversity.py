"""Coverage: every pick of the fast k-center selection against the definition, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignkit.scoring import diversity
from alignkit.scoring.diversity import Floats, k_center, k_center_greedy, nearest_centres


def oracle(embeddings: Floats, k: int, centres: list[int]) -> list[int]:
    """Greedy k-center from its definition: one centre at a time, differences in float64, copies never chosen."""
    rows = np.asarray(embeddings, dtype=np.float64)
    centres = list(centres)
    known, nearest = len(centres), np.full(len(rows), np.inf)
    for centre in centres:
        nearest = np.minimum(nearest, ((rows - rows[centre]) ** 2).sum(axis=1))
    while len(centres) - known < k and nearest.max() > 0:
        centres.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((rows - rows[centres[-1]]) ** 2).sum(axis=1))
    return centres[known:]


def released_code(embeddings: Floats, k: int, first: int) -> list[int]:
    """The picks of MoDS' code: float32 distances as scikit-learn works them out, and the lowest row of equals."""
    rows = np.asarray(embeddings, dtype=np.float64)
    squares, centres = np.einsum("ij,ij->i", rows, rows), [first]
    nearest = np.full(len(rows), np.inf, np.float32)
    while len(centres) < k:
        squared = -2 * (rows @ rows[centres[-1]]) + squares + squares[centres[-1]]
        nearest = np.minimum(nearest, np.sqrt(np.maximum(squared.astype(np.float32), 0)))
        centres.append(int(nearest.argmax()))
    return centres


def text_like(count: int, dimensions: int = 48, seed: int = 0) -> Floats:
    """Rows of length 1 in clusters, with variances that decay, as sentence embeddings have them: float32."""
    generator = np.random.default_rng(seed)
    scales = (1.0 + np.arange(dimensions)) ** -0.5
    topics = generator.normal(size=(count // 50 + 1, dimensions)) * scales
    rows = (
        topics[generator.integers(len(topics), size=count)] + 0.8 * generator.normal(size=(count, dimensions)) * scales
    )
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


@pytest.fixture(params=[16, 64, None], ids=["pool 16", "pool 64", "pool as shipped"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with sizes so small that a few hundred rows need all parts of the search."""
    if request.param is not None:
        monkeypatch.setattr(diversity, "_POOL_ROWS", request.param)
        monkeypatch.setattr(diversity, "_REFRESHED_ROWS", 2 * request.param)
        monkeypatch.setattr(diversity, "_BLOCK_CENTRES", 8)


# fmt: off
COUNT_60, COUNT_2000 = np.arange(60), np.arange(2000)
KNOWN_ORDERS = [
    ([[0], [1], [2], [3], [10]], 0, [0, 4, 3, 1, 2]),  # 10 is farthest; then 3; then 1 and 2 tie: the lower row
    ([[0, 0], [1, 0], [0, 1], [1, 1]], 0, [0, 3, 1, 2]),  # the diagonal first
    ([[0], [0], [5], [5]], 0, [0, 2]),
    ([[7]], 0, [0]),
    (np.stack([37 * COUNT_60 % 61, 23 * COUNT_60 % 59], axis=1), 5, [5, 18, 0, 23, 37, 58, 16, 20, 1, 22, 54, 3]),
    (
        np.stack([(7 * COUNT_2000**2 + 3 * COUNT_2000) % 97, (31 * COUNT_2000 + COUNT_2000 // 13) % 89,
                  COUNT_2000**3 % 83], axis=1),
        3,
        [3, 776, 1956, 484, 332, 582, 1857, 97, 566, 653, 1230, 229, 1157, 869, 1710],
    ),
    (
        np.random.default_rng(0).normal(size=(1000, 32)),
        684,
        [684, 453, 676, 696, 659, 934, 50, 897, 697, 751, 327, 96, 948, 320, 680, 919, 89, 627, 7, 249],
    ),
    (np.tile(np.random.default_rng(3).normal(size=(5, 16)), (2, 1)), 0, [0, 4, 3, 2, 1]),
]  # all but the third and fourth as found by running the code released with MoDS
# fmt: on


@pytest.mark.parametrize("compat", [False, True], ids=["exact", "compat"])
@pytest.mark.parametrize(("rows", "first", "expected"), KNOWN_ORDERS)
@pytest.mark.usefixtures("pool")
def test_known_orders(rows: Floats, first: int, expected: list[int], compat: bool) -> None:
    found = k_center_greedy(np.array(rows, dtype=np.float32), len(expected), first, compat=compat)
    assert found.tolist() == expected


@pytest.mark.parametrize("compat", [False, True], ids=["exact", "compat"])
@pytest.mark.usefixtures("pool")
def test_copies_are_never_centres(compat: bool) -> None:
    doubled = np.tile(np.random.default_rng(3).normal(size=(5, 16)), (2, 1)).astype(np.float32)
    for rows, first, different in (
        (np.array([[0], [0], [5], [5]]), 0, [0, 2]),
        (doubled, 0, [0, 4, 3, 2, 1]),
        (doubled, 7, [7, *oracle(doubled, 10, [7])]),
        (np.ones((300, 8), np.float32), 7, [7]),
        (np.zeros((300, 8), np.float16), 7, [7]),
    ):
        cover = k_center(rows, k=len(rows), first=first, compat=compat)
        assert cover.centres.tolist() == different
        assert cover.radii[-1] == 0
        assert np.all(cover.radii[:-1] > 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("pool")
def test_every_pick_is_the_oracles(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = (
        generator.normal(size=(400, 8)),
        np.round(generator.normal(size=(400, 6))),  # ties in masses, and copies
        np.sign(generator.normal(size=(400, 24))),  # more of them
        np.vstack([np.eye(150), 2 * np.eye(150)]),  # and all at once
        text_like(400, seed=seed),
        np.repeat(text_like(80, seed=seed), 5, axis=0),
        text_like(400, seed=seed) + 1e-4 * text_like(1, seed=seed),
        generator.normal(size=(400, 3)) * 10.0 ** generator.integers(-8, 8, size=(400, 1)),
    )[seed].astype(np.float32)
    for offset in (0, 100):
        shifted = rows + np.float32(offset)
        first = int(generator.integers(len(rows)))
        assert k_center_greedy(shifted, len(rows), first).tolist() == [first, *oracle(shifted, len(rows) - 1, [first])]


@pytest.mark.usefixtures("pool")
def test_mirrored_rows_tie_to_the_lowest() -> None:
    rows = text_like(150, seed=5)
    mirrored = np.vstack([np.zeros_like(rows[:1]), rows, -rows[::-1]])  # each pair at one distance from the centre
    assert k_center_greedy(mirrored, 301).tolist() == [0, *oracle(mirrored, 300, [0])]


@pytest.mark.parametrize("shape", [(3000, 48), (700, 5), (500, 1)])
@pytest.mark.usefixtures("pool")
def test_compat_makes_the_picks_of_the_released_code(shape: tuple[int, int]) -> None:
    rows = text_like(*shape, seed=4) if shape[1] > 1 else np.random.default_rng(4).normal(size=shape)
    rows = rows.astype(np.float32)
    assert k_center_greedy(rows, 300, 9, compat=True).tolist() == released_code(rows, 300, 9)


def test_compat_differs_where_float32_sees_a_tie() -> None:
    """Two squares one float64 step apart: float32 takes the lower row, float64 the farther."""
    rows = np.array([[0.0], [1.0], [-(1 + 2.0**-52)]])
    assert k_center_greedy(rows, 3).tolist() == [0, 2, 1]
    assert k_center_greedy(rows, 3, compat=True).tolist() == [0, 1, 2]


def test_float64_rows_are_not_rounded_before_they_are_compared() -> None:
    rows = 1e6 + np.random.default_rng(2).normal(size=(300, 4)) * 1e-3  # in float32 they would all be one row
    assert k_center_greedy(rows, 300, 5).tolist() == [5, *oracle(rows, 299, [5])]


def test_many_rows_agree_with_the_oracle() -> None:
    rows = text_like(20_000)
    assert k_center_greedy(rows, 300, 17).tolist() == [17, *oracle(rows, 299, [17])]


def test_layout_and_number_of_threads_do_not_matter(tmp_path: Path) -> None:
    rows = text_like(2100, 12)
    expected = [5, *oracle(rows, 59, [5])]
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for same in (rows, np.asfortranarray(rows), rows.astype(np.float64), np.repeat(rows, 2, axis=1)[:, ::2], mapped):
        assert k_center_greedy(same, 60, 5).tolist() == expected
    halves = rows.astype(np.float16)
    assert k_center_greedy(halves, 60, 5).tolist() == [5, *oracle(halves, 59, [5])]
    program = (
        "import sys, numpy; from alignkit.scoring.diversity import k_center_greedy; "
        "print(k_center_greedy(numpy.load(sys.argv[1]), 60, 5).tolist())"
    )
    for threads in ("1", "4"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "rows.npy")],
            env={"OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(expected)


@pytest.mark.usefixtures("pool")
def test_radii_are_those_of_the_definition() -> None:
    rows = text_like(500, 12)
    cover = k_center(rows, k=400, first=3)
    assert len(cover.centres) == len(cover.radii) == 400
    assert np.all(np.diff(cover.radii) <= 0)
    for count in (1, 2, 10, 100, 400):
        assert cover.radii[count - 1] == nearest_centres(rows, cover.centres[:count])[1].max()
    assert k_center(rows, k=500).radii[-1] == 0


@pytest.mark.usefixtures("pool")
def test_stops_as_soon_as_the_radius_is_reached() -> None:
    line = np.arange(11.0)[:, None]  # 0; 10 (radius 5); 5 (radius 2, by 2 and 3 and 7 and 8)
    cover = k_center(line, radius=2)
    assert cover.centres.tolist() == [0, 10, 5]
    assert cover.radii.tolist() == [10, 5, 2]
    assert k_center(line, radius=1.9).centres.tolist() == [0, 10, 5, 2, 7]
    assert k_center(line, radius=10).centres.tolist() == [0]
    assert k_center(line, radius=0).centres.tolist() == k_center_greedy(line, 11).tolist()
    assert k_center(line, k=2, radius=2).centres.tolist() == [0, 10]
    assert k_center(line, k=9, radius=2).centres.tolist() == [0, 10, 5]
    rows = text_like(600, 12)
    whole = k_center(rows, k=600, first=3)
    for count in (1, 2, 50, 300):  # a radius that has been seen is reached by the same centres
        cover = k_center(rows, radius=float(whole.radii[count - 1]), first=3)
        assert cover.centres.tolist() == whole.centres[:count].tolist()
        assert cover.radii.tolist() == whole.radii[:count].tolist()


@pytest.mark.parametrize("compat", [False, True], ids=["exact", "compat"])
@pytest.mark.usefixtures("pool")
def test_goes_on_from_centres_chosen_before(compat: bool) -> None:
    rows = text_like(500, 12)
    whole = k_center(rows, k=200, first=3, compat=compat)
    more = k_center(rows, k=150, chosen=whole.centres[:50], compat=compat)
    assert more.centres.tolist() == whole.centres[50:].tolist()
    assert more.radii.tolist() == whole.radii[50:].tolist()
    known = [7, 400, 7, 12]
    assert k_center(rows, k=100, chosen=np.array(known)).centres.tolist() == oracle(rows, 100, known)
    for done in (np.arange(500), np.arange(500)[::-1]):
        nothing = k_center(rows, k=3, chosen=done)
        assert nothing.centres.tolist() == nothing.radii.tolist() == []
    reached = k_center(rows, radius=float(whole.radii[49]), chosen=whole.centres[:50])
    assert reached.centres.tolist() == []


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"k": 4},
        {"k": 1, "first": 3},
        {"k": 1, "first": -1},
        {"k": 1, "chosen": np.array([0, 3])},
        {"radius": -1.0},
        {"radius": float("nan")},
        {},
    ],
)
def test_out_of_range_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must lie within the 3 rows|must be 0 or more|needs k, radius, or both"):
        k_center(np.eye(3), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_row(value: float, dtype: type) -> None:
    rows: Floats = np.ones((1200, 3), dtype)
    rows[1042, 1] = value
    with pytest.raises(ValueError, match="row 1042 of the embeddings must be finite"):
        k_center_greedy(rows, 2)
    with pytest.raises(ValueError, match="row 1042"):
        nearest_centres(rows, np.array([0]))


def test_what_is_no_matrix_is_refused() -> None:
    for shape in ((3,), (0, 4), (4, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match="must be a matrix"):
            k_center_greedy(np.zeros(shape), 1)
    with pytest.raises(ValueError, match="no centre"):
        nearest_centres(np.eye(3), np.array([], dtype=np.intp))


def test_nearest_centres_and_radius() -> None:
    rows = np.array([[0.0, 0], [3, 4], [0, 1], [6, 8]])
    nearest, distances = nearest_centres(rows, np.array([0, 3]))
    assert nearest.tolist() == [0, 0, 0, 1]  # (3, 4) is 5 from both: the first of equals
    assert distances.tolist() == [0, 5, 1, 0]


@pytest.mark.parametrize("offset", [0, 100])
def test_nearest_centres_are_those_of_the_definition(offset: float) -> None:
    rows = np.round(text_like(1500, 6) * 8) + np.float32(offset)  # many rows are at one distance from several centres
    centres = k_center_greedy(rows, 300)
    squares = ((rows[:, None].astype(np.float64) - rows[centres]) ** 2).sum(axis=2)
    nearest, distances = nearest_centres(rows, centres)
    assert np.array_equal(nearest, squares.argmin(axis=1))
    assert np.array_equal(distances, np.sqrt(squares.min(axis=1)))


def test_memory_beside_the_rows_is_small() -> None:
    """At most 100 MB beside 100,000 rows of 384: here a fifth of them, with numpy's allocations counted."""
    import tracemalloc

    rows = text_like(20_000, 384)
    tracemalloc.start()
    k_center_greedy(rows, 400)
    nearest_centres(rows, np.arange(400))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_rows_far_from_the_origin_are_as_easy_to_tell_apart() -> None:
    rows = text_like(500, 12)
    there, here = (diversity._Search(rows + np.float32(offset), [0]).error for offset in (100, 0))
    assert there == pytest.approx(here, rel=0.5)  # without the move to the middle it would be 10,000 times larger


def test_needs_no_model_library() -> None:
    program = (
        "import sys; from alignkit.scoring.diversity import k_center_greedy; k_center_greedy([[0], [1]], 2); "
        "print({'torch', 'transformers', 'sklearn', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
