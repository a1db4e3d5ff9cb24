"""The report of a large run: how big its page is, how long it takes to make, and how soon Chromium has opened it.

    python benchmarks/report.py [--questions 5000] [--systems 6] [--words 8] [--folder runs/report-benchmark]

A run with so many held-out questions and systems is invented, its report made, and its page opened five times by a
headless Chromium (Debian: apt-get install chromium), whose own clock is read: `loadEventEnd` of the Navigation Timing,
by which the samples' script has run, and the first contentful paint. Other programs slow these down, so the processor
time that the page's main thread has used up by then is told as well. Without Chromium only the size is told.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from chromium import Browser, find_chromium

from alignkit.core.app import load_config
from alignkit.evaluation.predictions import Prediction, compare, score_answer, summarise
from alignkit.report import run

LIMIT = 5_000_000


def main() -> None:
    """Invent the run, make its report, open it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--systems", type=int, default=6)
    parser.add_argument("--words", type=int, default=8, help="words of an answer; a statement has four times as many")
    parser.add_argument("--folder", type=Path, default=Path("runs/report-benchmark"))
    options = parser.parse_args()
    write_run(options.folder, options.questions, options.systems, options.words)
    began, worked = time.perf_counter(), time.process_time()
    config = load_config("report", [f"run_dir={options.folder}", f"output_dir={options.folder}/report", "force=true"])
    page = run(config).folder / "report.html"
    seconds, busy = time.perf_counter() - began, time.process_time() - worked
    size = page.stat().st_size
    text = page.read_text(encoding="utf-8")
    data = json.loads(text.split('id="samples-data">')[1].split("</script>")[0])
    print(f"{options.questions:,} questions x {options.systems} systems")
    print(f"made in {seconds:.1f} s, {busy:.1f} s of processor time")
    print(
        f"page: {size / 1e6:.2f} MB (limit {LIMIT / 1e6:g}), holds {len(data['rows']):,} of {data['total']:,} questions"
    )
    if find_chromium():
        loads, paints, work = open_page(page)
        print(
            f"opened in Chromium: {median(loads):.0f} ms of {', '.join(f'{each:.0f}' for each in loads)} (limit 1,000)"
        )
        print(f"first contentful paint: {median(paints):.0f} ms")
        print(f"processor time of the page: {median(work):.0f} ms of {', '.join(f'{each:.0f}' for each in work)}")
    else:
        print("no Chromium here: not opened")
    if size > LIMIT:
        raise SystemExit(1)


def open_page(page: Path, times: int = 5) -> tuple[list[float], list[float], list[float]]:
    """For each navigation the milliseconds until the page had loaded and until something was painted, and the processor
    time of the page's main thread."""
    loads, paints, work = [], [], []
    profile = Path(tempfile.mkdtemp(prefix="alignkit-report-"))
    try:
        with Browser(profile) as browser:
            browser.ask("Performance.enable", timeDomain="threadTicks")
            for _ in range(times):
                browser.open(page)
                browser.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
                loads.append(browser.value("performance.getEntriesByType('navigation')[0].loadEventEnd"))
                work.append(1000 * _task_seconds(browser))
                paints.append(
                    browser.value("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0")
                )
    finally:
        shutil.rmtree(profile, ignore_errors=True)
    return loads, paints, work


def _task_seconds(browser: Browser) -> float:
    """Processor time of all that the page's main thread has done; a file opened after about:blank has a new one."""
    found = {each["name"]: each["value"] for each in browser.ask("Performance.getMetrics")["metrics"]}
    return float(found["TaskDuration"])


def write_run(folder: Path, questions: int, systems: int, words: int) -> None:
    """A run folder whose only step is an evaluation; the later a system, the more it has right."""
    rng = Random("report")
    names = ["base", *(f"system{number}" for number in range(1, systems))]
    vocabulary = ["".join(rng.choices("abcdefghijklmnoprstuv", k=rng.randint(2, 9))) for _ in range(3000)]

    def text(count: int) -> str:
        return " ".join(rng.choices(vocabulary, k=count)).capitalize() + "."

    rows = []
    for number in range(questions):
        reference = text(words)
        answers = {}
        for place, name in enumerate(names):
            answer = reference.split()
            if rng.random() > 0.3 + 0.5 * place / systems:
                answer[rng.randrange(words)] = rng.choice(vocabulary)
            answers[name] = score_answer(" ".join(answer), reference, finished=True, judge=float(rng.randint(0, 10)))
        rows.append(
            Prediction(
                id=f"q-{number:05d}", instruction=text(4 * words), input=text(words), reference=reference,
                kind=rng.choice(("judgmental", "non_judgmental")), source=rng.choice("abcdefgh"), answers=answers,
            )
        )  # fmt: skip
    home = folder / "evaluate"
    home.mkdir(parents=True, exist_ok=True)
    (home / "predictions.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    metrics = {
        "models": {name: summarise(rows, name) for name in names},
        "comparisons": [compare(rows, new, old) for old, new in pairwise(names)],
    }
    manifest = {
        "stage": "evaluate", "status": "complete", "summary": "", "command": "invented", "fingerprint": "0",
        "started": "2026-11-28T00:00:00+00:00", "seconds": 1.0, "inputs": [], "outputs": [], "metrics": metrics,
        "checks": [], "dropped": {}, "versions": {}, "peak_memory_bytes": 0, "error": None,
    }  # fmt: skip
    (home / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (home / "config.yaml").write_text(json.dumps({"seed": 1}), encoding="utf-8")


if __name__ == "__main__":
    main()
