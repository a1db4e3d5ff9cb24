"""What the report shows of retrievers: scores and differences by seed, and nothing where there were none."""

from __future__ import annotations

import json
from pathlib import Path

from test_report import Page, make_run, report

from alignkit.evaluation.retrieval_metrics import RankedQuery, compare, summarise
from alignkit.reporting.retrieval import main_cutoff, retrieval_tables, retriever_gains
from alignkit.reporting.runs import read_run

NEW, OLD = "<b>after</b>", "bm25"


def add_retrievers(run: Path, first_ranks: tuple[int, int]) -> None:
    """Let a run have measured two retrievers, `OLD` with the right passage at rank 2, and have trained one."""
    ranks = {OLD: (2, 2), NEW: first_ranks}
    found = {
        name: [
            RankedQuery(f"q{n}", "qa", (*(f"other{k}" for k in range(1, rank)), f"p{n}"), frozenset([f"p{n}"]))
            for n, rank in enumerate(each)
        ]
        for name, each in ranks.items()
    }
    gain = {"mean": 0.25, "low": 0.125, "high": 0.375, "n": 2}
    write(run, "evaluate_retriever", {
        "queries": 2, "passages": 7, "cutoffs": [1, 2],
        "retrievers": {name: summarise(each, [1, 2]) for name, each in found.items()},
        "retrieval_comparisons": [{"new": NEW, "old": OLD, **compare(found[NEW], found[OLD], [1, 2])}],
    })  # fmt: skip
    write(run, "retriever", {"held_out_ndcg_at_10": {"qa": {"before": gain, "after": gain, "gain": gain}}})


def write(run: Path, stage: str, metrics: dict[str, object]) -> None:
    manifest = json.loads((run / "sft" / "manifest.json").read_text(encoding="utf-8"))
    (run / stage).mkdir()
    changed = {**manifest, "stage": stage, "metrics": metrics, "inputs": [], "outputs": [], "checks": []}
    (run / stage / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")


def test_the_table_has_a_line_for_each_retriever_and_comparison_by_seed(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"demo{seed}", seed=seed, questions=40) for seed in (1, 2)]
    add_retrievers(folders[0], (1, 2))
    runs = [read_run(folder) for folder in folders]
    (table,) = retrieval_tables(runs)
    assert table["columns"] == ["ndcg@2", "mrr@2", "recall@2", "recall@1"]
    by_title = {title: [[each and each["mean"] for each in cell] for cell in cells] for title, cells in table["scores"]}
    assert by_title[OLD][1:] == [[0.5, None], [1.0, None], [0.0, None]]  # the second seed measured none
    assert by_title[NEW][1:] == [[0.75, None], [1.0, None], [0.5, None]]
    ((title, cells),) = table["differences"]
    assert title == f"{NEW} over {OLD}" and [cells[1][0]["mean"], cells[3][0]["mean"]] == [0.25, 0.5]
    (gain,) = retriever_gains(runs)
    assert gain["step"] == "retriever" and [each and each["mean"] for each in gain["gain"]] == [0.25, None]


def test_the_page_shows_it_as_text_and_the_figures_file_has_it_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=40)
    add_retrievers(run, (1, 2))
    report(run, tmp_path / "out")
    html = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    section = html[html.index('<section id="retrieval">') :].split("</section>")[0]
    assert "&lt;b&gt;after&lt;/b&gt; over bm25" in section and NEW not in section
    assert "+25.0 [+0.0, +50.0]" in section and "+25.0 [+12.5, +37.5]" in section
    assert "retrieval" in Page(html).ids
    found = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))["retrieval"][0]
    assert [line["title"] for line in found["scores"]] == [OLD, NEW]
    assert found["differences"][0]["recall@1"][0]["mean"] == 0.5


def test_a_run_without_retrievers_has_no_such_section(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", questions=40)
    report(run, tmp_path / "out")
    assert "Retrieval" not in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_the_main_cut_off_is_ten_or_the_nearest_to_it() -> None:
    assert [main_cutoff(each) for each in ([1, 3, 10, 100], [1, 5], [20, 50])] == [10, 5, 20]
