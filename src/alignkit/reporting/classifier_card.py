"""README.md of a reward model that was exported as a classifier: what it is, and how to ask it for a score."""

from __future__ import annotations

from alignkit.data.chat import end_of_turn_id
from alignkit.models.reward_model import RewardModel
from alignkit.reporting.plain import code

_CARD = """\
# Reward model

Of {base}: a sequence classifier with one label, whose logit says how good an answer is; higher is better.
{heads}
- **The text to score** is the whole conversation, rendered by the chat template of this folder, which ends with the
  end-of-turn token {end}. The score is read at that token: with anything after it the number means nothing. Do not let
  the tokenizer add special tokens a second time.
- **The score** is the logit minus {offset:.6g} (`reward_offset` in config.json): 0 is the mean of the answers that it
  was trained on, 1 their standard deviation. For ranking the offset does not matter. The probability that one answer is
  better than another is sigmoid({scale:.6g} * (difference of their scores)).
- Padding ({pad}) may stand on either side.

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".").eval()
messages = [{{"role": "user", "content": "What is 2 + 2?"}}, {{"role": "assistant", "content": "4"}}]
text = tokenizer.apply_chat_template(messages, tokenize=False)
with torch.inference_mode():
    logit = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
print(float(logit) - model.config.reward_offset)
```

Conversations of up to {max_length} tokens were trained on.
"""


def classifier_card(reward_model: RewardModel, offset: float) -> str:
    """The card's text; `offset` is what the logit is above the score."""
    tokenizer, heads = reward_model.tokenizer, reward_model.module.value_head.out_features
    several = f"It is the mean of {heads} heads; how much they disagree is not in it.\n" if heads > 1 else ""
    return _CARD.format(
        base=code(reward_model.model.path, in_table=False),
        heads=several,
        end=code(str(tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))), in_table=False),
        pad=code(str(tokenizer.pad_token), in_table=False),
        offset=offset,
        scale=reward_model.scale,
        max_length=reward_model.model.max_length,
    )
