"""Metrics of an answer: values by hand, and the same numbers as the scripts that everybody uses."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from alignkit.core.errors import UserError
from alignkit.data.words import english_words, words
from alignkit.evaluation.metrics.catalogue import ALWAYS, DEFAULT, METRICS, MeasuringConfig, check_metrics
from alignkit.evaluation.metrics.content import keyword_share, quote_faithfulness, refused
from alignkit.evaluation.metrics.corpus import bleu, bleu_tokenizer, chrf, corpus_bleu, corpus_chrf
from alignkit.evaluation.metrics.measure import text_scores
from alignkit.evaluation.metrics.overlap import (
    edit_similarity,
    rouge_l,
    rouge_n,
    squad_exact_match,
    squad_f1,
    squad_normalise,
    stemmed_words,
)
from alignkit.evaluation.predictions import Prediction, score_answer, summarise

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
HOTPOTQA = SHARED / "hotpotqa" / "dev-distractor-350.jsonl"
PREDICTIONS = SHARED / "self-instruct"


def exactly(value: Any) -> Any:
    """The same number, up to rounding."""
    return pytest.approx(value, rel=0, abs=1e-9)


# -- the references ----------------------------------------------------------------------------------------------------


def squad_by_its_description(answer: str, reference: str) -> tuple[float, float]:
    """Exact match and F1 by the rules of SQuAD 1.1: lower case, no ASCII punctuation, no a, an, the, single spaces."""

    def normal(text: str) -> str:
        kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())

    written, wanted = normal(answer).split(), normal(reference).split()
    same = sum(min(count, wanted.count(word)) for word, count in Counter(written).items())
    if not same:
        return float(normal(answer) == normal(reference)), 0.0
    precision, recall = same / len(written), same / len(wanted)
    return float(normal(answer) == normal(reference)), 2 * precision * recall / (precision + recall)


def assert_all_agree(pairs: list[tuple[str, str]]) -> None:
    """On (answer, reference) pairs in whatever language; what is ours alone only where the texts are English."""
    for answer, reference in pairs:
        found = float(squad_exact_match(answer, reference)), squad_f1(answer, reference)
        assert found == exactly(squad_by_its_description(answer, reference))
    for stemmed, tokenize in ((False, english_words), (True, stemmed_words)):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmed)
        for answer, reference in pairs[:: 3 if stemmed else 1]:
            theirs = {name: score.fmeasure for name, score in scorer.score(reference, answer).items()}
            ours = {f"rouge{n}": rouge_n(answer, reference, n, tokenize) for n in (1, 2)}
            ours["rougeL"] = rouge_l(answer, reference, tokenize)
            assert ours == exactly(theirs)
            if not stemmed and is_english(answer + reference):
                assert rouge_l(answer, reference) == ours["rougeL"]
    sentences, fragments = BLEU(effective_order=True), CHRF()
    english = [pair for pair in pairs if bleu_tokenizer(pair[1]) == "13a"]
    for answer, reference in english:
        assert bleu(answer, reference) == exactly(sentences.sentence_score(answer, [reference]).score)
        assert chrf(answer, reference) == exactly(fragments.sentence_score(answer, [reference]).score)
    written, wanted = zip(*english, strict=True)
    assert corpus_bleu(written, wanted)["score"] == exactly(BLEU().corpus_score(written, [wanted]).score)
    assert corpus_chrf(written, wanted)["score"] == exactly(CHRF().corpus_score(written, [wanted]).score)


def is_english(text: str) -> bool:
    return not any(letter.isalpha() or letter.isdecimal() for letter in text if letter > "\x7f")


def made_up(rng: Random) -> str:
    """English-looking text with the things that normalisations differ about."""
    stock = "the a an The runs running runner's U.S. (1999) 3,000 well-known  cities\tcity — “no” ’tis x_y 50% e.g."
    return " ".join(rng.choice(stock.split(" ")) for _ in range(rng.randint(0, 14)))


def test_english_scores_are_those_of_the_usual_scripts() -> None:
    rng = Random(7)
    pairs = [(made_up(rng), made_up(rng)) for _ in range(150)]
    pairs += [("", ""), ("", "the"), ("the", ""), ("?!", "?!"), ("Paris", "paris.")]
    assert_all_agree(pairs)
    assert 0 < sum(squad_f1(*pair) == 1 for pair in pairs) < 40  # the texts are neither all alike nor all apart


def hotpotqa_pairs() -> Iterator[tuple[str, str]]:
    """Each answer against itself, the next row's, and the sentence that it stands in."""
    rows = [json.loads(line) for line in HOTPOTQA.read_text(encoding="utf-8").splitlines()]
    for row, following in zip(rows, rows[1:] + rows[:1], strict=True):
        sentences = [text for _, paragraph in row["context"] for text in paragraph if row["answer"] in text]
        for text in (row["answer"], following["answer"], f"It is the {row['answer']}.", *sentences[:1]):
            yield text, row["answer"]


