"""select: out of many rows the few worth training on, and why each of the others was left out.

Hygiene first: duplicates, near duplicates, rows of the evaluation files, useless rows. Then quality: each row is scored
by rules, the teacher, a reward model or a classifier, and must pass a threshold. Of the good rows `strategy` chooses k:

  coverage   greedy k-center on embeddings: each next row is the one farthest from all chosen so far
  mods       the rows an initial model needs (MoDS, Du et al., 2023, arXiv 2311.15653): one is trained on a share of k
             chosen for coverage, answers all good rows, and where its answers score below the threshold, rows are
             chosen for coverage again. Places that are left over go to coverage. Train on the result from the base.
  quality    the best scores
  random     drawn without looking, among the rows that hygiene leaves

`compare=random,quality,mods` asks whether that pays: it trains on what each strategy selects, k rows each, with several
seeds, and compares the adapters on held-out questions. All that takes long is resumed by the same command.

Reads:   data.path, also           question-answer rows with answers, of any format that alignkit reads
         held_out                  evaluation files: rows that are in them are dropped (compare: the questions to ask)
Writes:  selected.jsonl            the rows chosen, in input order, with scores.quality (not of random) and .rank
         dropped.jsonl             every other row and why
         selection.json, .html     what was decided, and a page to look at it: map, scores, coverage, examples
         initial/                  with strategy=mods: the initial model and its answers
         compare/                  with compare: the selections, adapters and predictions of every seed

Overrides people use:
  k=2000                           how many rows (k=null: all of good quality)
  radius=0.5                       or: as many as it takes for every row to be this near to a chosen one
  quality.scorer=judge             who scores: rules, judge, reward (quality.reward=runs/mine/reward), classifier
  quality.threshold=8              the score to exceed (or quality.quantile=0.25: leave out the lowest quarter)
  strategy=mods +model=qwen7b      with necessity; model, train and lora are the initial model's
  'also=[more.jsonl]'              further files of the same pool
  'held_out=[test.jsonl]'          nothing of these may be selected

Examples:
  python -m alignkit.select run=demo k=300
  python -m alignkit.select data.path=mine.jsonl k=2000
  python -m alignkit.select +model=qwen7b k=2000 strategy=mods quality.scorer=judge teacher=vllm teacher.model=<model>
  python -m alignkit.select data.path=mine.jsonl k=100 'held_out=[test.jsonl]' compare=random,quality,mods
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import (
    HardwareConfig,
    LoraConfig,
    ModelConfig,
    RowsConfig,
    SamplingConfig,
    StageConfig,
    TeacherConfig,
    TrainConfig,
)
from alignkit.core.errors import UserError
from alignkit.core.records import QAExample
from alignkit.data.hygiene.config import FLAGGED, HygieneConfig, PersonalData
from alignkit.scoring.quality import QualityConfig, RowScorer
from alignkit.scoring.row_embedding import EmbeddingConfig

if TYPE_CHECKING:
    from alignkit.reporting.selection_audit import Decisions
    from alignkit.scoring.choice import Choice, Extension
    from alignkit.scoring.row_embedding import Vectors

# ruff: noqa: UP045

LOG = logging.getLogger("alignkit")


class Strategy(Enum):
    """How rows are chosen; see the head of this file."""

    coverage = "coverage"
    mods = "mods"
    quality = "quality"
    random = "random"


@dataclass
class NecessityConfig:
    """Which rows the initial model needs (strategy=mods)."""

    share: float = 0.5
    """Share of k that is kept for necessary rows; the initial model is trained on the others."""
    threshold: Optional[float] = None
    """A row is necessary where the initial model's answer scores below it; none: the threshold of quality."""


