"""Passages in PostgreSQL: BM25 over an inverted index in plain tables, vectors by the extension pgvector.

PostgreSQL's own text search knows no BM25 (its ranks ignore how rare a word is) and no Chinese words. So each token of
a passage, made as everywhere in alignkit, is a row of `postings`, and a query is one statement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from alignkit.core.errors import UserError, first_line
from alignkit.core.retrieval_config import SearchMode
from alignkit.retrieval.base import Passage
from alignkit.retrieval.bm25 import K1, B, tokens
from alignkit.retrieval.embedder import RetrievalEmbedder, searched_text
from alignkit.retrieval.fusion import Ranking
from alignkit.retrieval.server_index import ServerIndex, Vector

_MOST_GRAPH_DIMENSIONS = 2000
"""Of pgvector's HNSW graph over 32-bit numbers."""

_TABLES = """
CREATE TABLE IF NOT EXISTS {schema}.settings (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE IF NOT EXISTS {schema}.passages (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id text COLLATE "C" UNIQUE NOT NULL, digest text NOT NULL,
    text text NOT NULL, title text NOT NULL, document text, page integer, tokens integer NOT NULL
);
CREATE TABLE IF NOT EXISTS {schema}.postings (
    token text COLLATE "C" NOT NULL, number bigint NOT NULL REFERENCES {schema}.passages ON DELETE CASCADE,
    times integer NOT NULL, PRIMARY KEY (token, number)
);
CREATE INDEX IF NOT EXISTS postings_number ON {schema}.postings (number);
CREATE INDEX IF NOT EXISTS passages_document ON {schema}.passages (document);
"""
_BY_WORDS = """
WITH asked AS (
    SELECT * FROM unnest(%(queries)s::int[], %(tokens)s::text[], %(times)s::int[]) AS q (query, token, times)
),
held AS (SELECT greatest(count(*), 1) AS passages, greatest(avg(tokens), 1)::float8 AS tokens FROM {schema}.passages),
rarity AS (
    SELECT token, ln(1 + (held.passages - count(*) + 0.5) / (count(*) + 0.5))::float8 AS idf
    FROM {schema}.postings, held WHERE token = ANY(%(tokens)s) GROUP BY token, held.passages
),
scored AS (
    SELECT asked.query, passages.id, round(sum(
        asked.times * rarity.idf * postings.times
        / (postings.times + %(k1)s * (1 - %(b)s + %(b)s * passages.tokens / held.tokens))
    )::numeric, 6) AS score
    FROM asked JOIN rarity USING (token) JOIN {schema}.postings USING (token)
    JOIN {schema}.passages USING (number) CROSS JOIN held
    WHERE %(documents)s::text[] IS NULL OR passages.document = ANY(%(documents)s)
    GROUP BY asked.query, passages.id
),
ranked AS (SELECT *, row_number() OVER (PARTITION BY query ORDER BY score DESC, id) AS rank FROM scored)
SELECT query, id, score FROM ranked WHERE rank <= %(k)s AND score > 0 ORDER BY query, rank
"""
_BY_VECTORS = """
SELECT id, round((1 - (vector <=> %(query)s))::numeric, 6) AS score FROM {schema}.passages
WHERE vector IS NOT NULL AND (%(documents)s::text[] IS NULL OR document = ANY(%(documents)s))
ORDER BY score DESC, id LIMIT %(k)s
"""
_BY_GRAPH = """
SELECT id, round((1 - distance)::numeric, 6) AS score FROM (
    SELECT id, vector <=> %(query)s AS distance FROM {schema}.passages
    WHERE vector IS NOT NULL AND (%(documents)s::text[] IS NULL OR document = ANY(%(documents)s))
    ORDER BY vector <=> %(query)s LIMIT %(k)s
) AS nearest ORDER BY score DESC, id
"""