@pytest.mark.skipif(not HOTPOTQA.exists(), reason="needs HotpotQA beside the clone")
def test_scores_of_hotpotqa_answers_are_those_of_the_usual_scripts() -> None:
    pairs = list(hotpotqa_pairs())
    assert len(pairs) > 1000
    assert_all_agree(pairs)


@pytest.mark.skipif(not PREDICTIONS.exists(), reason="needs Self-Instruct's predictions beside the clone")
def test_scores_of_self_instruct_predictions_are_those_of_the_usual_scripts() -> None:
    """Each model's answers against those of the first; the longest, on which rouge_score takes seconds, are cut."""
    texts = []
    for file in sorted(PREDICTIONS.glob("*_predictions.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        texts.append([str(row["response"]).strip()[:400] for row in rows])
    assert [len(each) for each in texts] == [252] * 4
    assert_all_agree([pair for other in texts[1:] for pair in zip(other[::3], texts[0][::3], strict=True)])


# -- by hand, in any script --------------------------------------------------------------------------------------------


def test_identical_chinese_answers_score_one_where_rouge_score_says_zero() -> None:
    text = "会议在周一下午三点开始。"
    assert RougeScorer(["rougeL"]).score(text, text)["rougeL"].fmeasure == 0
    assert [rouge_n(text, text, 1), rouge_n(text, text, 2), rouge_l(text, text)] == [1, 1, 1]
    assert rouge_l(text, text, english_words) == 0
    assert [bleu(text, text), chrf(text, text)] == pytest.approx([100, 100])
    assert rouge_l("会议在周二", "会议在周一") == pytest.approx(4 / 5)
    assert rouge_n("会议在周二", "会议在周一", 2) == pytest.approx(3 / 4)


def test_rouge_by_hand() -> None:
    """Answer "a b c d", reference "a c b": one bigram of none common; the longest common subsequence is "a c"."""
    assert rouge_n("a b c d", "a c b", 1) == pytest.approx(2 * (3 / 4) * (3 / 3) / (3 / 4 + 1))
    assert rouge_n("a b c d", "a c b", 2) == 0
    assert rouge_l("a b c d", "a c b") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert rouge_n("der größere Hund", "DER GRÖSSERE Hund", 2) == 1


def test_squad_normalisation_by_hand() -> None:
    assert squad_normalise(" The  answer's an A-list  the\tend. ") == "answers alist end"
    assert squad_normalise("a.m.") == "am"  # not an article: punctuation goes first
    assert squad_f1("", "") == 0 and squad_exact_match("", "the")


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("It is Monday.", "13a"),
        ("Größe: fünf", "13a"),
        ("회의는 월요일", "13a"),
        ("会议在周一", "zh"),
        ("The name is 李明 here.", "zh"),
        ("会議は月曜日です", "char"),
        ("การประชุม", "char"),
        ("The sushi is called すし, and is eaten with rice.", "13a"),
    ],
)
def test_words_of_bleu_follow_the_script_of_the_reference(text: str, tokenizer: str) -> None:
    assert bleu_tokenizer(text) == tokenizer
    assert bleu(text, text) == pytest.approx(100)


def test_bleu_of_several_scripts_sums_their_counts() -> None:
    """Four right words of four, and four Chinese characters of which two are right: unigrams 6 of 8, and so on."""
    found = corpus_bleu(["a b c d", "天地玄米"], ["a b c d", "天地玄黄"])
    by_hand = BLEU.compute_bleu([4 + 3, 3 + 2, 2 + 1, 1 + 0], [8, 6, 4, 2], 8, 8, smooth_method="exp")
    assert found["score"] == exactly(by_hand.score)
    assert found["signature"].count("tok:") == 2 and "tok:zh" in found["signature"]


