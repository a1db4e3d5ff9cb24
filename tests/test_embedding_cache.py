"""The cache of vectors: keyed by model and text, and nothing damaged ever comes out of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignkit.core.errors import UserError
from alignkit.scoring.embedding import Vectors
from alignkit.scoring.embedding_cache import EmbeddingCache

WRITES_ALONGSIDE = """
import sys
from pathlib import Path
import numpy as np
from alignkit.scoring.embedding_cache import EmbeddingCache

with EmbeddingCache(Path(sys.argv[1])) as cache:
    print("ready", flush=True)
    sys.stdin.readline()
    for start in range(0, 400, 10):
        cache.put("model", {str(n): np.full(8, n, np.float32) for n in range(start, start + 20)})
"""


def vector(*numbers: float) -> Vectors:
    return np.array(numbers, dtype=np.float32)


def test_a_vector_comes_back_exactly_and_the_latest_counts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.sqlite"
    with EmbeddingCache(path) as cache:
        cache.put("model", {"a": vector(1 / 3, 2), "": vector(0, 0), "文": vector(5, 6)})
        cache.put("model", {"a": vector(0.1, -2)})
    with EmbeddingCache(path) as cache:
        found = cache.get("model", ["a", "", "文", "other"], 2)
        assert list(found) and found["a"].tolist() == vector(0.1, -2).tolist()
        assert set(found) == {"a", "", "文"}
        assert found["a"].dtype == np.float32
        assert cache.count() == 3


def test_another_model_is_another_vector(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path / "cache.sqlite") as cache:
        cache.put("one model", {"a": vector(1, 2)})
        assert cache.get("another model", ["a"], 2) == {}


def test_more_texts_than_one_query_takes(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path / "cache.sqlite") as cache:
        cache.put("model", {str(number): vector(number) for number in range(1700)})
        found = cache.get("model", [str(number) for number in range(2000)], 1)
    assert {text: float(numbers[0]) for text, numbers in found.items()} == {str(n): n for n in range(1700)}


@pytest.mark.parametrize(
    "damage",
    [
        "vector = zeroblob(12)",  # the right size, other bytes
        "vector = zeroblob(5)",
        "vector = ''",
        "vector = 'text of 12 b'",
        "vector = 7",
        "vector = (SELECT vector FROM vectors WHERE rowid = 2)",  # another text's
    ],
)
def test_a_damaged_vector_is_not_returned(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddingCache(tmp_path / "cache.sqlite") as cache:
        cache.put("model", {"a": vector(1, 2)})
        cache.put("model", {"b": vector(3, 4)})
        cache._database.execute(f"UPDATE vectors SET {damage} WHERE rowid = 1")
        assert set(cache.get("model", ["a", "b"], 2)) == {"b"}
    assert "1 vectors are damaged" in caplog.text


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path / "cache.sqlite") as cache:
        cache.put("model", {"a": vector(1, 2)})
        content = cache._database.execute("SELECT vector FROM vectors").fetchone()[0]
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            cache._database.execute("UPDATE vectors SET vector = ?", (bytes(flipped),))
            assert cache.get("model", ["a"], 2) == {}


def test_a_vector_of_another_size_is_not_returned(tmp_path: Path) -> None:
    with EmbeddingCache(tmp_path / "cache.sqlite") as cache:
        cache.put("model", {"a": vector(1, 2)})
        assert cache.get("model", ["a"], 3) == {}


def test_a_file_that_is_no_cache_is_explained_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n" * 200, encoding="utf-8")
    with pytest.raises(UserError, match=r"notes\.txt.*delete the file"), EmbeddingCache(path):
        pass
    assert path.read_text(encoding="utf-8") == "my notes\n" * 200
    with pytest.raises(UserError, match="unable to open"), EmbeddingCache(tmp_path):
        pass


def test_a_torn_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with EmbeddingCache(path) as cache:
        cache.put("model", {str(number): vector(*range(100)) for number in range(100)})
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(UserError, match="delete the file"), EmbeddingCache(path) as cache:
        cache.get("model", [str(number) for number in range(100)], 100)


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    command = [sys.executable, "-c", WRITES_ALONGSIDE, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60) and process.returncode for process in processes] == [0, 0]
    with EmbeddingCache(path) as cache:
        found = cache.get("model", [str(number) for number in range(410)], 8)
    assert {text: set(numbers.tolist()) for text, numbers in found.items()} == {str(n): {n} for n in range(410)}
