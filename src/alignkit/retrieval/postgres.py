"""Passages in PostgreSQL: BM25 over an inverted index in plain tables, vectors by the extension pgvector.

PostgreSQL's own text search knows no BM25 (its ranks ignore how rare a word is) and no Chinese words. So each token of
a passage, made as everywhere in alignkit, is a row of `postings`, and a query is one statement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from alignkit.core.config import SearchMode
from alignkit.core.errors import UserError, first_line
from alignkit.retrieval.base import Found, Passage
from alignkit.retrieval.bm25 import tokens
from alignkit.retrieval.embedded import require_embedder
from alignkit.retrieval.embedder import RetrievalEmbedder, searched_text
from alignkit.retrieval.fusion import Ranking, search_rankings
from alignkit.retrieval.ingest import blocks, digest, some_at_a_time, without_repeats

K1, B = 1.5, 0.75
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


class PostgresIndex:
    """A `Retriever` in a schema of a PostgreSQL database. `embedder` is needed for every mode but bm25.

    Scores are those of the embedded engine. Each block of passages is one transaction: what a kill or a lost connection
    leaves undone, the same call does later, without duplicates. `approximate` lets an HNSW graph find neighbours.
    """

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
        self.url, self.name, self.mode, self.approximate = url, name, mode, approximate
        self.embedder = embedder if mode is not SearchMode.bm25 else None
        self.candidates, self.rrf_k = candidates, rrf_k
        with self._explained():
            self._connection = _connect(url, password)
            self._made = self._look()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __len__(self) -> int:
        with self._explained():
            self._require()
            return int(self._one("SELECT count(*) FROM {schema}.passages"))

    # -- changing ---------------------------------------------------------------------------------------------------

    def index(self, passages: Iterable[Passage]) -> None:
        """Hold these passages and no others; those that are there already, unchanged, cost next to nothing."""
        seen: set[str] = set()
        self.add(without_repeats(passages, seen))
        with self._explained():
            held = [id for (id,) in self._run("SELECT id FROM {schema}.passages") if id not in seen]
        self.delete(held)

    def add(self, passages: Iterable[Passage]) -> None:
        """Hold these as well, block by block."""
        with self._explained():
            self._create()
            for block in blocks(passages):
                self._add(block)
            self._run("ANALYZE {schema}.passages")
            self._run("ANALYZE {schema}.postings")
        if self.embedder is not None:
            self.embedder.warn_of_cut()

    def delete(self, ids: Iterable[str]) -> None:
        """Hold these no longer."""
        with self._explained():
            self._require()
            for block in some_at_a_time(ids):
                self._run("DELETE FROM {schema}.passages WHERE id = ANY(%s)", [block])

    def _add(self, block: Sequence[Passage]) -> None:
        ids = [passage.id for passage in block]
        held = dict(self._run("SELECT id, digest FROM {schema}.passages WHERE id = ANY(%s)", [ids]))
        digests = {passage.id: digest(passage) for passage in block}
        new = [passage for passage in block if held.get(passage.id) != digests[passage.id]]
        if not new:
            return
        counts = [Counter(tokens(searched_text(passage))) for passage in new]
        vectors: Sequence[Any] = [None] * len(new)
        if self.embedder is not None:
            vectors = [vector if vector.any() else None for vector in self.embedder.embed_passages(new)]
        with self._connection.transaction(), self._connection.cursor() as cursor:
            self._run("DELETE FROM {schema}.passages WHERE id = ANY(%s)", [[passage.id for passage in new]])
            columns = "id, digest, text, title, document, page, tokens" + (", vector" if self.embedder else "")
            with cursor.copy(self._sql(f"COPY {{schema}}.passages ({columns}) FROM STDIN")) as copy:
                for passage, count, vector in zip(new, counts, vectors, strict=True):
                    row = [passage.id, digests[passage.id], passage.text, passage.title, passage.document, passage.page]
                    copy.write_row([*row, count.total(), *([vector] if self.embedder else [])])
            numbers = dict(self._run("SELECT id, number FROM {schema}.passages WHERE id = ANY(%s)", [ids]))
            with cursor.copy(self._sql("COPY {schema}.postings (token, number, times) FROM STDIN")) as copy:
                for passage, count in zip(new, counts, strict=True):
                    for token, times in count.items():
                        copy.write_row([token, numbers[passage.id], times])

    # -- searching --------------------------------------------------------------------------------------------------

    def search(self, queries: Sequence[str], k: int, documents: Collection[str] | None = None) -> list[list[Found]]:
        """For each query its at most `k` best passages; `documents` leaves only passages of these documents."""
        with self._explained():
            self._require()
            return search_rankings(
                self, queries, k, self.mode, candidates=self.candidates, rrf_k=self.rrf_k, documents=documents
            )

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

    # -- the server -------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Make the schema, its tables and, with an embedder, the column and the graph of vectors."""
        if not self._made:
            with self._connection.transaction():
                self._run("SELECT pg_advisory_xact_lock(hashtext(%s))", [self.name])
                self._run("CREATE SCHEMA IF NOT EXISTS {schema}")
                self._connection.execute(self._sql(_TABLES))
                if self.embedder is not None:
                    self._run("CREATE EXTENSION IF NOT EXISTS vector")
                    column = f"ADD COLUMN IF NOT EXISTS vector vector({self.embedder.dimensions})"
                    self._run(f"ALTER TABLE {{schema}}.passages {column}")
                embedder = self.embedder
                settings = [("embedder", embedder.key), ("name", embedder.name)] if embedder else []
                for key, value in settings:
                    self._run("INSERT INTO {schema}.settings VALUES (%s, %s) ON CONFLICT DO NOTHING", [key, value])
            self._made = True
            self._open()
        if self.embedder is None and self._settings():
            raise UserError(
                f"{self.name} holds vectors, which passages that are added need as well: set retrieval.embedder"
            )
        if self.approximate and self.embedder is not None:
            if self.embedder.dimensions > _MOST_GRAPH_DIMENSIONS:
                raise UserError(
                    f"retrieval.approximate=true: pgvector's graph takes {_MOST_GRAPH_DIMENSIONS} dimensions, and "
                    f"{self.embedder.name} has {self.embedder.dimensions}. Set it to false."
                )
            self._run(
                "CREATE INDEX IF NOT EXISTS passages_vector ON {schema}.passages USING hnsw (vector vector_cosine_ops)"
            )

    def _open(self) -> None:
        """Refuse another embedder; teach the connection what a vector is."""
        if self.embedder is None:
            return
        from pgvector.psycopg import register_vector

        settings = self._settings()
        require_embedder(
            f"the schema {self.name}", settings.get("embedder", ""), settings.get("name", ""), self.embedder
        )
        register_vector(self._connection)

    def _look(self) -> bool:
        """Whether the index is there by now. Raises `UserError` when it is another embedder's."""
        found = bool(self._one("SELECT to_regclass(%s) IS NOT NULL", [f'"{self.name}".settings']))
        if found:
            self._open()
        return found

    def _require(self) -> None:
        self._made = self._made or self._look()
        if not self._made:
            raise UserError(f"{_place(self.url)} has no index {self.name}. Make one with python -m alignkit.index")

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

    @contextmanager
    def _explained(self) -> Iterator[None]:
        psycopg = _psycopg()
        try:
            yield
        except psycopg.OperationalError as error:
            raise UserError(
                f"retrieval.url: the database at {_place(self.url)} does not answer ({first_line(error)}). Start it, "
                "or correct retrieval.url and retrieval.api_key_env; the same command then continues"
            ) from error
        except psycopg.Error as error:
            raise UserError(f"the database at {_place(self.url)}, schema {self.name}: {first_line(error)}") from error


def _connect(url: str, password: str | None) -> Any:
    return _psycopg().connect(url, autocommit=True, connect_timeout=10, **({"password": password} if password else {}))


def _psycopg() -> Any:
    try:
        import pgvector.psycopg  # noqa: F401
        import psycopg
    except ImportError as error:
        raise UserError("PostgreSQL needs psycopg and pgvector: pip install 'alignkit[postgres]'") from error
    return psycopg


def _place(url: str) -> str:
    """A URL without what may stand in its query."""
    return url.partition("?")[0]


def _list(documents: Collection[str] | None) -> list[str] | None:
    return None if documents is None else list(documents)