@pytest.mark.parametrize(
    ("answer", "reference", "similarity"),
    [("kitten", "sitting", 1 - 3 / 7), ("", "abc", 0), ("", "", 1), ("会议在周二", "会议在周一", 4 / 5)],
)
def test_edit_similarity_by_hand(answer: str, reference: str, similarity: float) -> None:
    assert edit_similarity(answer, reference) == pytest.approx(similarity)


@pytest.mark.parametrize(
    ("answer", "keywords", "share"),
    [
        ("The Prüfungsordnung applies.", ["ordnung", "exam"], 0.5),
        ("ＡＢＣ  and\nmore", ["abc and", " ABC "], 1),
        ("它在周一", ["周一", "周二", "周三", "它"], 0.5),
        ("anything", ["", "  "], None),
        ("anything", [], None),
    ],
)
def test_keywords_by_hand(answer: str, keywords: list[str], share: float | None) -> None:
    assert keyword_share(answer, keywords) == share


def test_quotes_must_stand_in_one_of_the_texts_that_were_read() -> None:
    answer = "##begin_quote##the  cat sat##end_quote## so ##begin_quote##“on the mat”##end_quote##"
    assert quote_faithfulness(answer, ["Then the cat\nsat on the mat."]) == 1
    assert quote_faithfulness(answer, ["The dog.", "the cat sat"]) == 0.5
    assert quote_faithfulness("##begin_quote##the cat on##end_quote##", ["the cat", "on"]) == 0  # in neither alone
    assert quote_faithfulness("##begin_quote####end_quote##", ["the cat"]) == 0
    assert quote_faithfulness("the cat", ["the cat"]) is None


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("The statement does not say.", True),
        ("I'm sorry, the document does not mention it.", True),
        ("文中没有提到。", True),
        ("Das wird im gegebenen Text nicht gesagt.", True),
        ("The statement does not say more, so yes.", False),
        ("It is Monday.", False),
        ("", False),
    ],
)
def test_refusals_are_known_by_their_words(text: str, refusal: bool) -> None:
    assert refused(text) is refusal


# -- of a row ----------------------------------------------------------------------------------------------------------


def row(reference: str, answer: str = "x", **fields: object) -> Prediction:
    answers = {"m": score_answer(answer, reference, finished=True)}
    shared = {"id": "q", "instruction": "s", "input": "?", "reference": reference, "answers": answers}
    return Prediction.model_validate({**shared, **fields})


def taken(prediction: Prediction, *metrics: str) -> dict[str, float]:
    return text_scores(prediction, prediction.answers["m"], metrics or list(METRICS), ["given"])


def test_a_score_that_cannot_be_taken_is_absent() -> None:
    assert "rouge_2" not in taken(row("one")) and "rouge_1" in taken(row("one"))
    assert not {"rouge_1", "rouge_2", "rouge_l"} & taken(row("?!")).keys()
    assert taken(row("?!"))["english_rouge_l"] == 0  # as rouge_score has it
    assert not {"bleu", "chrf", "rouge_l"} & taken(row("  ")).keys()
    assert "quote_faithfulness" not in taken(row("one"))


def test_refusing_is_right_or_wrong_by_the_row() -> None:
    says = "The statement does not say."
    assert taken(row(says, "Monday."), "refusal", "over_refusal") == {"refusal": 0}
    assert taken(row(says, says), "refusal", "over_refusal") == {"refusal": 1}
    assert taken(row("Monday.", says), "refusal", "over_refusal") == {"over_refusal": 1}
    assert taken(row("Monday.", "Friday."), "refusal", "over_refusal") == {"over_refusal": 0}
    assert taken(row("Unknown.", says, unanswerable=True), "refusal", "over_refusal") == {"refusal": 1}
    assert taken(row(says, says, unanswerable=False), "refusal", "over_refusal") == {"over_refusal": 1}


def test_keywords_are_the_rows_own_or_those_given() -> None:
    assert taken(row("one", "given", keywords=["own"]), "keyword_share") == {"keyword_share": 0}
    assert taken(row("one", "given"), "keyword_share") == {"keyword_share": 1}


