"""The report in a real headless Chromium: what its policy lets through, its filter, small screens, dark, keyboard."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from chromium import Browser, find_chromium
from test_report import Page, make_run, predictions, report

from alignkit.evaluation.predictions import compare
from alignkit.reporting.differences import word_differences
from alignkit.reporting.held_out import Roles, read_held_out
from alignkit.reporting.markdown import render_markdown
from alignkit.reporting.measures import figure, p_value
from alignkit.reporting.plain import visible
from alignkit.reporting.runs import read_run
from alignkit.reporting.samples import MOST_CHARACTERS, read_samples
from alignkit.reporting.templating import as_data, percent

RATES = {"base": 0.4, "sft": 0.6, "dpo": 0.7}
HOSTILE = {
    0: "<script>document.title = 'owned'</script>",
    1: "</script><script>document.title = 'owned'</script><!--",
    2: "javascript:document.title='owned'",
    3: '" onmouseover="document.title=\'owned\'" x="',
    4: "<img src=x onerror=\"document.title='owned'\"><a href='https://example.com'>here</a>",
    5: "before \u202e after \u2066 \x00 \x1b[31m \x07",
    6: "long " * 200_000,
    7: "[link](https://example.com) `code` | ``` <b>bold</b>\n\n# heading\n```",
}


def hostile_run(folder: Path) -> Path:
    """A run whose questions, references, statements, ids and answers of the last model are hostile, for eight rows."""
    run = make_run(folder / "demo", rates=RATES, questions=60)
    rows = predictions(run)
    for place, text in HOSTILE.items():
        row = rows[place]
        row.id = f"row-{place} {text[:60]}"
        row.instruction = row.input = row.reference = text
        row.answers["dpo"] = row.answers["dpo"].model_copy(update={"text": text, "contexts": [text, text]})
    del rows[20].answers["dpo"]
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    (run / "evaluate" / "predictions.jsonl").write_text(lines, encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    report(hostile_run(folder), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def shown(browser: Browser) -> list[str]:
    """The groups of the samples that the page shows."""
    found = browser.value("[...document.querySelectorAll('#samples-list .group')].map(each => each.textContent)")
    return list(found)


def count_said(browser: Browser) -> str:
    return str(browser.value("document.getElementById('samples-count').textContent"))


# -- the policy --------------------------------------------------------------------------------------------------------


def test_the_policy_blocks_nothing_of_ours_and_hostile_texts_stay_texts(browser: Browser, output: Path) -> None:
    page = output / "report.html"
    browser.open(page, "#q=owned")
    assert browser.problems == []
    assert browser.value("document.title") == "alignkit report: demo"
    assert browser.requests == [page.resolve().as_uri()]
    assert count_said(browser).startswith("5 questions")
    texts = browser.value("[...document.querySelectorAll('#samples-list .text')].map(each => each.textContent)")
    assert HOSTILE[1] in texts
    assert browser.value("document.querySelectorAll('main a, #samples-list img, #samples-list script').length") == 0
    assert browser.value("[...document.querySelectorAll('a')].every(each => each.getAttribute('href')[0] === '#')")


def test_whatever_else_is_put_into_the_page_does_not_run(browser: Browser, output: Path, tmp_path: Path) -> None:
    """The same page with markup of others in it: had a text got through, this is what would hold it."""
    evil = (
        "<script>document.title = 'owned'</script><img src='https://example.com/x' onerror=\"document.title='owned'\">"
        "<iframe src='https://example.com'></iframe><link rel=stylesheet href='https://example.com/x.css'>"
        "<base href='https://example.com'><style>body { background: url(https://example.com/y) }</style>"
    )
    page = tmp_path / "evil.html"
    page.write_text((output / "report.html").read_text(encoding="utf-8").replace("<main", evil + "<main", 1))
    browser.open(page)
    assert browser.value("document.title") == "alignkit report: demo"
    refused = " ".join(browser.problems)
    assert all(name in refused for name in ("script-src", "default-src", "base-uri"))
    assert "60 questions" in count_said(browser), "our own script still runs"
    with pytest.raises(RuntimeError, match="TrustedHTML"):
        browser.value("document.body.innerHTML = '<b>no markup of strings</b>'")


def test_control_characters_are_seen_and_turn_nothing_round(browser: Browser, output: Path) -> None:
    browser.open(output / "report.html", "#q=before")
    text = browser.value("document.querySelector('#samples-list .reference bdi').textContent")
    assert text == "before ⟨U+202E⟩ after ⟨U+2066⟩ ␀ ␛[31m ␇"
    page = (output / "report.html").read_text(encoding="utf-8")
    assert not {"\u202e", "\u2066", "\x00", "\x1b", "\x07"} & set(page)


def test_a_long_answer_is_shortened_and_its_length_is_said(browser: Browser, output: Path) -> None:
    page = output / "report.html"
    assert page.stat().st_size < 1_000_000
    browser.open(page, "#q=row-6")
    assert "1,000,000 characters, of which the first are shown" in browser.value(
        "document.querySelector('#samples-list').textContent"
    )
    longest = "Math.max(...[...document.querySelectorAll('#samples-list .text')].map(each => each.textContent.length))"
    assert MOST_CHARACTERS < browser.value(longest) < MOST_CHARACTERS + 10


# -- the filter --------------------------------------------------------------------------------------------------------


def test_the_filter_is_set_by_the_address_and_tells_the_truth(browser: Browser, output: Path) -> None:
    held_out = read_held_out([read_run(output.parent / "demo")], Roles())
    assert held_out is not None
    for group, said in (("better", "got better"), ("worse", "got worse"), ("unknown", "not compared")):
        rows = [row for row in held_out.predictions[0] if held_out.group(row) == group]
        browser.open(output / "report.html", f"#filter={group}")
        assert count_said(browser) == f"{len(rows)} questions, page 1 of {max(1, -(-len(rows) // 20))}"
        assert set(shown(browser)) <= {said}
        assert len(shown(browser)) == min(20, len(rows))
    yes = [row for row in held_out.predictions[0] if row.form == "yes" and held_out.group(row) == "better"]
    browser.open(output / "report.html", "#filter=better&form=yes")
    assert count_said(browser).startswith(f"{len(yes)} questions")
    browser.open(output / "report.html", "#from=sft&to=base&filter=worse")
    known = [(row.score("sft", "exact_match"), row.score("base", "exact_match")) for row in held_out.predictions[0]]
    assert count_said(browser).startswith(f"{known.count((1, 0))} questions")


def test_the_filter_works_by_hand_and_pages_turn_by_keyboard(browser: Browser, output: Path) -> None:
    browser.open(output / "report.html")
    assert count_said(browser) == "60 questions, page 1 of 3"
    browser.value("document.querySelector('[data-step=\"1\"]').focus()")
    browser.press("Enter")
    assert count_said(browser) == "60 questions, page 2 of 3"
    assert browser.value("location.hash") == "#page=2"
    browser.value(
        "{ const choice = document.querySelector('[name=filter]'); choice.value = 'wrong';"
        " choice.dispatchEvent(new Event('input', { bubbles: true })); new Promise(done => setTimeout(done, 300)) }"
    )
    assert browser.value("location.hash") == "#filter=wrong"
    assert set(shown(browser)) == {"still wrong"}
    browser.open(output / "report.html")
    browser.press("Tab")
    assert browser.value("document.activeElement.textContent") == "Skip to the figures"
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_a_strange_address_shows_everything(browser: Browser, output: Path) -> None:
    browser.open(output / "report.html", "#filter=<b>&from=nobody&by=nothing&page=-7")
    assert count_said(browser) == "60 questions, page 1 of 3"
    assert browser.problems == []


def test_without_its_script_the_page_still_holds_samples(browser: Browser, output: Path) -> None:
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(output / "report.html")
        groups = shown(browser)
        assert groups[:4] == ["got better"] * 4
        assert browser.value("getComputedStyle(document.getElementById('samples-filter')).display") == "none"
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)


# -- screens -----------------------------------------------------------------------------------------------------------


def test_a_phone_never_scrolls_sideways(browser: Browser, output: Path) -> None:
    browser.open(output / "report.html", width=360, height=740)
    assert browser.value("document.documentElement.scrollWidth") == 360
    wide = (
        "[...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll, figure, pre')"
        " && each.getBoundingClientRect().right > 361).map(each => each.outerHTML.slice(0, 80))"
    )
    assert browser.value(wide) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(browser: Browser, output: Path, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1 for texts in the colours of the page."""
    browser.open(output / "report.html", scheme=scheme)
    colours = ("ink", "muted", "good", "bad", "control", "upper", *(f"rung-{number}" for number in range(6)))
    found = {name: browser.value(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')") for name in
             ("paper", "raised", *colours)}  # fmt: skip
    assert (luminance(found["paper"]) < 0.1) == (scheme == "dark")
    for name in ("ink", "muted", "good", "bad"):
        assert contrast(found[name], found["paper"]) >= 4.5, name
    assert contrast(found["muted"], found["raised"]) >= 4.5
    for name in colours:
        assert contrast(found[name], found["paper"]) >= 3, f"{name} is also the colour of marks and of large text"


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2.2)."""
    parts = [int(colour.strip()[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_headings_tables_and_fields_have_what_screen_readers_need(browser: Browser, output: Path) -> None:
    browser.open(output / "report.html")
    levels = browser.value("[...document.querySelectorAll('h1, h2, h3, h4')].map(each => Number(each.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert browser.value("[...document.querySelectorAll('main table')].every(each => each.querySelector('caption'))")
    assert browser.value("[...document.querySelectorAll('th')].every(each => each.scope || !each.textContent.trim())")
    assert browser.value("[...document.querySelectorAll('select, input')].every(each => each.labels.length === 1)")
    assert browser.value("[...document.querySelectorAll('svg')].every(each => each.getAttribute('aria-labelledby'))")


# -- parts -------------------------------------------------------------------------------------------------------------


def test_word_differences_hold_both_texts_and_name_what_differs() -> None:
    pieces = word_differences("The seat of Dopaco is Rosora.", "The seat of Dopaco is Lafura.")
    assert pieces == ["=The seat of Dopaco is ", "-Lafura", "+Rosora", "=."]
    for answer, reference in (("a b, c", "a c"), ("x", "x y z"), ("埃菲尔铁塔", "埃菲尔高塔"), ("one two", "two one")):
        found = word_differences(answer, reference)
        assert "".join(piece[1:] for piece in found if piece[0] != "-") == answer
        assert "".join(piece[1:] for piece in found if piece[0] != "+") == reference
    assert word_differences("nothing alike", "quite another") == ["=nothing alike"]
    assert word_differences("yes and", "yes and more", cut=True) == ["=yes and"]
    assert word_differences("", "x") == ["="]


def test_samples_beyond_the_room_are_left_out_in_turn_and_said(tmp_path: Path) -> None:
    held_out = read_held_out([read_run(make_run(tmp_path / "demo", rates=RATES, questions=60))], Roles())
    assert held_out is not None
    few = read_samples(held_out, most_bytes=12_000)
    assert 8 <= few.shown < few.total == 60
    assert len(json.dumps(few.data["rows"]).encode()) < 14_000
    assert {row["g"] for row in few.data["rows"]} == {group for group, number in few.counts.items() if number}


def test_visible_text_keeps_lines_and_scripts_and_shows_the_rest() -> None:
    assert visible("a\r\nb\tc\u200d\u00e9", 99) == "a\nb\tc\u200d\u00e9"
    assert visible("\x7f\u202e\u2028", 99) == "␡⟨U+202E⟩⟨U+2028⟩"
    assert visible("abcdef", 3) == "abc…"
    assert "<" not in as_data({"text": "</script><!--"})


def test_the_same_figures_are_in_the_json_and_the_markdown(output: Path) -> None:
    found = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert (found["format"], found["kind"], found["run"]) == (1, "run", "demo")
    gains = {each["title"]: each for each in found["comparisons"]}
    text = (output / "report.md").read_text(encoding="utf-8")
    for each in gains.values():
        assert f"{100 * each['all_seeds']['exact_match']['mean']:+.1f} [" in text.replace("\u2212", "-")
    assert "| `sft` |" in text or "| `SFT` |" in text
    assert text == render_markdown(found)


def test_markdown_of_names_with_markup_stays_a_table(output: Path) -> None:
    found = json.loads((output / "report.json").read_text(encoding="utf-8"))
    found["stages"][0] |= {"name": "a | b `c`", "summary": "[x](https://example.com)\n# no"}
    found["lineage"][0]["command"] = "echo\n```\n# out"
    text = render_markdown(found)
    line = next(line for line in text.splitlines() if "a \\| b" in line)
    assert line.replace("\\|", "").count("|") == 7
    assert "`[x](https://example.com) # no`" in line
    assert "````text\necho\n```\n# out" in text


def test_different_runs_stand_side_by_side_with_paired_differences(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", rates=RATES, questions=80)
    second = make_run(tmp_path / "b", rates={**RATES, "dpo": 0.98}, questions=80)
    config = second / "sft" / "config.yaml"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora": {"rank": 64}}))
    report(first, tmp_path / "out", f"runs=[{first},{second}]")
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [each["label"] for each in found["runs"]] == ["a", "b"]
    assert {"step": "sft", "key": "lora.rank", "values": ["not set", "64"]} in found["settings"]
    known = {each["title"]: each for each in found["differences"]}
    rows = [(row.score("dpo", "exact_match"), other.score("dpo", "exact_match"))
            for row, other in zip(predictions(second), predictions(first), strict=True)]  # fmt: skip
    gain = sum((new or 0) - (old or 0) for new, old in rows) / 80
    assert known["DPO"]["exact_match"]["mean"] == pytest.approx(gain)
    assert (known["DPO"]["verdict"], known["DPO"]["questions"]) == ("better", 80)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags["script"] == 0


def sweep_of(step: str, folder: Path, **steps: float) -> Path:
    """The jobs of a sweep over one stage: a folder each, with a job.json beside what the stage wrote."""
    for job, rate in steps.items():
        made = make_run(folder / "made" / job, rates={**RATES, "dpo": rate}, questions=40)
        shutil.copytree(made / step, folder / "jobs" / f"learning_rate-{job}")
        outcome = {"overrides": {"learning_rate": job}, "exit_code": 0, "error": None}
        (folder / "jobs" / f"learning_rate-{job}" / "job.json").write_text(json.dumps(outcome))
        config = folder / "jobs" / f"learning_rate-{job}" / "config.yaml"
        config.write_text(json.dumps({**json.loads(config.read_text()), "learning_rate": job}))
    return folder / "jobs"


def test_the_folder_of_a_sweep_stands_for_its_jobs(tmp_path: Path) -> None:
    jobs = sweep_of("sft", tmp_path, low=0.7, high=0.7)
    for job, loss in (("low", 0.5), ("high", 0.25)):
        manifest = jobs / f"learning_rate-{job}" / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "metrics": {"loss": loss}}))
    (jobs.parent / "sweep.csv").write_text("beside the jobs\n")
    report(jobs, tmp_path / "out", f"runs=[{jobs}]")
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [each["label"] for each in found["runs"]] == ["learning_rate=high", "learning_rate=low"]
    assert {"step": "sft", "key": "learning_rate", "values": ["high", "low"]} in found["settings"]
    assert found["metrics"] == [{"step": "sft", "metric": "loss", "by_run": [{"value": 0.25}, {"value": 0.5}]}]
    assert found["remarks"] == ["learning_rate=high has no evaluation", "learning_rate=low has no evaluation"]
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "learning_rate=low" in text
    assert Page(text).open == []


def test_jobs_of_a_sweep_of_evaluations_are_compared_by_their_answers(tmp_path: Path) -> None:
    jobs = sweep_of("evaluate", tmp_path, a=0.7, b=0.98)
    report(jobs, tmp_path / "out", f"runs=[{jobs}]")
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    dpo = next(each for each in found["differences"] if each["new"] == "dpo")
    assert (dpo["run"], dpo["verdict"], dpo["questions"]) == ("learning_rate=b", "better", 40)
    assert found["remarks"] == []


def test_what_a_comparison_found_is_on_the_page(tmp_path: Path) -> None:
    """p after Holm, the difference that could be shown, the win rate, and what the numbers allow to be said."""
    run = make_run(tmp_path / "demo", rates={**RATES, "sft_best": 0.65}, questions=50)
    report(run, tmp_path / "out")
    text = html.unescape((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    rows, said = predictions(run), 0
    for new, old in (("sft", "base"), ("sft_best", "sft"), ("dpo", "sft_best")):
        found = compare(rows, new, old)
        for score in ("exact_match", "judge"):
            assert f"p {p_value(found[score]['p_holm'])} (Holm)" in text
            assert f"could show {figure(score, found[score]['mde'])}" in text
            assert f"wins {percent(found[score]['win_rate']['mean'])} of pairs" in text
        for sentence in (*found["in_words"], *found["warnings"]):
            said += 1
            assert f"<li>{sentence}</li>" in text
    assert said >= 6
    assert "McNemar" not in text
    assert "Holm" in text[text.index('<section id="method">') :]


def test_a_page_with_more_than_it_can_hold_stays_below_5_mb(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", rates={f"model{number}": 0.3 + number / 10 for number in range(6)}, questions=640)
    rows, rng = predictions(run), Random(1)
    for row in rows:
        for name, answer in row.answers.items():
            text = " ".join(f"{rng.random():.6f}" for _ in range(150))
            row.answers[name] = answer.model_copy(update={"text": f"{row.reference} {text}"})
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    (run / "evaluate" / "predictions.jsonl").write_text(lines, encoding="utf-8")
    report(run, tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    assert 4_000_000 < page.stat().st_size < 5_000_000
    text = page.read_text(encoding="utf-8")
    data = json.loads(text.split('id="samples-data">')[1].split("</script>")[0])
    assert len(data["rows"]) < data["total"] == 640
    assert f"This page holds {len(data['rows'])} of the 640" in text


def test_other_questions_are_not_paired_and_it_is_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed=seed, rates=RATES, questions=20) for seed, name in ((1, "a"), (2, "b"))]
    path = runs[1] / "evaluate" / "predictions.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace('"id":"test-', '"id":"other-'), encoding="utf-8")
    report(runs[0], tmp_path / "out", f"runs=[{runs[0]},{runs[1]}]")
    found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert found["differences"] == []
    assert found["remarks"] == ["b was asked other questions than a, so that nothing can be paired"]