class PostgresIndex(ServerIndex):
    """Passages in a schema of a PostgreSQL database.

    Scores are those of the embedded engine. Each block of passages is one transaction: what a kill or a lost connection
    leaves undone, the same call does later, without duplicates. `approximate` lets an HNSW graph find neighbours.
    """

    NOUN = "schema"

    def __init__(
        self,
        url: str,
        name: str,
        embedder: RetrievalEmbedder | None = None,
        mode: SearchMode = SearchMode.hybrid,
        *,
        password: str | None = None,
        candidates: int = 100,
        rrf_k: int = 60,
        approximate: bool = False,
    ) -> None:
        super().__init__(url, name, embedder, mode, candidates=candidates, rrf_k=rrf_k, approximate=approximate)
        with self._explained():
            self._connection = _connect(url, password)
            self._made = self._look()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # -- changing ---------------------------------------------------------------------------------------------------

    def _store(self, rows: Sequence[tuple[Passage, str, Vector | None]]) -> None:
        ids = [passage.id for passage, _, _ in rows]
        counts = [Counter(tokens(searched_text(passage))) for passage, _, _ in rows]
        with self._connection.transaction(), self._connection.cursor() as cursor:
            self._run("DELETE FROM {schema}.passages WHERE id = ANY(%s)", [ids])
            columns = "id, digest, text, title, document, page, tokens" + (", vector" if self.embedder else "")
            with cursor.copy(self._sql(f"COPY {{schema}}.passages ({columns}) FROM STDIN")) as copy:
                for (passage, digest, vector), count in zip(rows, counts, strict=True):
                    row = [passage.id, digest, passage.text, passage.title, passage.document, passage.page]
                    copy.write_row([*row, count.total(), *([vector] if self.embedder else [])])
            numbers = dict(self._run("SELECT id, number FROM {schema}.passages WHERE id = ANY(%s)", [ids]))
            with cursor.copy(self._sql("COPY {schema}.postings (token, number, times) FROM STDIN")) as copy:
                for (passage, _, _), count in zip(rows, counts, strict=True):
                    for token, times in count.items():
                        copy.write_row([token, numbers[passage.id], times])

    def _remove(self, ids: Sequence[str]) -> None:
        self._run("DELETE FROM {schema}.passages WHERE id = ANY(%s)", [ids])

    def _finish(self) -> None:
        self._run("ANALYZE {schema}.passages")
        self._run("ANALYZE {schema}.postings")

    # -- searching --------------------------------------------------------------------------------------------------

    def by_words(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By BM25 (the formula is that of `BM25Index`), all queries in one statement."""
        asked = [
            (query, token, times)
            for query, text in enumerate(queries)
            for token, times in Counter(tokens(text)).items()
        ]
        numbers, words, times = (list(column) for column in zip(*asked, strict=True)) if asked else ([], [], [])
        found: list[Ranking] = [[] for _ in queries]
        values = {"queries": numbers, "tokens": words, "times": times, "k1": K1, "b": B, "k": k}
        for query, id, score in self._run(_BY_WORDS, {**values, "documents": _list(documents)}):
            found[query].append((id, float(score)))
        return found

    def by_vectors(self, queries: Sequence[str], k: int, documents: Collection[str] | None) -> list[Ranking]:
        """By cosine; a query of zeros is similar to nothing."""
        assert self.embedder is not None
        statement = _BY_GRAPH if self.approximate else _BY_VECTORS
        found: list[Ranking] = []
        with self._connection.transaction():
            if self.approximate:
                self._run(f"SET LOCAL hnsw.ef_search = {min(1000, max(40, k))}")
            for vector in self.embedder.embed_queries(queries):
                values = {"query": vector, "k": k, "documents": _list(documents)}
                rows = self._run(statement, values) if vector.any() else []
                found.append([(id, float(score)) for id, score in rows])
        return found

    def passages(self, ids: Collection[str]) -> Mapping[str, Passage]:
        """The passages of these ids that are there."""
        query = "SELECT id, text, title, document, page FROM {schema}.passages WHERE id = ANY(%s)"
        return {
            id: Passage(id=id, text=text, title=title, document=document, page=page)
            for id, text, title, document, page in self._run(query, [list(ids)])
        }

    def _count(self) -> int:
        return int(self._one("SELECT count(*) FROM {schema}.passages"))

    def _all_ids(self) -> list[str]:
        return [id for (id,) in self._run("SELECT id FROM {schema}.passages")]

    def _digests(self, ids: Sequence[str]) -> dict[str, str]:
        return dict(self._run("SELECT id, digest FROM {schema}.passages WHERE id = ANY(%s)", [ids]))

    # -- the server -------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Make the schema, its tables and, with an embedder, the column of vectors."""
        with self._connection.transaction():
            self._run("SELECT pg_advisory_xact_lock(hashtext(%s))", [self.name])
            self._run("CREATE SCHEMA IF NOT EXISTS {schema}")
            self._connection.execute(self._sql(_TABLES))
            if self.embedder is not None:
                self._run("CREATE EXTENSION IF NOT EXISTS vector")
                column = f"ADD COLUMN IF NOT EXISTS vector vector({self.embedder.dimensions})"
                self._run(f"ALTER TABLE {{schema}}.passages {column}")
                for key, value in (("embedder", self.embedder.key), ("name", self.embedder.name)):
                    self._run("INSERT INTO {schema}.settings VALUES (%s, %s) ON CONFLICT DO NOTHING", [key, value])

    def _make_ready(self) -> None:
        """Make the graph of vectors, too, where it is wanted."""
        super()._make_ready()
        if self.approximate and self.embedder is not None:
            if self.embedder.dimensions > _MOST_GRAPH_DIMENSIONS:
                raise UserError(
                    f"retrieval.approximate=true: pgvector's graph takes {_MOST_GRAPH_DIMENSIONS} dimensions, and "
                    f"{self.embedder.name} has {self.embedder.dimensions}. Set it to false."
                )
            self._run(
                "CREATE INDEX IF NOT EXISTS passages_vector ON {schema}.passages USING hnsw (vector vector_cosine_ops)"
            )

    def _check_embedder(self) -> None:
        """Teach the connection what a vector is, too."""
        super()._check_embedder()
        if self.embedder is not None:
            from pgvector.psycopg import register_vector

            register_vector(self._connection)

    def _exists(self) -> bool:
        return bool(self._one("SELECT to_regclass(%s) IS NOT NULL", [f'"{self.name}".settings']))

    def _settings(self) -> dict[str, str]:
        return dict(self._run("SELECT key, value FROM {schema}.settings"))

    def _run(self, statement: str, values: Any = None) -> list[Any]:
        cursor = self._connection.execute(self._sql(statement), values)
        return list(cursor.fetchall()) if cursor.description else []

    def _one(self, statement: str, values: Any = None) -> Any:
        return self._run(statement, values)[0][0]

    def _sql(self, statement: str) -> Any:
        from psycopg import sql

        return sql.SQL(statement).format(schema=sql.Identifier(self.name))

    @property
    def _place(self) -> str:
        return self.url.partition("?")[0]  # what stands behind may be secret

    @contextmanager
    def _explained(self) -> Iterator[None]:
        psycopg = _psycopg()
        try:
            yield
        except psycopg.OperationalError as error:
            raise UserError(
                f"retrieval.url: the database at {self._place} does not answer ({first_line(error)}). Start it, "
                "or correct retrieval.url and retrieval.api_key_env; the same command then continues"
            ) from error
        except psycopg.Error as error:
            raise UserError(f"the database at {self._place}, schema {self.name}: {first_line(error)}") from error


def _connect(url: str, password: str | None) -> Any:
    return _psycopg().connect(url, autocommit=True, connect_timeout=10, **({"password": password} if password else {}))


def _psycopg() -> Any:
    try:
        import pgvector.psycopg  # noqa: F401
        import psycopg
    except ImportError as error:
        raise UserError("PostgreSQL needs psycopg and pgvector: pip install 'alignkit[postgres]'") from error
    return psycopg


def _list(documents: Collection[str] | None) -> list[str] | None:
    return None if documents is None else list(documents)