def test_quotes_are_looked_up_in_what_the_system_read() -> None:
    prediction = row("one", "##begin_quote##cat##end_quote##", instruction="a cat")
    assert taken(prediction, "quote_faithfulness") == {"quote_faithfulness": 1}
    prediction.answers["m"].contexts = ["a dog", "a hen"]  # it was shown these in place of the statement
    assert taken(prediction, "quote_faithfulness") == {"quote_faithfulness": 0}


def test_the_summary_has_corpus_scores_and_their_signature() -> None:
    answers, references = ["It is the red one.", "It was blue."], ["It is a red one.", "It is blue."]
    rows = [row(wanted, text, id=str(n)) for n, (text, wanted) in enumerate(zip(answers, references, strict=True))]
    for each in rows:
        each.answers["m"].scores |= taken(each, "bleu", "chrf")
    summary = summarise(rows, "m")
    assert summary["corpus"]["bleu"] == corpus_bleu(answers, references)
    assert "tok:13a" in summary["corpus"]["bleu"]["signature"]
    single = [bleu(*pair) for pair in zip(answers, references, strict=True)]
    assert summary["bleu"]["mean"] == pytest.approx(sum(single) / 2)
    assert summary["corpus"]["bleu"]["score"] != pytest.approx(sum(single) / 2)


# -- names -------------------------------------------------------------------------------------------------------------


def test_unknown_metrics_are_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no metric 'rougeL' \(did you mean 'rouge_l'\?\). There are: exact_match,"):
        check_metrics(["rougeL"], MeasuringConfig())
    with pytest.raises(UserError, match=r"did you mean 'log_perplexity'"):
        check_metrics(["perplexity"], MeasuringConfig())
    with pytest.raises(UserError, match="judge=true"):
        check_metrics(["judge"], MeasuringConfig())
    with pytest.raises(UserError, match=r"measuring\.reward=runs/demo/reward"):
        check_metrics(["reward"], MeasuringConfig())
    check_metrics(DEFAULT, MeasuringConfig())
    assert {*ALWAYS, *DEFAULT} <= METRICS.keys()


def test_the_documentation_has_every_metric_with_its_scale() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "evaluation_metrics.md").read_text(encoding="utf-8")
    table = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    told = {name: cells for cells in table for name in re.findall(r"`(\w+)`", cells[0])}
    assert told.keys() == METRICS.keys()
    better = {True: "higher", False: "lower", None: "–"}
    for name, metric in METRICS.items():
        assert told[name][2] == better[metric.higher_is_better], name
        assert told[name][1] in (metric.scale.replace("-1", "−1"), "count"), name
        assert (told[name][4] == "never |") is (metric.absent == "never"), name


# -- what models write when they go astray -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "\x00\x07\x1b[2J\u2028\ufeff",
        "\u200fשלום\u200f עולם",
        "a\u0301\u0327 ﬁne",
        "\U0001f600" * 50,
        "",
        " \n\t ",
        "lone \ud800 surrogate",
    ],
)
def test_every_text_can_be_scored_against_every_other(text: str) -> None:
    for answer, reference in ((text, "It is Monday."), ("It is Monday.", text), (text, text)):
        for name, value in taken(row(reference, answer)).items():
            limit = 100.0 + 1e-9 if METRICS[name].scale == "0 to 100" else 1.0
            assert 0 <= value <= limit, name
    if words(text):
        assert taken(row(text, text), "rouge_1")["rouge_1"] == 1


def test_marks_of_direction_are_no_part_of_a_word() -> None:
    assert rouge_l("\u200fשלום\u200f עולם", "שלום עולם") == 1


def test_a_megabyte_against_an_ordinary_reference_and_against_another_loop() -> None:
    """What models write at such length is a loop; where two are too long to be compared, the score is absent."""
    loop, other = "It is red, so yes. " * 55_000, "It is blue, so no. " * 55_000
    cheap = [name for name in METRICS if not name.startswith(("english_", "stemmed_"))]
    found = taken(row("It is red, so yes.", loop), *cheap)
    assert found["rouge_1"] < 1e-3 and found["edit_similarity"] < 1e-3
    assert edit_similarity(loop, other) is None  # would take minutes, and is said to be absent
    assert rouge_n(loop, other, 1) == pytest.approx(3 / 5)
