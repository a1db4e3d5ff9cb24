"""Many requests at once on one base: rows join a running batch, leave it when they end, and adapters take turns.

One thread owns the model. Each turn it lets waiting requests in, one after the other from each model's queue while
there is room, and gives the batch of every model that has rows one step: different adapters are never in one batch. A
request's noise is drawn before it begins, as `HFGenerator` draws it, so that what it writes depends neither on its
neighbours nor on when it came, beyond floating-point rounding.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from alignkit.core.config import SamplingConfig
from alignkit.core.errors import UserError
from alignkit.core.records import Message
from alignkit.data.chat import encode_prompt, end_of_turn_id, special_token_in
from alignkit.generation.hf import draw, pad_left, sample_tokens
from alignkit.generation.text_stream import TextStream
from alignkit.models.shared_base import SharedBase

LOG = logging.getLogger("alignkit")
T = TypeVar("T")

PROMPT_TOKENS = 4096
"""Prompt tokens, padding included, that are read at once when requests join."""


class BusyError(Exception):
    """No request is taken now: too many are waiting, or the engine is closing."""


class PromptError(UserError):
    """A prompt that cannot be answered; `tokens` is how long it is, where that is why."""

    def __init__(self, message: str, tokens: int | None = None) -> None:
        super().__init__(message)
        self.tokens = tokens


@dataclass(frozen=True)
class Part:
    """News of an answer: more text, and the reason why it ended when it has: stop, length, cancelled or error."""

    index: int
    text: str
    finish_reason: str | None = None


class Row:
    """One answer that is being written."""

    def __init__(self, request: Request, index: int, temperature: float, top_p: float, noise: list[float]) -> None:
        self.request = request
        self.index = index
        self.temperature, self.top_p, self.noise = temperature, top_p, noise
        self.stream = TextStream(request.tokenizer, request.stop)
        self.written = 0

    def push(self, token: int, end_id: int) -> bool:
        """Take the next token and tell its text; returns whether the answer goes on."""
        self.written += 1
        text = "" if token == end_id else self.stream.push(token)
        reason = None
        if token == end_id or self.stream.stopped:
            reason = "stop"
        elif self.written == len(self.noise):
            reason = "length"
        if reason and not self.stream.stopped:
            text += self.stream.finish()
            reason = "stop" if self.stream.stopped else reason
        if text or reason:
            self.request.receive(Part(self.index, text, reason))
        return reason is None


class Request:
    """A prompt for one model, to be answered `sampling.n` times. `receive` is called in the engine's thread.

    `sampling` gives each setting as one value: temperature and top_p as [value, value].
    """

    def __init__(
        self,
        model: str,
        prompt: list[int],
        sampling: SamplingConfig,
        seed: int,
        tokenizer: Any,
        receive: Callable[[Part], None],
        stop: Sequence[str] = (),
    ) -> None:
        self.model, self.prompt, self.tokenizer, self.receive, self.stop = model, prompt, tokenizer, receive, stop
        draws = draw(sampling.n, sampling, seed)
        columns = zip(draws.temperature.tolist(), draws.top_p.tolist(), draws.noise.tolist(), strict=True)
        self.rows = [Row(self, index, *column) for index, column in enumerate(columns)]
        self.cancelled = False
        """Set from any thread; its rows leave before the next step."""

    @property
    def tokens_written(self) -> int:
        """Tokens of all its answers so far, their ends included."""
        return sum(row.written for row in self.rows)

    def end(self, reason: str) -> None:
        """Tell every answer that it ended so."""
        for row in self.rows:
            self.receive(Part(row.index, "", reason))


def encode_request(
    tokenizer: Any, messages: Sequence[Message], max_tokens: int | None, most: int, max_length: int
) -> tuple[list[int], int]:
    """Token ids of a prompt, and how many tokens may follow: `max_tokens`, or what fits and is at most `most`.

    Raises `PromptError` for a prompt that the chat template cannot take, that holds the text of a special token, or
    that is too long for `max_length`: nothing is cut.
    """
    try:
        prompt = encode_prompt(tokenizer, messages)
    except UserError as error:
        raise PromptError(str(error)) from error
    if special := special_token_in(tokenizer, messages):
        raise PromptError(f"the text holds the special token {special}")
    room = max_length - len(prompt)
    if room < (max_tokens or 1):
        wanted = f", and max_tokens={max_tokens} are to follow" if max_tokens else ""
        raise PromptError(
            f"the prompt has {len(prompt)} tokens{wanted}: more than the context of {max_length} tokens", len(prompt)
        )
    return prompt, max_tokens or min(most, room)


class Batch:
    """Rows of one model that are decoded together. Row i of the tensors is `rows[i]`; what is shorter is padded left.

    `mask` [rows, length], `position` [rows, 1] and `logits` [rows, vocabulary] are those of the last token read.
    """

    def __init__(self, model: Any, pad_id: int, end_id: int) -> None:
        self.model, self.pad_id, self.end_id = model, pad_id, end_id
        self.rows: list[Row] = []
        self.cache: Any = None
        self.mask: Tensor
        self.position: Tensor
        self.logits: Tensor

    def join(self, requests: Sequence[Request]) -> None:
        """Read the prompts of these requests, each once, and add their rows."""
        from transformers import DynamicCache

        device = next(self.model.parameters()).device
        input_ids, mask = (tensor.to(device) for tensor in pad_left([each.prompt for each in requests], self.pad_id))
        position = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        # Not the cache that the model would choose: one with a sliding window forgets columns, which differ by row here
        cache = DynamicCache()
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        owners = [number for number, each in enumerate(requests) for _ in each.rows]
        cache.batch_select_indices(torch.tensor(owners, device=device))
        mask, position, logits = mask[owners], position[owners, -1:], output.logits[owners, -1].float()
        if self.rows:
            longest = max(mask.shape[1], self.mask.shape[1])
            for old, new in zip(self.cache.layers, cache.layers, strict=True):
                _append(old, new, longest)
            mask = torch.cat([_lengthen(each, longest, -1) for each in (self.mask, mask)])
            position, logits = torch.cat([self.position, position]), torch.cat([self.logits, logits])
        self.cache, self.mask, self.position, self.logits = cache, mask, position, logits
        self.rows += [row for each in requests for row in each.rows]

    def step(self) -> None:
        """Draw a token for every row, let go of those that end, and read the tokens of the others."""
        now = [(row.temperature, row.top_p, row.noise[row.written]) for row in self.rows]
        temperature, top_p, noise = torch.tensor(now, device=self.logits.device).T
        tokens = sample_tokens(self.logits, temperature, top_p, noise)
        going = [row.push(token, self.end_id) for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        tokens = tokens[torch.tensor(going, device=tokens.device)]
        self.keep(going)
        if not self.rows:
            return
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.position = self.position + 1
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1].float()

    def keep(self, kept: Sequence[bool]) -> None:
        """Let go of the rows that are not kept, and of columns that are padding in all that are left."""
        if all(kept):
            return
        index = torch.tensor([place for place, keep in enumerate(kept) if keep], device=self.mask.device)
        self.rows = [row for row, keep in zip(self.rows, kept, strict=True) if keep]
        if not self.rows:
            self.cache = None
            return
        self.cache.batch_select_indices(index)
        self.mask, self.position, self.logits = self.mask[index], self.position[index], self.logits[index]
        empty = int(self.mask.any(dim=0).int().argmax())
        if empty:
            self.mask = self.mask[:, empty:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., empty:, :], layer.values[..., empty:, :]


class Engine:
    """Answers requests in a thread of its own: at most `max_rows` answers at once, at most `max_waiting` requests wait.

    A context manager, which closes it.
    """

    def __init__(self, base: SharedBase, max_rows: int, max_waiting: int) -> None:
        self.base, self.max_rows, self.max_waiting = base, max_rows, max_waiting
        self._end_id, self._pad_id = end_of_turn_id(base.tokenizer), base.tokenizer.pad_token_id
        self._batches = {name: self._new_batch() for name in base.names}
        self._waiting: dict[str, deque[Request]] = {name: deque() for name in base.names}
        self._turns = deque(base.names)
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is still running as cancelled, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Have a request answered. Raises `BusyError` when too many wait, or the engine closes."""
        assert len(request.rows) <= self.max_rows, "it would wait for ever"
        with self._changed:
            if self._closing or sum(map(len, self._waiting.values())) >= self.max_waiting:
                raise BusyError
            self._waiting[request.model].append(request)
            self._changed.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have something else done in the thread that owns the model, between two steps. Raises `BusyError` alike."""
        future: Future[T] = Future()

        def do() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

        with self._changed:
            if self._closing or len(self._calls) >= self.max_waiting:
                raise BusyError
            self._calls.append(do)
            self._changed.notify()
        return future

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._has_work())
                    if self._closing:
                        break
                    call = self._calls.popleft() if self._calls else None
                if call:
                    call()
                self._turn()
        self._abandon()

    def _has_work(self) -> bool:
        return bool(self._calls or any(self._waiting.values()) or any(each.rows for each in self._batches.values()))

    def _turn(self) -> None:
        """Let requests in, and give each model's batch a step."""
        for batch in self._batches.values():
            batch.keep([not row.request.cancelled for row in batch.rows])
        admitted = self._admit()
        for name, batch in self._batches.items():
            joining = [request for request in admitted if request.model == name]
            if not batch.rows and not joining:
                continue
            try:
                with self.base.using(name) as model:
                    batch.model = model
                    for requests in _read_together(joining):
                        batch.join(requests)
                    batch.step()
            except Exception:  # out of memory, for one: these requests fail, the others go on
                LOG.exception("model %s: its running requests failed", name)
                self._batches[name] = self._new_batch()
                for request in {row.request for row in batch.rows} | set(joining):
                    request.end("error")

    def _admit(self) -> list[Request]:
        """Requests that may begin: one of each model in turn, while there is room for the next in turn."""
        room = self.max_rows - sum(len(batch.rows) for batch in self._batches.values())
        admitted: list[Request] = []
        with self._changed:
            for waiting in self._waiting.values():
                kept = [request for request in waiting if not request.cancelled]
                waiting.clear()
                waiting.extend(kept)
            while any(self._waiting.values()):
                queue = self._waiting[self._turns[0]]
                if queue and len(queue[0].rows) > room:
                    break
                if queue:
                    room -= len(queue[0].rows)
                    admitted.append(queue.popleft())
                self._turns.rotate(-1)
        return admitted

    def _abandon(self) -> None:
        """End as cancelled what is running or waiting."""
        with self._changed:
            running = {row.request for batch in self._batches.values() for row in batch.rows}
            left = [*running, *(request for queue in self._waiting.values() for request in queue)]
            self._batches = {name: self._new_batch() for name in self._batches}
            for queue in self._waiting.values():
                queue.clear()
            calls, self._calls = list(self._calls), deque()
        for request in left:
            request.end("cancelled")
        for call in calls:
            call()

    def _new_batch(self) -> Batch:
        return Batch(self.base.policy, self._pad_id, self._end_id)


def _read_together(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests in groups whose prompts, padded to the longest, hold at most `PROMPT_TOKENS`."""
    groups: list[list[Request]] = []
    for request in requests:
        longest = max(len(each.prompt) for each in [request, *(groups[-1] if groups else [])])
        if groups and longest * (len(groups[-1]) + 1) <= PROMPT_TOKENS:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def _append(old: Any, new: Any, length: int) -> None:
    """Put a cache layer's rows before those of a new one, both as long as said."""
    new.keys = torch.cat([_lengthen(each.keys, length, -2) for each in (old, new)])
    new.values = torch.cat([_lengthen(each.values, length, -2) for each in (old, new)])


def _lengthen(tensor: Tensor, length: int, dim: int) -> Tensor:
    """The tensor with zeros before its beginning along a dimension (-1 or -2)."""
    padding = (0,) * (2 * (-dim - 1)) + (length - tensor.shape[dim], 0)
    return torch.nn.functional.pad(tensor, padding)
