"""The report on synthetic runs: what it says, what it must not say, and that it needs nothing but itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest

from alignkit.core.app import load_config
from alignkit.core.artifact import Artifact
from alignkit.core.errors import UserError
from alignkit.data.closed_world import World, answer
from alignkit.evaluation.predictions import Prediction, compare, score_answer, summarise
from alignkit.evaluation.statistics import bootstrap_mean, wilson
from alignkit.report import run
from alignkit.reporting.charts import loss_figures, preference_figures
from alignkit.reporting.held_out import Roles, read_held_out
from alignkit.reporting.runs import Run, Step, read_run
from alignkit.reporting.samples import read_samples
from alignkit.reporting.tables import teacher_statement

RATES = {"base": 0.42, "sft": 0.66, "sft_best": 0.74, "dpo": 0.78, "sft_control": 0.665, "sft_grader": 0.86}
COMPARISONS = [("sft", "base"), ("sft_best", "sft"), ("dpo", "sft_best"), ("sft_control", "sft"), ("sft_grader", "sft")]


def make_run(
    folder: Path, *, seed: int = 1, rates: Mapping[str, float] = RATES, questions: int = 240, stages: int = 99
) -> Path:
    """Write a run folder as the stages leave it, with held-out answers of models that are right at the given rates.

    `stages` keeps only the first so many steps.
    """
    rng = Random(f"{seed}")
    rows = _predictions(rng, rates, questions)
    comparisons = [(new, old) for new, old in COMPARISONS if {new, old} <= rates.keys()]
    models = {name: summarise(rows, name) for name in rates}
    evaluate = {"models": models, "comparisons": [compare(rows, new, old) for new, old in comparisons]}
    adapters = [f"{name}/adapter" for name in rates if name != "base"]
    teacher = {"teacher": {"mode": "scripted", "model": "scripted", "mistake_rate": 0.15}}
    model = {"model": {"name": "tiny", "path": "embedded"}}
    steps: list[tuple[str, str, list[str], list[str], dict[str, Any], str, dict[str, Any]]] = [
        ("expand", "expand", ["seeds.jsonl:48"], ["expanded.jsonl:360"], {}, "360 examples", teacher),
        ("questions", "expand", ["seeds.jsonl:48"], ["expanded.jsonl:2400"], {}, "2400 questions", teacher),
        ("select", "select", ["expand/expanded.jsonl:360"], ["selected.jsonl:280"], {}, "280 of 360 rows", {"k": 280}),
        ("sft", "sft", ["select/selected.jsonl:280"], ["adapter"], {}, "280 rows, loss 2.031 -> 0.412", model),
        ("sample", "sample", ["questions/expanded.jsonl:2400", "sft/adapter"], ["completions.jsonl:1000"], {}, "", {}),
        ("judge", "judge", ["sample/completions.jsonl:1000"], ["scored.jsonl:1000"], {}, "mean grade 7.4", teacher),
        ("reward", "reward", ["judge/scored.jsonl:1000"], ["adapter"], _accuracy(rng), "held-out accuracy 0.71", model),
        ("rejection_sampling", "rejection_sampling", ["questions/expanded.jsonl:2400", "sft/adapter", "reward/adapter"],
         ["best.jsonl:800", "pairs.jsonl:641"], {"best_of_n": _best_of_n(rng)}, "best of 8", model),
        ("sft_best", "sft", ["rejection_sampling/best.jsonl:800", "sft/adapter"], ["adapter"], {}, "800 rows", model),
        ("sft_control", "sft", ["select/selected.jsonl:280", "sft/adapter"], ["adapter"], {}, "280 rows", model),
        ("dpo", "dpo", ["rejection_sampling/pairs.jsonl:641", "sft_best/adapter"], ["adapter"], {}, "641 pairs", model),
        ("sft_grader", "sft", ["select/selected.jsonl:280", "sft/adapter"], ["adapter"], {}, "800 rows", model),
        ("evaluate", "evaluate", ["test.jsonl:240", *adapters], ["predictions.jsonl:240"], evaluate,
         "exact match 0.420 (base) -> 0.780 (dpo)", {**teacher, **model, "judge": True}),
    ]  # fmt: skip
    for place, (name, stage, inputs, outputs, metrics, summary, config) in enumerate(steps[:stages]):
        _write_step(folder, name, stage, inputs, outputs, metrics, summary, {"seed": seed, **config}, place, rng)
    if stages > len(steps):
        lines = "".join(row.model_dump_json() + "\n" for row in rows)
        (folder / "evaluate" / "predictions.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _predictions(rng: Random, rates: Mapping[str, float], questions: int) -> list[Prediction]:
    world, rows = World(7, split="held_out"), []
    wrong = World(8, split="held_out")
    difficulty = {"value": 0.08, "yes": 0.0, "no": -0.06, "unanswerable": -0.1}
    for number in range(questions):
        passage = world.passage()
        form = ("value", "value", "yes", "no", "unanswerable")[number % 5]
        question = world.ask(passage, form)
        reference = answer(passage.facts, question)
        ability, answers = rng.random(), {}
        for name, rate in rates.items():
            shifted = rate + difficulty[form] - (0.12 if passage.hard else -0.1)
            right = 0.75 * ability + 0.25 * rng.random() < shifted
            text = reference if right else wrong.corrupt(passage, question)
            grade = 10.0 if text == reference else float(rng.choice((1, 2, 4, 6)))
            answers[name] = score_answer(text, reference, finished=rng.random() < 0.98, judge=grade)
        level = "hard" if passage.hard else "easy"
        rows.append(
            Prediction(
                id=f"test-{number:04d}", instruction=passage.statement, input=question.text, reference=reference,
                kind=question.kind, form=form, level=level, held_out_name=rng.random() < 0.3, answers=answers,
            )
        )  # fmt: skip
    return rows


def _accuracy(rng: Random) -> dict[str, Any]:
    held_out, train = 180 + rng.randrange(20), 1500 + rng.randrange(60)
    return {
        "held_out_accuracy": {
            "all": wilson(held_out, 260),
            "graded": wilson(held_out - 40, 190),
            "hh-rlhf": wilson(41, 70),
        },
        "train_accuracy": {"all": wilson(train, 1900)},
    }


def _best_of_n(rng: Random) -> dict[str, Any]:
    score = {str(n): bootstrap_mean([n**0.3 + rng.gauss(0, 1) for _ in range(200)]) for n in (1, 2, 4, 8)}
    grade = {str(n): bootstrap_mean([6 + n**0.3 + rng.gauss(0, 2) for _ in range(200)]) for n in (1, 2, 4, 8)}
    return {"score": score, "grade": grade}


def _write_step(
    folder: Path,
    name: str,
    stage: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metrics: dict[str, Any],
    summary: str,
    config: dict[str, Any],
    place: int,
    rng: Random,
) -> None:
    home = folder / name
    home.mkdir(parents=True)
    checks = [{"name": "every row accounted for", "passed": True, "detail": f"{280 + place} rows"}]
    if stage in ("sft", "reward", "dpo"):
        checks.append({"name": "adapter moved", "passed": True, "detail": "56 of 56 matrices after the first step"})
        start, steps = (0.693, 60) if stage == "dpo" else (2.0, 120)
        curve = [{"step": s, "loss": start * (0.25 + 0.75 * 0.97**s) + rng.gauss(0, 0.02)} for s in range(1, steps, 3)]
        (home / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    manifest = {
        "stage": stage,
        "status": "complete",
        "summary": summary,
        "command": f"alignkit {stage} run={folder.name} name={name} seed={config['seed']}",
        "started": f"2026-11-20T10:{place:02d}:00+00:00",
        "seconds": round(2 + 30 * rng.random(), 2),
        "fingerprint": hashlib.sha256(f"{folder}{name}".encode()).hexdigest(),
        "inputs": [_entry(folder, path) for path in inputs],
        "outputs": [_entry(Path(), path) for path in outputs],
        "metrics": metrics,
        "checks": checks,
        "dropped": {"not novel": 41, "unreadable answer": 3} if stage == "expand" else {},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "trl": "1.16.0", "vllm": "not installed"},
        "peak_memory_bytes": int((0.3 + rng.random()) * 2**30),
        "peak_gpu_memory_bytes": 0,
        "error": None,
    }
    (home / "manifest.json").write_text(json.dumps(manifest))
    (home / "config.yaml").write_text(json.dumps(config))


def _entry(folder: Path, path: str) -> dict[str, Any]:
    name, _, rows = path.partition(":")
    inside = folder / name if "/" in name else Path(name)
    return {"key": "data.path", "path": str(inside), "sha256": "0" * 64, "rows": int(rows) if rows else None}


# -- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "demo", questions=120)
    make_run(folder / "demo-seed2", seed=2, questions=120)
    return folder


def report(folder: Path, output: Path, *overrides: str) -> Artifact:
    return run(load_config("report", [f"run_dir={folder}", f"output_dir={output}", *overrides]))


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("report")
    artifact = report(runs / "demo", output, f"replicates=[{runs / 'demo-seed2'}]")
    assert artifact.summary == f"{artifact.metrics['steps']} steps of 2 runs"
    figures = (output / "figures.txt").read_text(encoding="utf-8")
    assert "seed 1" in figures
    assert len(re.findall(r"\d \[[-+]?\d+\.\d, [-+]?\d+\.\d\]", figures)) >= 6
    return (output / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What a browser would find: ids, texts, and everything that could send a request or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in ("meta", "use", "path", "br", "rect", "input"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "srcset", "action", "data") or name.startswith("on"):
                self.targets.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert not self.open or tag in ("meta", "use", "path", "rect", "input") or self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    found = Page(page)
    assert found.open == []
    assert not {"link", "iframe", "img", "object", "embed"} & set(found.tags)
    assert found.tags["script"] == 2  # the samples as data, and the one script that shows them
    assert all(target.startswith("#") for target in found.targets)
    assert "@import" not in page
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", page))
    assert "default-src 'none'" in page


def test_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    found = Page(page)
    assert [id for id, count in Counter(found.ids).items() if count > 1] == []
    references = {target[1:] for target in found.targets} | set(re.findall(r"url\(#([^)]+)\)", page))
    labels = {id for labels in re.findall(r'aria-labelledby="([^"]+)"', page) for id in labels.split()}
    assert references | labels <= set(found.ids)


def test_figures_have_text_alternatives_and_the_colours_of_the_page(page: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    # the pipeline; ladder, grades, gains; losses; accuracy; best of n by score and by grade
    assert len(svgs) == 1 + 3 + 6 + 1 + 2
    for svg in svgs:
        assert 'role="img"' in svg
        assert "<title id=" in svg
        assert "<desc id=" in svg
        assert not re.search(r"(fill|stroke): #", svg), "a fixed colour would not follow dark mode"
        assert "<text" in svg, "text must stay text"
        assert "font-family" not in svg


def test_the_numbers_are_those_of_the_predictions(runs: Path, page: str) -> None:
    rows = [row for name in ("demo", "demo-seed2") for row in predictions(runs / name)]
    for model in ("base", "dpo"):
        share = sum(row.answers[model].scores["exact_match"] for row in rows) / len(rows)
        assert f"{100 * share:.1f}\u00a0%" in page
    gain = compare(rows, "dpo", "sft_best")["exact_match"]
    assert (
        f"{100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]".replace("-", "\u2212")
        in page
    )


def test_the_sections_are_there_and_the_teacher_is_called_what_it_is(page: str) -> None:
    anchors = ("stages", "gains", "scores", "training", "reward", "breakdown", "samples", "lengths", "checks", "cost",
               "memory", "lineage", "reproduce", "method")  # fmt: skip
    assert all(f'<section id="{anchor}">' in page for anchor in anchors)
    assert "Teacher and grader of this run are scripted" in page
    assert "15 % of the training answers are wrong on purpose" in page
    assert "SFT on best of n over Control: SFT further" in page
    assert "alignkit dpo run=demo name=dpo seed=1" in page
    assert "2,400" in page
    assert "not novel" in page


@pytest.mark.parametrize("grade", [True, False])
def test_grading_what_rejection_sampling_draws_asks_the_teacher(grade: bool) -> None:
    config = {"teacher": {"mode": "openai", "model": "a-model"}, "scorer": "reward", "grade": grade}
    step = Step("rejection_sampling", Path("unused"), {"stage": "rejection_sampling"}, config)
    statement = teacher_statement(Run(Path("unused"), [step]))
    assert statement == ("Teacher and grader: a-model." if grade else "")


def test_a_gain_whose_interval_contains_zero_is_called_no_help(tmp_path: Path) -> None:
    report(make_run(tmp_path / "flat", rates={"base": 0.5, "sft": 0.5}, questions=60), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Training did not help" in page
    assert "rose from" not in page


def test_a_loss_is_called_a_loss(tmp_path: Path) -> None:
    report(make_run(tmp_path / "worse", rates={"base": 0.8, "sft": 0.2}, questions=60), tmp_path / "out")
    assert "Training hurt: exact match" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_held_out_loss_is_drawn_beside_the_training_loss(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=4)
    path = folder / "sft" / "loss.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ((_, without),) = loss_figures([read_run(folder)], None)
    path.write_text("".join(json.dumps(row | {"held_out_loss": 1.0 + row["step"]}) + "\n" for row in rows[::2]))
    ((_, figure),) = loss_figures([read_run(folder)], None)
    assert "held out: from 2 to" in figure
    assert "held out" not in without


def test_a_dpo_step_shows_margins_and_log_ratios_where_it_has_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=12)
    assert preference_figures([read_run(folder)]) == []
    rows = [
        {
            "step": step,
            "loss": 0.7,
            "reward_margin": step / 10,
            "chosen_log_ratio": -step,
            "rejected_log_ratio": -2 * step,
        }
        for step in (1, 5)
    ]
    (folder / "dpo" / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (ratios_title, log_ratios), (margin_title, margin) = preference_figures([read_run(folder)])
    assert (ratios_title, margin_title) == ("dpo: log-ratio a token", "dpo: reward margin")
    assert "chosen, seed 1: from -1 to -5; rejected, seed 1: from -2 to -10" in log_ratios
    assert "margin, seed 1: from 0.1 to 0.5" in margin
    report(folder, tmp_path / "out")
    assert "dpo: reward margin" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("stages", [1, 4, 8, 12])
def test_a_partial_run_says_what_is_missing(tmp_path: Path, stages: int) -> None:
    artifact = report(make_run(tmp_path / "part", stages=stages), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert Page(page).open == []
    assert "This run has not been evaluated yet." in page
    assert "evaluate" in artifact.metrics["missing"]
    assert f"Not in this run: {', '.join(artifact.metrics['missing'])}." in page
    assert ("No reward model was trained." in page) == (stages < 7)


def test_a_failed_step_is_shown_with_its_error_and_its_failed_check(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=4)
    path = folder / "sft" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest |= {"status": "failed", "error": "UserError: check 'adapter moved' failed"}
    manifest["checks"][1]["passed"] = False
    path.write_text(json.dumps(manifest))
    report(folder, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "UserError: check &#39;adapter moved&#39; failed" in page
    assert ">FAIL<" in page
    assert "No training step has written a loss curve." in page


def test_texts_of_models_and_names_cannot_break_the_page(tmp_path: Path) -> None:
    evil = '</style><script>alert(1)</script>"$x^2$&'
    folder = make_run(tmp_path / "run", rates={"base": 0.2, "sft": 0.6}, questions=40)
    rows = predictions(folder)
    for row in rows:
        row.answers["base"].text = row.input = evil
    path = folder / "evaluate" / "predictions.jsonl"
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    config = load_config("report", [f"run_dir={folder}", f"output_dir={tmp_path / 'out'}"])
    config.titles["sft"] = evil
    run(config)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert Page(page).tags["script"] == 2
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert Page(page).open == []


def test_it_is_made_again_when_a_step_has_changed_and_only_then(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=3)
    assert not report(folder, tmp_path / "out").up_to_date
    assert report(folder, tmp_path / "out").up_to_date
    path = folder / "select" / "manifest.json"
    path.write_text(path.read_text().replace("280 of 360 rows", "281 of 360 rows"))
    assert not report(folder, tmp_path / "out").up_to_date


def test_an_evaluation_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=2)
    with pytest.raises(UserError, match="evaluation=nosuch: this run has no finished evaluation of that name, nor any"):
        report(folder, tmp_path / "out", "evaluation=nosuch")


def test_its_own_folder_and_the_pipelines_are_not_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=2)
    report(folder, folder / "report")
    assert report(folder, folder / "report").up_to_date
    assert [step.name for step in read_run(folder).steps] == ["expand", "questions"]


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        report(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no stage has been run here yet"):
        report(tmp_path / "empty", tmp_path / "out")


def test_damaged_predictions_are_a_clear_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", questions=10)
    (folder / "evaluate" / "predictions.jsonl").write_text('{"id": "t", "instruc')
    with pytest.raises(UserError, match=r"predictions\.jsonl: not the predictions"):
        report(folder, tmp_path / "out")


def test_steps_stand_behind_those_they_read_from(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", stages=5)
    path = folder / "sft" / "manifest.json"
    path.write_text(path.read_text().replace("2026-11-20T10:03", "2026-11-21T09:00"))  # the adapter was made again
    steps = read_run(folder)
    assert [step.name for step in steps.steps] == ["expand", "questions", "select", "sft", "sample"]
    assert [parent.name for parent in steps.parents(steps.steps[-1])] == ["questions", "sft"]


def test_samples_follow_their_rule(runs: Path) -> None:
    held_out = read_held_out([read_run(runs / "demo")], Roles(controls=["sft_control"], upper_bounds=["sft_grader"]))
    assert held_out is not None
    assert held_out.ladder == ["base", "sft", "sft_best", "dpo"]
    samples = read_samples(held_out)
    assert sum(samples.counts.values()) == samples.total == samples.shown == 120
    by_id = {row.id: row for row in held_out.predictions[0]}
    for sample in samples.data["rows"]:
        first, last = (by_id[sample["id"]].answers[model].scores["exact_match"] for model in ("base", "dpo"))
        assert (
            sample["g"]
            == {(0.0, 1.0): "better", (1.0, 0.0): "worse", (1.0, 1.0): "right", (0.0, 0.0): "wrong"}[first, last]
        )
        assert sorted(number for each in sample["a"] for number in each["by"]) == list(range(6))
    at_once = {"better": 4, "worse": 4, "wrong": 2, "right": 2}
    wanted = [group for group, most in at_once.items() for _ in range(min(most, samples.counts[group]))]
    assert [row["g"] for row in samples.first] == wanted
    improved = [row["t"]["form"] for row in samples.first if row["g"] == "better"]
    assert len(set(improved)) == len(improved) == 4  # one form after the other


def test_a_server_is_compared_and_is_no_stage(runs: Path) -> None:
    found = read_held_out([read_run(runs / "demo")], Roles(controls=["sft_control"], upper_bounds=["sft_grader"]))
    assert found is not None
    held_out = replace(found, metrics=[{**each, "systems": {"sft_best": "server"}} for each in found.metrics])
    assert held_out.ladder == ["base", "sft", "dpo"]
    roles = {gain.title: gain.role for gain in held_out.gains}
    assert (roles["sft over base"], roles["sft_best over sft"]) == ("stage", "from elsewhere")
    assert list(roles.values())[-1] == "from elsewhere"


def test_a_stage_is_set_against_the_control_that_began_where_it_did(runs: Path) -> None:
    roles = Roles(controls=["sft_control"], upper_bounds=["sft_grader"])
    held_out = read_held_out([read_run(runs / "demo"), read_run(runs / "demo-seed2")], roles)
    assert held_out is not None
    gains = {gain.title: gain for gain in held_out.gains}
    assert [gain.role for gain in gains.values()] == ["stage"] * 3 + ["control", "against control", "upper bound"]
    assert "sft_best over sft_control" in gains
    pooled = gains["sft over base"].pooled["exact_match"]
    by_seed = [each["mean"] for each in gains["sft over base"].estimates if each]
    assert pooled["mean"] == pytest.approx(sum(by_seed) / 2)
    assert pooled["n"] == 240


def predictions(folder: Path) -> list[Prediction]:
    lines = (folder / "evaluate" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prediction.model_validate_json(line) for line in lines]
