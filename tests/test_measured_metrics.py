"""Scores that need a model: log-perplexity, reward, tokens, embeddings. By a plain loop, and after an interruption."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_random import conversation, random_model, save_random_base, tokenizer, user

from alignkit.core.app import load_config, run_command
from alignkit.core.artifact import Artifact
from alignkit.core.config import LoraConfig, ModelConfig
from alignkit.core.errors import UserError
from alignkit.core.journal import Journal
from alignkit.data.chat import encode_conversation, encode_prompt
from alignkit.evaluate import run
from alignkit.evaluation.metrics import perplexity
from alignkit.evaluation.metrics.catalogue import MeasuringConfig
from alignkit.evaluation.metrics.measure import score_rows
from alignkit.evaluation.metrics.perplexity import log_perplexities
from alignkit.evaluation.predictions import Prediction, score_answer, summarise
from alignkit.models.loading import load_base, new_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import ValueHeadModel

REFERENCES = [
    (f"r{n}", user(f"Notes: it is {n}. What is it?"), "It is " + "very " * (n % 4) + "red.") for n in range(9)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reward_folder(base: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    policy = new_adapter(load_base(base), LoraConfig(rank=2), ["all-linear"])
    model = RewardModel(ValueHeadModel(policy), tokenizer(), base)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.module.value_head.weight)
    model.save_pretrained(folder := tmp_path_factory.mktemp("reward"))
    return folder


@pytest.fixture
def artifact(base: ModelConfig, tmp_path: Path) -> Iterator[Artifact]:
    with Artifact.open("evaluate", load_config("evaluate", overrides(base, tmp_path))) as opened:
        yield opened


def overrides(base: ModelConfig, folder: Path, *more: str) -> list[str]:
    """Of an evaluation of the base on six rows of two sources."""
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for number in range(6):
            fields = {"instruction": f"Notes: it is {number}.", "input": "What is it?", "source": "ab"[number % 2]}
            file.write(json.dumps({"id": f"t{number}", "output": f"It is {number}.", **fields}) + "\n")
    paths = [f"model.path={base.path}", "model.max_length=256", f"data.path={folder / 'test.jsonl'}"]
    return [*paths, "judge=false", "sampling.max_new_tokens=8", f"output_dir={folder / 'evaluate'}", *more]


def rows_of(*answers: dict[str, str], reference: str = "It is red.") -> list[Prediction]:
    return [
        Prediction(
            id=f"q{number}",
            instruction=f"Notes: it is {number}.",
            input="What is it?",
            reference=reference,
            answers={name: score_answer(text, reference, finished=True) for name, text in each.items()},
        )
        for number, each in enumerate(answers)
    ]


# -- log-perplexity ----------------------------------------------------------------------------------------------------


def by_a_plain_loop(model: Any, prompt: Any, reference: str) -> float:
    """One row alone, token by token: -log softmax of what stands there next, end of turn included."""
    ids = encode_conversation(tokenizer(), [*prompt, conversation("", reference)[-1]])
    first = len(encode_prompt(tokenizer(), prompt))
    with torch.inference_mode():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nll = [-float(log_probs[place - 1, ids[place]]) for place in range(first, len(ids))]
    return sum(nll) / len(nll)


def test_log_perplexity_is_the_mean_over_the_reference_and_its_end(tmp_path: Path) -> None:
    model = random_model()
    with Journal(tmp_path / "j.jsonl", "f") as journal:
        found = log_perplexities(model, tokenizer(), REFERENCES, 256, journal)
    assert found == pytest.approx(
        {id: by_a_plain_loop(model, prompt, text) for id, prompt, text in REFERENCES}, abs=1e-4
    )
    assert len(set(found.values())) == len(REFERENCES)


def test_an_interrupted_pass_ends_with_the_very_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 100)
    model, calls = random_model(), 0
    with Journal(tmp_path / "whole.jsonl", "f") as journal:
        whole = log_perplexities(model, tokenizer(), REFERENCES, 256, journal)
    plain = perplexity.mean_nll

    def interrupted(*arguments: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(perplexity, "mean_nll", interrupted)
    with Journal(tmp_path / "killed.jsonl", "f") as journal, pytest.raises(KeyboardInterrupt):
        log_perplexities(model, tokenizer(), REFERENCES, 256, journal)
    calls = 10
    with Journal(tmp_path / "killed.jsonl", "f") as journal:
        assert 0 < len(journal.done) < len(REFERENCES)
        assert log_perplexities(model, tokenizer(), REFERENCES, 256, journal) == whole
    resumed = calls - 10
    with Journal(tmp_path / "whole.jsonl", "f") as journal:
        log_perplexities(model, tokenizer(), REFERENCES, 256, journal)  # all is there: nothing is read again
    assert calls - 10 == resumed > 0


def test_a_system_without_a_model_here_and_a_row_too_long_have_no_log_perplexity(
    base: ModelConfig, artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*rows_of({"a": "x", "server": "y"}, {"a": "z"}), *rows_of({"a": "x"}, reference="red " * 300)]
    rows[2].id = "long"
    score_rows(
        rows,
        ["log_perplexity"],
        MeasuringConfig(),
        base,
        {"a": lambda: (random_model(), tokenizer())},
        artifact,
    )
    there = [["log_perplexity" in answer.scores for answer in row.answers.values()] for row in rows]
    assert there == [[True, False], [True], [False]]
    assert "no log-perplexity for server: it has no model on this machine" in caplog.text
    assert "no log-perplexity for 1 of 3 rows, the first because: long: longer than max_length" in caplog.text
    summary = summarise(rows, "a")
    assert summary["perplexity"]["n"] == 2
    first, second = (row.answers["a"].scores["log_perplexity"] for row in rows[:2])
    assert summary["perplexity"]["mean"] == pytest.approx(math.sqrt(math.exp(first) * math.exp(second)))


# -- the others --------------------------------------------------------------------------------------------------------


def test_rewards_are_those_of_the_reward_model(base: ModelConfig, reward_folder: Path, artifact: Artifact) -> None:
    rows = rows_of({"a": "red", "b": "blue"}, {"a": "red", "b": "red"})
    score_rows(rows, ["reward"], MeasuringConfig(reward=str(reward_folder)), base, {}, artifact)
    asked = [
        {"messages": [m.model_dump() for m in conversation(f"{row.instruction}\n\n{row.input}", answer.text)]}
        for row in rows
        for answer in row.answers.values()
    ]
    found = [answer.scores["reward"] for row in rows for answer in row.answers.values()]
    assert found == pytest.approx(RewardModel.from_pretrained(reward_folder).score(asked), abs=1e-4)
    assert len(set(found)) == 3


def test_an_answer_that_the_reward_model_cannot_read_has_no_reward(
    base: ModelConfig, reward_folder: Path, artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of({"a": "red", "b": "red " * 400})
    score_rows(rows, ["reward"], MeasuringConfig(reward=str(reward_folder)), base, {}, artifact)
    assert "reward" in rows[0].answers["a"].scores
    assert "reward" not in rows[0].answers["b"].scores
    assert "no reward for 1 of 2 answers, the first because: longer than max_length" in caplog.text


def test_embeddings_and_tokens_of_every_answer(base: ModelConfig, artifact: Artifact) -> None:
    rows = rows_of({"a": "It is red.", "b": "Nothing of the kind"}, {"a": "", "b": "It is reddish."})
    score_rows(rows, ["embedding_cosine", "tokens"], MeasuringConfig(), base, {}, artifact)
    cosine = [[answer.scores["embedding_cosine"] for answer in row.answers.values()] for row in rows]
    assert cosine[0][0] == pytest.approx(1)
    assert cosine[0][1] < 0.2 < cosine[1][1] < 1
    assert cosine[1][0] == 0  # an empty answer is like nothing, and counts
    assert rows[0].answers["a"].scores["tokens"] == len(tokenizer().encode("It is red.", add_special_tokens=False))


# -- by the command ----------------------------------------------------------------------------------------------------


def test_metrics_that_are_asked_for_are_in_the_manifest_by_source(
    base: ModelConfig, reward_folder: Path, tmp_path: Path
) -> None:
    more = ["metrics=[chrf,log_perplexity,reward,embedding_cosine]", f"measuring.reward={reward_folder}"]
    artifact = run(load_config("evaluate", overrides(base, tmp_path, *more)))
    summary = artifact.metrics["models"]["base"]
    for name in ("exact_match", "chrf", "log_perplexity", "reward", "embedding_cosine"):
        assert summary[name]["n"] == 6
        assert {value: scores[name]["n"] for value, scores in summary["by"]["source"].items()} == {"a": 3, "b": 3}
    assert "rouge_l" not in summary and summary["corpus"]["chrf"]["signature"].startswith("nrefs:1")
    lines = (artifact.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [Prediction.model_validate_json(line) for line in lines]
    assert all(
        row.answers["base"].scores["log_perplexity"]
        == pytest.approx(
            by_a_plain_loop(load_base(base), user(f"{row.instruction}\n\n{row.input}"), row.reference), 1e-3
        )
        for row in rows[:2]
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("metrics=[rougel]", "no metric 'rougel' (did you mean 'rouge_l'?)"),
        ("metrics=[reward]", "reward needs a reward model"),
        ("measuring.reward=nowhere", "measuring.reward=nowhere: no such file or folder"),
        ("export=[lmeval]", "no harness 'lmeval' (did you mean 'lm_eval'?). There are: lm_eval, promptfoo"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    base: ModelConfig, tmp_path: Path, more: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("evaluate", overrides(base, tmp_path, more)) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


# -- other harnesses ---------------------------------------------------------------------------------------------------


def test_questions_are_written_for_other_harnesses(base: ModelConfig, tmp_path: Path) -> None:
    import yaml
    from jinja2 import Environment

    artifact = run(load_config("evaluate", overrides(base, tmp_path, "export=[lm_eval,promptfoo]")))
    task = yaml.safe_load((artifact.folder / "lm_eval/alignkit_held_out.yaml").read_text(encoding="utf-8"))
    data = artifact.folder / "lm_eval" / task["dataset_kwargs"]["data_files"]["test"]
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    assert rows[1][task["doc_to_text"]] == "Notes: it is 1.\n\nWhat is it?"
    assert rows[1][task["doc_to_target"]] == "It is 1."
    assert task["generation_kwargs"]["max_gen_toks"] == 8
    config = yaml.safe_load((artifact.folder / "promptfoo/promptfooconfig.yaml").read_text(encoding="utf-8"))
    tests = artifact.folder / "promptfoo" / config["tests"].removeprefix("file://")
    first = json.loads(tests.read_text(encoding="utf-8").splitlines()[0])
    assert first["vars"] == {"prompt": rows[0]["prompt"]}
    (template,) = config["prompts"]  # Jinja's tojson is what dump is in promptfoo's templates
    for prompt in (rows[0]["prompt"], '[1, "two"]', "- role: user"):
        shown = Environment().from_string(template.replace("dump", "tojson")).render(prompt=prompt)
        assert json.loads(shown) == [{"role": "user", "content": prompt}]
    assert first["assert"][0] == {"type": "equals", "value": "It is 0.", "metric": "exact_match"}
    assert artifact.metrics["exported"] == {"lm_eval": 6, "promptfoo": 6}


@pytest.mark.parametrize("text", ["Say {{name}}", "{% raw %}", "{# note #}", "file://secret.txt"])
def test_what_promptfoo_would_take_for_a_template_or_a_file_is_left_out(tmp_path: Path, text: str) -> None:
    from alignkit.core.records import QAExample
    from alignkit.evaluation.harnesses import write_lm_eval, write_promptfoo

    examples = [
        QAExample(id="plain", instruction="{Who}?", output="50 % of {it}"),
        QAExample(id="prompt", instruction=text, output="x"),
        QAExample(id="reference", instruction="x", output=text),
    ]
    assert write_promptfoo(tmp_path, examples, 8) == 1
    assert write_lm_eval(tmp_path, examples, 8) == 3
    assert json.loads((tmp_path / "tests.jsonl").read_text(encoding="utf-8"))["description"] == "plain"


def test_a_reward_folder_without_a_model_is_refused(base: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    more = ["metrics=[reward]", f"measuring.reward={tmp_path / 'empty'}"]
    with pytest.raises(UserError, match="no reward model"):
        run(load_config("evaluate", overrides(base, tmp_path, *more)))
