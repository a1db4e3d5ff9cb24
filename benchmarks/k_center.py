"""k-center selection against the code released with MoDS and other ways: the same centres, and the time they take.

    OMP_NUM_THREADS=1 python benchmarks/k_center.py [--embeddings FILE.npy] [--large]

Needs `pip install scikit-learn` for the reference algorithm, which is written here after its description: for each
centre the float32 distances of scikit-learn, the builtin `max` over an (n, 1) array for a progress line, and a search
of a list of centres. Without FILE (float32, one row a text) embeddings are made up: rows of length 1, in clusters, with
variances that decay as those of sentence embeddings do.

CPU seconds of one process, the lowest of some repeats. Where the reference would take minutes, it is timed on some
centres and scaled to all; the column "centres" says how many were chosen in the time that was measured. `--large` makes
1,000,000 rows as float16 and float32 files and selects 5,000 from each in a process of its own, which maps the file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from alignkit.scoring.diversity import Floats, k_center, k_center_greedy

DIMENSIONS, BLOCK_ROWS = 384, 8192
SIZES = ((20_000, 500, 500, 500), (100_000, 2_000, 30, 200))
"""Rows, k, and the numbers of centres that the reference and the ways of one product a centre are timed on."""
LARGE_ROWS, LARGE_K = 1_000_000, 5_000
REPEATS = 3


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=Path, help="float32 rows in numpy's format, instead of made-up ones")
    parser.add_argument("--large", action="store_true", help="also 1,000,000 rows, memory-mapped")
    parser.add_argument("--select", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.select:
        select_from_file(arguments.select)
        return
    given = np.load(arguments.embeddings).astype(np.float32) if arguments.embeddings else None
    print(f"embeddings: {arguments.embeddings or 'made up'}; CPU seconds, one process")
    for rows, k, reference_steps, product_steps in SIZES:
        if given is None:
            compare(made_up(rows), k, reference_steps, product_steps)
        elif len(given) >= rows // 2:
            compare(given[:rows], k, reference_steps, product_steps)
    if arguments.large:
        for name in ("float32", "float16"):
            measure_large(name)


def compare(embeddings: Floats, k: int, reference_steps: int, product_steps: int) -> None:
    """Time all ways on the same rows with the same first centre, and compare what they choose."""
    methods: list[tuple[str, int, Callable[[int], list[int]]]] = [
        ("reference (MoDS)", reference_steps, lambda count: reference(embeddings, count, True)),
        ("reference without max()", reference_steps, lambda count: reference(embeddings, count, False)),
        (
            "float64, a product a centre",
            product_steps,
            lambda count: one_product_a_centre(embeddings, count, np.float64),
        ),
        (
            "float32, a product a centre",
            product_steps,
            lambda count: one_product_a_centre(embeddings, count, np.float32),
        ),
        ("alignkit, exact", k, lambda count: k_center_greedy(embeddings, count).tolist()),
        ("alignkit, compat", k, lambda count: k_center_greedy(embeddings, count, compat=True).tolist()),
    ]
    print(f"\n{len(embeddings):,} x {embeddings.shape[1]}, k = {k:,}")
    print(f"{'':30s}{'CPU s':>9s}{'centres':>9s}{'x reference':>13s}{'x float32':>11s}")
    seconds, chosen = {}, {}
    for name, count, select in methods:
        repeats = REPEATS if count == k else 1
        measured, chosen[name] = min(cpu_seconds(select, count) for _ in range(repeats))
        seconds[name] = measured * (k - 1) / (count - 1)
    for name, count, _ in methods:
        against_reference = seconds["reference (MoDS)"] / seconds[name]
        against_product = seconds["float32, a product a centre"] / seconds[name]
        print(f"{name:30s}{seconds[name]:9.3f}{count:9d}{against_reference:13.1f}{against_product:11.2f}")
    exact, compat = chosen["alignkit, exact"], chosen["alignkit, compat"]
    judged = one_product_a_centre(embeddings, k, np.float64)
    print(f"exact: {equal(exact, judged)} centres are those of float64 products, a product a centre")
    print(f"compat: {equal(compat, chosen['reference (MoDS)'])} timed centres are those of the reference")
    print(f"compat and exact differ in {sum(one != other for one, other in zip(compat, exact, strict=True))} places")


def reference(embeddings: Floats, count: int, with_max: bool) -> list[int]:
    """The released algorithm, from the first row on."""
    from sklearn.metrics.pairwise import euclidean_distances

    centres = [0]
    nearest = euclidean_distances(embeddings, embeddings[centres])
    while len(centres) < count:
        row = int(np.argmax(nearest))
        assert row not in centres
        nearest = np.minimum(nearest, euclidean_distances(embeddings, embeddings[[row]]))
        centres.append(row)
        if with_max:
            max(nearest)
    return centres


def one_product_a_centre(embeddings: Floats, count: int, dtype: type[np.floating]) -> list[int]:
    """What one writes with numpy: squared lengths once, then a matrix-vector product and a running minimum a centre."""
    rows = embeddings.astype(dtype, copy=False)
    squares = np.einsum("ij,ij->i", rows, rows)
    centres = [0]
    nearest = np.full(len(rows), np.inf, dtype)
    while len(centres) < count:
        distances = rows @ (-2 * rows[centres[-1]])
        distances += squares
        distances += squares[centres[-1]]
        np.minimum(nearest, distances, out=nearest)
        centres.append(int(nearest.argmax()))
    return centres


def cpu_seconds(select: Callable[[int], list[int]], count: int) -> tuple[float, list[int]]:
    """CPU seconds of a selection, and what it chose."""
    began = time.process_time()
    centres = select(count)
    return time.process_time() - began, centres


def equal(found: list[int], expected: list[int]) -> str:
    """How many places agree, in words."""
    return f"{sum(one == other for one, other in zip(found, expected, strict=False))} of {len(expected)}"


def made_up(rows: int, seed: int = 0) -> Floats:
    """Rows in clusters of about 50, with variances that decay as 1 / (1 + j), of length 1: float32."""
    embeddings = np.empty((rows, DIMENSIONS), np.float32)
    fill(embeddings, seed)
    return embeddings


def fill(embeddings: Floats, seed: int) -> None:
    """Write made-up rows, in blocks, into an array that may be a file."""
    generator = np.random.default_rng(seed)
    scales = ((1.0 + np.arange(DIMENSIONS)) ** -0.5).astype(np.float32)
    topics = generator.standard_normal((len(embeddings) // 50, DIMENSIONS), np.float32) * scales
    for start in range(0, len(embeddings), BLOCK_ROWS):
        count = min(BLOCK_ROWS, len(embeddings) - start)
        block = 0.8 * generator.standard_normal((count, DIMENSIONS), np.float32) * scales
        block += topics[generator.integers(len(topics), size=count)]
        embeddings[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)


def measure_large(dtype: str) -> None:
    """Make a file of 1,000,000 rows, and select from it in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        rows = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(LARGE_ROWS, DIMENSIONS))
        fill(rows, 0)
        rows.flush()
        del rows
        print(f"\n{LARGE_ROWS:,} x {DIMENSIONS} {dtype}, memory-mapped, {path.stat().st_size / 1e9:.2f} GB, ", end="")
        print(f"k = {LARGE_K:,}", flush=True)
        subprocess.run([sys.executable, __file__, "--select", str(path)], check=True)


def select_from_file(path: Path) -> None:
    """Select 5,000 rows of a mapped file, and print time and memory."""
    embeddings = np.load(path, mmap_mode="r")
    wall, cpu = time.perf_counter(), time.process_time()
    cover = k_center(embeddings, k=min(LARGE_K, len(embeddings)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{len(cover.centres):,} centres, radius {cover.radii[0]:.3f} to {cover.radii[-1]:.3f}")
    print(f"{cpu:.1f} CPU s, {wall:.1f} s by the clock; peak memory {peak_gibibytes():.2f} GiB, mapped file included")


def peak_gibibytes() -> float:
    """Highest resident memory of this process since it started (Linux; `getrusage` would count its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


if __name__ == "__main__":
    main()