@dataclass
class SelectConfig(StageConfig):
    """Configuration of `select`."""

    inputs: ClassVar[tuple[str, ...]] = (
        *("data.path", "also", "held_out", "quality.reward", "quality.classifier"),
        *("embedding.model", "model.path"),
    )
    incidental: ClassVar[tuple[str, ...]] = (
        *StageConfig.incidental,
        *("embedding.cache", "embedding.batch_size", "quality.batch_size", "workers"),
    )

    data: RowsConfig = field(default_factory=RowsConfig)
    also: list[str] = field(default_factory=list)
    """Further files of the pool, each read whole."""
    held_out: list[str] = field(default_factory=list)
    """Evaluation files: what is in them is not selected."""
    k: Optional[int] = None
    """How many rows to choose; null keeps every row of good quality."""
    radius: Optional[float] = None
    """Choose for coverage until every good row is this near to a chosen one; with k, no more than k rows."""
    strategy: Strategy = Strategy.coverage
    """How the k rows are chosen."""
    hygiene: HygieneConfig = field(default_factory=HygieneConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    necessity: NecessityConfig = field(default_factory=NecessityConfig)
    compare: list[str] = field(default_factory=list)
    """Strategies to train with and to compare, like random,quality,mods; instead of selecting by one."""
    compare_seeds: int = 5
    """With compare: how many seeds, beginning with `seed`."""
    compare_judge: bool = False
    """With compare: have the teacher grade the held-out answers, too."""
    workers: int = 1
    """Trainings and evaluations that run side by side."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(n=1, temperature=[0.0, 0.0], top_p=[1.0, 1.0])
    )
    """How the initial model, and with compare the adapters, answer; greedily unless told otherwise."""


def run(config: SelectConfig) -> Artifact:
    """Clean the pool, score its rows, choose by the strategy, and account for every row."""
    check(config)
    with Artifact.open("select", config) as artifact:
        if artifact.up_to_date:
            return artifact
        from alignkit.reporting.selection_audit import Decisions
        from alignkit.scoring.choice import draw

        decisions = Decisions(artifact)
        rows, held_out = read_pool(config, decisions)
        clean = cleanse(config, rows, held_out, decisions)
        if config.strategy is Strategy.random and not config.compare:
            assert config.k is not None
            selected = decisions.settle(clean, draw(len(clean), config.k, config.seed))
            audit = write_selected(config, rows, selected, decisions)
        else:
            scorer = RowScorer(config.quality, config.teacher)
            scored, threshold = score(config, clean, scorer, decisions)
            selected = []
            if config.compare:
                audit = compare_strategies(config, scored, threshold, artifact)
            else:
                good = keep_good(config, scored, threshold, decisions)
                choice, found = choose(config, good, scorer, threshold, decisions)
                selected = decisions.settle(good, choice)
                audit = found | write_selected(config, rows, selected, decisions)
            audit["quality"] = decisions.quality(scored, selected, threshold, config.quality.source)
        audit = {"strategy": config.strategy.name, "k": config.k, **audit}
        page = decisions.publish(audit, f"Selection of the run {config.run}")
        LOG.info("the page to look at: %s", page)
    return artifact


def check(config: SelectConfig) -> None:
    """Raise `UserError` for settings that contradict each other."""
    if config.k is not None and config.k < 1:
        raise UserError(f"k={config.k}: must be at least 1, or null to keep every row of good quality")
    if config.radius is not None and not 0 <= config.radius < math.inf:
        raise UserError(f"radius={config.radius}: a distance is a number from 0 up")
    if config.radius is not None and (config.compare or config.strategy is not Strategy.coverage):
        what = "compare" if config.compare else f"strategy={config.strategy.name}"
        raise UserError(f"radius={config.radius}: is for strategy=coverage; with {what} give k")
    if config.k is None and (config.compare or config.strategy is not Strategy.coverage):
        raise UserError(f"k: strategy={config.strategy.name} and compare need a number of rows; add k=...")
    if not 0 < config.necessity.share < 1:
        raise UserError(f"necessity.share={config.necessity.share}: must lie between 0 and 1")
    if config.sampling.n != 1:
        raise UserError(f"sampling.n={config.sampling.n}: the initial model answers once; set sampling.n=1")
    if config.compare:
        names = [each.name for each in Strategy]
        unknown = [name for name in config.compare if name not in names]
        if unknown or len(set(config.compare)) < max(2, len(config.compare)):
            raise UserError(
                f"compare={','.join(config.compare)}: name two or more different ones of {', '.join(names)}"
            )
        if len(config.held_out) != 1:
            raise UserError("held_out: compare needs exactly one file of held-out questions, 'held_out=[test.jsonl]'")
        if config.compare_seeds < 1:
            raise UserError(f"compare_seeds={config.compare_seeds}: must be at least 1")


def read_pool(config: SelectConfig, decisions: Decisions) -> tuple[list[QAExample], list[QAExample]]:
    """All rows of the pool, without what an earlier selection said of them, and the evaluation rows."""
    from alignkit.data.sources import read_question_files, read_questions
    from alignkit.reporting.selection_audit import without_scores

    rows, unusable = read_question_files([config.data, *(RowsConfig(path=path) for path in config.also)])
    for each in unusable:
        decisions.set_aside(each)
    stale = ("rank",) if config.quality.reuse else ("rank", "quality")
    pool = [without_scores(row, stale) for row in rows]
    held_out: list[QAExample] = []
    for path in config.held_out:
        found, useless = read_questions(RowsConfig(path=path))
        held_out += found
        if useless:
            reasons = ", ".join(sorted({each.reason for each in useless}))
            LOG.warning("held_out: %d rows of %s cannot be used: not looked for (%s)", len(useless), path, reasons)
    decisions.step("read", len(pool) + decisions.artifact.dropped.total())
    return pool, held_out


def cleanse(
    config: SelectConfig, rows: Sequence[QAExample], held_out: Sequence[QAExample], decisions: Decisions
) -> list[QAExample]:
    """The rows that keep the rules of hygiene and are not in the evaluation files."""
    from alignkit.data.hygiene.clean import clean
    from alignkit.scoring.row_embedding import drop_look_alikes

    kept, dropped = clean(rows, config.hygiene, held_out)
    for each in dropped:
        decisions.set_aside(each)
    if config.embedding.held_out_similarity is not None and held_out and kept:
        kept, similar = drop_look_alikes(kept, held_out, config.embedding)
        for each in similar:
            decisions.set_aside(each)
    if not kept:
        raise UserError(f"hygiene leaves none of {len(rows)} rows; {decisions.artifact.folder}/dropped.jsonl says why")
    decisions.step("hygiene", len(kept))
    lists = (found for row in kept if isinstance(found := getattr(row, FLAGGED, None), list))
    flagged = Counter(str(kind) for found in lists for kind in found)
    if flagged and config.hygiene.personal_data is PersonalData.flag:
        decisions.artifact.metrics["flagged"] = dict(flagged)
        found = ", ".join(f"{count} {kind}" for kind, count in flagged.items())
        LOG.warning(
            "personal data was found, and flagged in the rows: %s (hygiene.personal_data=drop drops them)", found
        )
    return kept


def score(
    config: SelectConfig, rows: Sequence[QAExample], scorer: RowScorer, decisions: Decisions
) -> tuple[list[QAExample], float]:
    """The rows with their quality, without those that have none, and the threshold that applies."""
    from alignkit.core.journal import Journal
    from alignkit.reporting.selection_audit import with_scores

    artifact = decisions.artifact
    with Journal(artifact.work_folder / "quality.jsonl", artifact.fingerprint) as journal:
        scores = scorer.score(rows, journal)
    scored = []
    for row, (quality, why) in zip(rows, scores, strict=True):
        if quality is None:
            decisions.drop(row, "no quality score", str(why), "poor quality")
        else:
            scored.append(with_scores(row, quality=quality))
    if not scored:
        raise UserError(
            f"none of {len(rows)} rows has a quality, the first because: {scores[0][1]}. "
            f"{artifact.folder}/dropped.jsonl has the others; quality.scorer says who scores"
        )
    if scorer.usage is not None:
        artifact.metrics |= {"teacher": config.teacher.model, "usage": asdict(scorer.usage)}
    return scored, config.quality.resolve_threshold([row.scores["quality"] for row in scored])


def keep_good(
    config: SelectConfig, scored: Sequence[QAExample], threshold: float, decisions: Decisions
) -> list[QAExample]:
    """The rows whose quality passes; of the others the first rule that they break, or the score, is the reason."""
    from alignkit.scoring.quality import broken_by

    good = []
    for row in scored:
        quality = row.scores["quality"]
        if config.quality.passes(quality, threshold):
            good.append(row)
            continue
        broken = broken_by(row, config.quality)
        reason = broken[0] if broken else f"{config.quality.source} score too low"
        detail = ", ".join([f"{quality:g}, threshold {threshold:g}", *broken])
        decisions.drop(row, reason, detail, "poor quality")
    if not good:
        raise UserError(
            f"none of {len(scored)} rows passes quality.threshold={threshold:g}; "
            f"{decisions.artifact.folder}/dropped.jsonl says why"
        )
    decisions.step("quality", len(good))
    return good


def choose(
    config: SelectConfig, good: Sequence[QAExample], scorer: RowScorer, threshold: float, decisions: Decisions
) -> tuple[Choice, dict[str, Any]]:
    """What the strategy takes of the good rows, and its part of the audit."""
    from alignkit.reporting.selection_audit import thinned
    from alignkit.scoring.choice import Choice, cover, explain, take_best
    from alignkit.scoring.row_embedding import embed_rows

    quality = [row.scores["quality"] for row in good]
    if config.strategy is Strategy.quality:
        assert config.k is not None
        return take_best(quality, config.k, config.seed), {}
    if config.k is None and config.radius is None:
        return Choice(range(len(good)), ranked=False), {}
    vectors = embed_rows(good, config.embedding)
    wanted = None if config.k is None else min(config.k, len(good))
    if config.strategy is Strategy.mods and wanted is not None:
        wanted = max(1, wanted - round(wanted * config.necessity.share))
    coverage = cover(vectors, quality, wanted, config.radius)
    decisions.step("coverage", len(coverage.centres))
    order, kinds, spared, audit = coverage.centres, {}, {}, {}
    if config.strategy is Strategy.mods:
        scores = ask_initial_model(config, good, order, scorer, decisions)
        limit = config.necessity.threshold if config.necessity.threshold is not None else threshold
        extension, audit["necessity"] = add_necessary(config, vectors, order, scores, limit, decisions)
        order, kinds = extension.order, extension.kinds
        spared = {place: score for place, score in scores.items() if score is not None and score >= limit}
    left_out, radius = explain(vectors, order, [row.id for row in good], spared)
    decisions.artifact.metrics["coverage_radius"] = round(radius, 4)
    audit["coverage"] = {
        "embedding": config.embedding.model,
        "field": config.embedding.text.name,
        "radius": radius,
        "curve": thinned(coverage.radii),
        "chosen": [[len(order), radius]],
    }
    return Choice(order, left_out, kinds), audit


def ask_initial_model(
    config: SelectConfig, good: Sequence[QAExample], seeds: Sequence[int], scorer: RowScorer, decisions: Decisions
) -> dict[int, float | None]:
    """Place -> how well a model trained on the seeds alone answers that row; None for an answer without a score."""
    from alignkit.core.journal import Journal
    from alignkit.training.initial_model import answer_by_initial_model, score_answers

    artifact = decisions.artifact
    answers = answer_by_initial_model(
        artifact.folder / "initial",
        [good[place] for place in sorted(seeds)],
        good,
        {"run": config.run, "seed": config.seed, "force": config.force, "model": config.model},
        {"lora": config.lora, "train": config.train, "hardware": config.hardware},
        config.sampling,
    )
    with Journal(artifact.work_folder / "necessity.jsonl", artifact.fingerprint) as journal:
        return score_answers(good, answers, scorer, journal)


def add_necessary(
    config: SelectConfig,
    vectors: Vectors,
    seeds: list[int],
    scores: Mapping[int, float | None],
    limit: float,
    decisions: Decisions,
) -> tuple[Extension, dict[str, Any] | None]:
    """Fill up to k rows with those whose initial answer scores below `limit` (MoDS, section 2.3); and the histogram."""
    from alignkit.reporting.selection_audit import score_histogram
    from alignkit.scoring.choice import extend

    assert config.k is not None
    necessary = [place for place, score in scores.items() if score is None or score < limit]
    extension = extend(vectors, seeds, necessary, config.k)
    decisions.step("necessity", len(extension.order))
    known = {place: score for place, score in scores.items() if score is not None}
    decisions.artifact.metrics["necessity"] = {
        "answered": len(scores),
        "no_score": len(scores) - len(known),
        "necessary": len(necessary),
        "chosen": extension.needed,
        "filled_up": len(extension.order) - len(seeds) - extension.needed,
    }
    if not known:
        return extension, None
    selected = [known[place] for place in extension.order if place in known]
    histogram = score_histogram(list(known.values()), selected, limit, config.quality.scorer.name)
    return extension, histogram | {"model": config.model.name}


def compare_strategies(
    config: SelectConfig, scored: Sequence[QAExample], threshold: float, artifact: Artifact
) -> dict[str, Any]:
    """Train on what each strategy selects of the same scored rows, with every seed, and compare the adapters."""
    from alignkit.evaluation.strategies import Trial, run_trial
    from alignkit.scoring.row_embedding import text_of

    assert config.k is not None
    passing = [row for row in scored if config.quality.passes(row.scores["quality"], threshold)]
    different = {text_of(row, config.embedding.text) for row in passing}
    if len(different) < config.k:
        raise UserError(
            f"k={config.k}: only {len(passing)} rows pass quality.threshold={threshold:g}, and their embedded text "
            f"(embedding.text={config.embedding.text.name}) differs in {len(different)}; compare fewer"
        )
    # At the border of a quantile rows stay, above a threshold they must be: the next lower number makes that one rule.
    border = math.nextafter(threshold, -math.inf) if config.quality.quantile is not None else threshold
    quality = replace(config.quality, quantile=None, threshold=border, reuse=True)
    necessity = config.necessity
    if necessity.threshold is None:
        necessity = replace(necessity, threshold=threshold)
    trial = Trial(
        home=artifact.folder / "compare",
        strategies=config.compare,
        seeds=range(config.seed, config.seed + config.compare_seeds),
        k=config.k,
        held_out=config.held_out[0],
        judge=config.compare_judge,
        shared={"run": config.run, "force": config.force, "model": config.model},
        selecting={
            "hygiene": config.hygiene,
            "quality": quality,
            "embedding": config.embedding,
            "necessity": necessity,
        },
        training={"lora": config.lora, "train": config.train, "hardware": config.hardware},
        answering={"sampling": config.sampling},
        teaching={"teacher": config.teacher},
    )
    artifact.metrics["comparison"] = comparison = run_trial(trial, scored, config.workers)
    rows = {each["name"]: each["rows"] for each in comparison["strategies"]}
    artifact.check("equal budgets", len({tuple(each) for each in rows.values()}) == 1, f"rows by seed: {rows}")
    artifact.summary = ", ".join(
        f"{each['name']} {each['scores']['exact_match']['mean']:.3f}" for each in comparison["strategies"]
    )
    return {"strategy": "compare", "rows_selected": config.k, "comparison": comparison}


def write_selected(
    config: SelectConfig, rows: Sequence[QAExample], selected: Sequence[QAExample], decisions: Decisions
) -> dict[str, Any]:
    """Write the rows chosen, in input order, and account for all others; returns the rest of the audit."""
    from alignkit.reporting.selection_audit import choose_points, map_points
    from alignkit.scoring.row_embedding import embed_rows

    artifact = decisions.artifact
    if config.k is not None and len(selected) < config.k and config.radius is None:
        LOG.warning("k=%d, but there are only %d different rows to choose from", config.k, len(selected))
    artifact.write_rows("selected.jsonl", selected)
    read = decisions.funnel[0]["rows"]
    accounted = len(selected) + artifact.dropped.total()
    artifact.check("every row accounted for", accounted == read, f"{accounted} of {read} rows")
    artifact.metrics |= {"rows_read": read, "rows_selected": len(selected)}
    artifact.summary = f"{len(selected)} of {read} rows"
    shown = choose_points(rows, decisions.by_row, config.seed)
    points = map_points(shown, embed_rows(shown, config.embedding), decisions.by_row)
    return {"rows_selected": len(selected), "map": points}


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("select")
