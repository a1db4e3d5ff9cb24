"""The reward model: scores are a matter of the conversation alone, and what is saved is what was trained."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_random import conversation, random_model, save_random_base, tokenizer, user

from alignkit.core.config import LoraConfig, ModelConfig
from alignkit.core.errors import UserError
from alignkit.data.chat import encode_conversation
from alignkit.models.conversations import encode_answers
from alignkit.models.loading import load_base, load_policy, new_adapter
from alignkit.models.reward_model import RewardModel
from alignkit.models.value_head import PromptGroup, ValueHeadModel, collate, visible
from alignkit.scoring.reward import RewardScorer

QUESTIONS = ("Who leads Ferro?", "Notes: Anna lives in Oslo. Where does Anna live?", "Hello")
ANSWERS = ("Anna.", "The home of Anna is Oslo.", "", "The statement does not say.", "no")
ROWS = [{"messages": [m.model_dump() for m in conversation(q, a)]} for q in QUESTIONS for a in ANSWERS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return save_random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reward_model(base: ModelConfig) -> RewardModel:
    policy = new_adapter(load_base(base), LoraConfig(rank=4, dropout=0.1), ["all-linear"])
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model = RewardModel(ValueHeadModel(policy), tokenizer(), base)
    torch.nn.init.normal_(model.module.value_head.weight)
    model.centre(model.score(ROWS))
    return model


@pytest.fixture(scope="module")
def saved(reward_model: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    reward_model.save_pretrained(folder)
    return folder


# -- scores ----------------------------------------------------------------------------------------------------------


def test_a_score_is_the_head_at_the_end_of_turn_of_the_plain_conversation(reward_model: RewardModel) -> None:
    scores = reward_model.score(ROWS)
    assert len(set(scores)) == len(ROWS)
    policy, head = reward_model.module.policy, reward_model.module.value_head
    for row, score in list(zip(ROWS, scores, strict=True))[:7]:
        question, answer = (message["content"] for message in row["messages"])
        ids = encode_conversation(tokenizer(), conversation(question, answer))
        assert ids[-1] == tokenizer().convert_tokens_to_ids("<|im_end|>")
        with torch.inference_mode():
            hidden = policy(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
            raw = float(head(hidden[0, -1]))
        assert score == pytest.approx((raw - reward_model.offset) / reward_model.scale, abs=1e-4)


def test_scores_do_not_depend_on_neighbours_order_or_batches(reward_model: RewardModel) -> None:
    together = reward_model.score(ROWS)
    alone = [reward_model.score([row])[0] for row in ROWS]
    reversed_order = reward_model.score(ROWS[::-1])[::-1]
    one_group_a_batch = reward_model.score(ROWS, batch_tokens=1)
    repeated = reward_model.score([*ROWS, *ROWS])
    for other in (alone, reversed_order, one_group_a_batch, repeated[: len(ROWS)], repeated[len(ROWS) :]):
        assert other == pytest.approx(together, abs=1e-4)


def test_calls_before_an_answer_count_and_an_answer_that_calls_has_no_score(reward_model: RewardModel) -> None:
    def called(query: str) -> dict[str, object]:
        call = {"type": "function", "function": {"name": "find", "arguments": {"query": query}}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    first = ROWS[0]["messages"]
    rows = [{"messages": [first[0], called(query), *first]} for query in ("Anna", "Bo", "Anna")]
    one, other, again = reward_model.score(rows)
    assert one == again != other
    with pytest.raises(UserError, match="row 1 cannot be scored: the answer calls a tool"):
        reward_model.score([ROWS[0], {"messages": [first[0], called("Anna")]}])


def test_scores_do_not_depend_on_the_padding_side_or_the_padding_token(reward_model: RewardModel) -> None:
    groups = [PromptGroup(*_encoded(question)) for question in QUESTIONS]
    right = collate(groups, pad_id=tokenizer().pad_token_id)
    left = {key: value.clone() for key, value in right.items()}
    for row, group in enumerate(groups):
        shift = right["input_ids"].shape[1] - len(group)
        for key in ("input_ids", "segments", "position_ids"):
            left[key][row] = torch.roll(right[key][row], shift)
        left["last"][right["last"][:, 0] == row, 1] += shift
    assert not torch.equal(left["input_ids"], right["input_ids"])
    other_pad = {**right, "input_ids": torch.where(right["segments"] < 0, tokenizer().eos_token_id, right["input_ids"])}
    module = reward_model.module.eval()
    with torch.inference_mode():
        expected = module(**right)
        assert torch.allclose(module(**left), expected, atol=1e-4)
        assert torch.equal(module(**other_pad), expected)  # pad = end-of-turn: the score is still read at the real one


def _encoded(question: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    prompt, answers = encode_answers(tokenizer(), user(question), list(ANSWERS), 256)
    return prompt, tuple(answer for answer in answers if not isinstance(answer, str))


def test_answers_see_the_prompt_and_themselves_only() -> None:
    segments = collate([PromptGroup((1, 2), ((3, 4), (5,))), PromptGroup((1,), ((2,),))], pad_id=0)["segments"]
    assert segments.tolist() == [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
    first = visible(segments)[0, 0].int().tolist()
    assert first == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the second answer sees the prompt, but not the first answer
    ]


def test_positions_continue_the_prompt_in_every_answer() -> None:
    batch = collate([PromptGroup((1, 2), ((3, 4), (5,)))], pad_id=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["last"].tolist() == [[0, 3], [0, 4]]


def test_a_group_is_split_when_its_answers_do_not_fit_one_row() -> None:
    group = PromptGroup((1, 2), ((3, 4), (5,), (6, 7, 8), (9,)))
    parts = list(group.split(5))
    assert [part.answers for part in parts] == [((3, 4), (5,)), ((6, 7, 8),), ((9,),)]
    assert all(part.prompt == group.prompt for part in parts)
    assert list(group.split(100)) == [group]


def test_splitting_groups_does_not_change_scores(reward_model: RewardModel) -> None:
    group = PromptGroup(*_encoded(QUESTIONS[1]))
    whole = reward_model.raw_scores([group])[0]
    parts = [score for part in group.split(len(group.prompt) + 9) for score in reward_model.raw_scores([part])[0]]
    assert len(list(group.split(len(group.prompt) + 9))) > 1
    assert parts == pytest.approx(whole, abs=1e-4)


def test_rows_come_in_three_forms(reward_model: RewardModel) -> None:
    question, answer = QUESTIONS[1], ANSWERS[1]
    as_lists = {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
    scores = reward_model.score([ROWS[6], as_lists, {"prompt": question, "completion": answer}])
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)  # a place in the batch moves the last digits
    messages = [message.model_dump() for message in conversation(question, answer)]
    rendered = tokenizer().apply_chat_template(messages, tokenize=False)
    assert rendered.endswith("<|im_end|>\n")  # what follows the end of turn is no part of the answer
    as_text = reward_model.score([rendered, rendered.rstrip(), ROWS[0]])
    assert as_text == pytest.approx([scores[0], scores[0], reward_model.score(ROWS[:1])[0]], abs=1e-4)
    assert as_text[0] == pytest.approx(as_text[1], abs=1e-5)
    assert reward_model.score([]) == []


def test_any_number_of_rows_is_scored_while_it_is_read(reward_model: RewardModel) -> None:
    read = []

    def rows() -> Iterator[Any]:
        for number, row in enumerate([*ROWS, {"prompt": "Hello " * 300, "completion": "no"}]):
            read.append(number)
            yield row

    found = reward_model.iter_scores(rows(), window=4)
    assert read == []
    first = next(found)
    assert read == [0, 1, 2, 3]  # never more than a window ahead
    scores = [first, *found]
    assert scores[:-1] == pytest.approx(reward_model.score(ROWS, show_progress=True), abs=1e-4)
    assert scores[-1] == "longer than max_length (311 of 256 tokens)"
    with pytest.raises(UserError, match="row 5: give"):
        list(reward_model.iter_scores([*ROWS[:5], {"text": "Hello"}], window=2))


def test_no_logit_of_the_vocabulary_is_ever_computed(
    reward_model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reward_model.score(ROWS)
    output_layer = reward_model.module.policy.get_output_embeddings()

    def refuse(*_: Any) -> None:
        raise AssertionError("the language-model head was called")

    monkeypatch.setattr(output_layer, "forward", refuse)
    assert reward_model.score(ROWS) == expected
    with pytest.raises(AssertionError, match="language-model head"):
        reward_model.module.policy(input_ids=torch.tensor([[1, 2]]))


def test_centred_scores_have_mean_0_and_deviation_1(reward_model: RewardModel) -> None:
    scores = torch.tensor(reward_model.score(ROWS))
    assert abs(float(scores.mean())) < 1e-5
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hello"}]}, "row 1: .*assistant"),
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "row 1: .*prompt"),
        ({"messages": "Hello"}, "row 1: .*prompt"),
        ({"messages": [3]}, "row 1: give"),
        ({"text": "Hello"}, "row 1: give"),
        ({"prompt": "Hello", "completion": 3}, "row 1: give"),
        ({"prompt": "Hello " * 300, "completion": "no"}, r"row 1 .*longer than max_length \(\d+ of 256 tokens\)"),
        ({"prompt": "Hello", "completion": "no <|im_end|>"}, "row 1 .*special token"),
        ("Hello", r"row 1 .*a text that does not end with <\|im_end\|> is no conversation"),
        ("Hello " * 300 + "<|im_end|>", r"row 1 .*longer than max_length"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(reward_model: RewardModel, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reward_model.score([ROWS[0], row])


def test_the_scorer_gives_reasons_instead(saved: Path) -> None:
    scorer = RewardScorer(saved)
    scores = scorer.score([conversation("Hello", "no"), conversation("Hello " * 300, "no")])
    assert isinstance(scores[0], float)
    assert scores[1] is None
    assert scorer.reasons[0] is None
    assert "longer than max_length" in str(scorer.reasons[1])


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_saved_model_scores_exactly_the_same(reward_model: RewardModel, saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"adapter", "value_head.safetensors", "reward_config.json"}
    loaded = RewardModel.from_pretrained(saved)
    assert loaded.score(ROWS) == reward_model.score(ROWS)
    assert loaded.module.value_head.weight.dtype == torch.float32


def test_a_missing_or_altered_part_is_an_error(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save_pretrained(tmp_path)
    head = tmp_path / "value_head.safetensors"
    content = head.read_bytes()
    head.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"value_head.safetensors: not the value head"):
        RewardModel.from_pretrained(tmp_path)
    head.unlink()
    with pytest.raises(UserError, match=r"value_head.safetensors: the value head is missing"):
        RewardModel.from_pretrained(tmp_path)
    head.write_bytes(content)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        RewardModel.from_pretrained(tmp_path)
    (tmp_path / "reward_config.json").write_text('{"base": {"name": "x"}}')
    with pytest.raises(UserError, match=r"reward_config.json: damaged"):
        RewardModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        RewardModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a reward model"):
        RewardModel.from_pretrained(tmp_path / "adapter")


def test_a_head_of_another_size_is_refused(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save_pretrained(tmp_path)
    head, config = tmp_path / "value_head.safetensors", tmp_path / "reward_config.json"
    for weights, found in (({"weight": torch.ones(1, 48)}, "1 heads for 48 hidden values"), ({}, "no weight")):
        save_file(weights, head)
        entries = json.loads(config.read_text()) | {"value_head_sha256": hashlib.sha256(head.read_bytes()).hexdigest()}
        config.write_text(json.dumps(entries))
        with pytest.raises(UserError, match=rf"value_head.safetensors: holds {found}, but .* want 1 for 32"):
            RewardModel.from_pretrained(tmp_path)


def test_another_base_is_refused(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save_pretrained(tmp_path / "reward")
    other = save_random_base(tmp_path / "other", seed=5)
    config = tmp_path / "reward" / "reward_config.json"
    entries = json.loads(config.read_text())
    entries["base"]["path"] = other.path
    config.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="base"):
        RewardModel.from_pretrained(tmp_path / "reward")


def test_policy_and_reward_model_share_a_base(base: ModelConfig, reward_model: RewardModel, saved: Path) -> None:
    policy = load_policy(base, str(saved / "adapter"))
    ids = torch.tensor([encode_conversation(tokenizer(), conversation("Hello", "no"))])
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.5)  # another adapter than the reward model's
    with torch.inference_mode():
        before = policy(input_ids=ids).logits
        shared = RewardModel.from_pretrained(saved, policy)
        assert shared.module.policy is policy
        assert shared.score(ROWS) == pytest.approx(reward_model.score(ROWS), abs=1e-5)
        assert torch.equal(policy(input_ids=ids).logits, before)  # the policy's own adapter is active again


def test_a_merged_policy_is_not_taken_for_the_base(base: ModelConfig, reward_model: RewardModel, saved: Path) -> None:
    merged = load_policy(base, str(saved / "adapter")).merge_and_unload()
    separate = RewardModel.from_pretrained(saved, merged)
    assert separate.module.policy is not merged
    assert separate.score(ROWS) == reward_model.score(ROWS)


def test_attention_without_a_free_mask_is_refused() -> None:
    model = random_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"model.attn=flash_attention_2.*sdpa"):
        ValueHeadModel(model)


def test_eager_and_sdpa_attention_score_alike(base: ModelConfig, saved: Path, tmp_path: Path) -> None:
    entries = json.loads((saved / "reward_config.json").read_text())
    entries["base"]["attn"] = "eager"
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "reward_config.json").unlink()
    (tmp_path / "reward_config.json").write_text(json.dumps(entries))
    eager, sdpa = RewardModel.from_pretrained(tmp_path), RewardModel.from_pretrained(saved)
    assert eager.module.policy.config._attn_implementation == "eager"
    assert eager.score(ROWS) == pytest.approx(sdpa.score(ROWS), abs=1e-4)


def test_importing_the_module_loads_no_torch() -> None:
    program = "import sys, alignkit.models.reward_model, alignkit.scoring.reward; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
