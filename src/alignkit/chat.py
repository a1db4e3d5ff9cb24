"""chat: talk to an adapter in the terminal, or to two of them side by side, and see what the reward model thinks.

Each model goes on from its own answers. What is typed is a turn; /reset begins anew, /system TEXT does so under a
system message, /models lists the models, /models NAME NAME chooses those that answer, /quit or the end of the input
ends. Ctrl-C breaks an answer off. From a pipe, each line is a turn, and answers are printed as `name> text`.

Reads:   the run's adapters, or `models`; the run's reward model, or `reward`
Writes:  manifest.json             metrics: turns and tokens. Nothing of what was said is written

Overrides people use:
  'talk_to=[sft,dpo]'              who answers (default: the last adapter of the run)
  'models={mine: runs/mine/dpo/adapter}'   these adapters and the base
  temperature=0.7 top_p=0.9        draw answers instead of taking the most likely one
  reward=none                      no scores
  system="Answer in one sentence." begin under a system message

Examples:
  python -m alignkit.chat run=demo
  python -m alignkit.chat run=demo 'talk_to=[sft,dpo]' temperature=0.7
"""

from __future__ import annotations

import io
import queue
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from alignkit.core.artifact import Artifact
from alignkit.core.config import HardwareConfig, ModelConfig, SamplingConfig, StageConfig
from alignkit.core.errors import UserError

# ruff: noqa: UP045

if TYPE_CHECKING:
    from rich.console import Console

    from alignkit.core.records import Message
    from alignkit.generation.continuous import Engine, Part, Request
    from alignkit.models.reward_model import RewardModel
    from alignkit.reporting.chat import AnswerView

COMMANDS = "/reset, /system TEXT, /models [NAME ...], /quit"


@dataclass
class ChatConfig(StageConfig):
    """Configuration of `chat`."""

    inputs: ClassVar[tuple[str, ...]] = ("models", "reward", "model.path")

    models: dict[str, Optional[str]] = field(default_factory=dict)
    """Name -> adapter folder; "" is the base without an adapter, null leaves one out. None but the base: the run's."""
    talk_to: list[str] = field(default_factory=list)
    """Names of the models that answer; none given: the last."""
    reward: Optional[str] = None
    """Run folder of the reward model. None given: the run's, if it has one; `none`: no reward model."""
    system: str = ""
    """System message to begin under."""
    temperature: float = 0.0
    """0 takes the most likely answer."""
    top_p: float = 1.0
    max_tokens: int = 256
    """Most tokens of an answer."""
    model: ModelConfig = field(default_factory=ModelConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)


def run(config: ChatConfig) -> Artifact:
    """Load the base and its adapters, and take turns until the input ends.

    Raises `KeyboardInterrupt` that says, unlike other stages', that nothing is kept.
    """
    try:
        return converse(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("a conversation is not kept, the same command begins a new one") from None


def converse(config: ChatConfig) -> Artifact:
    """The whole conversation, from loading to its end."""
    from alignkit.generation.base import check_sampling
    from alignkit.models.shared_base import SharedBase, choose_models, choose_reward_model

    check_sampling(sampling(config))
    folder = Path(config.output_dir).parent
    models, reward_folder = choose_models(config.models, folder), choose_reward_model(config.reward, folder)
    talk_to = known_models(config.talk_to or list(models)[-1:], list(models))
    config = replace(config, models=dict(models), reward=reward_folder)
    with Artifact.open("chat", config, always=True) as artifact:
        from rich.console import Console

        from alignkit.generation.continuous import Engine
        from alignkit.models.headroom import require_memory
        from alignkit.models.jobs import SAMPLING, Job

        loaded = len(models) + bool(reward_folder)
        most = config.model.max_length
        job = Job(
            SAMPLING,
            config.model,
            most,
            sampling=sampling(config),
            adapters_loaded=loaded,
            at_once_key=None,
            command="chat",
        )
        require_memory(job, config.hardware, artifact)
        base = SharedBase(config.model, models)
        reward_model = base.add_reward_model(reward_folder) if reward_folder else None
        with Engine(base, max_rows=len(models), max_waiting=len(models)) as engine:
            chat = Chat(config, engine, talk_to, reward_model, Console(highlight=False))
            chat.say(f"{', '.join(talk_to)}: say something. {COMMANDS}")
            for line in read_lines(chat.console):
                if not chat.take(line):
                    break
        artifact.metrics |= {"turns": chat.turns, "tokens": chat.tokens}
        artifact.summary = f"{chat.turns} turns"
    return artifact


def sampling(config: ChatConfig) -> SamplingConfig:
    """How answers are drawn."""
    return SamplingConfig(
        n=1, temperature=[config.temperature] * 2, top_p=[config.top_p] * 2, max_new_tokens=config.max_tokens
    )


def known_models(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names, each once. Raises `UserError` for one that no model has."""
    from alignkit.core.stages import nearest

    for name in names:
        if name not in known:
            raise UserError(f"no model {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    return list(dict.fromkeys(names))


def read_lines(console: Console) -> Iterator[str]:
    """What is typed, or piped, line by line; Ctrl-C while nothing is written ends it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no UTF-8 becomes U+FFFD, which every tokenizer takes
    try:
        while True:
            yield input("you> " if sys.stdin.isatty() and console.is_terminal else "")
    except (EOFError, KeyboardInterrupt):
        return


class Chat:
    """A conversation with each of several models."""

    def __init__(
        self, config: ChatConfig, engine: Engine, talk_to: list[str], reward_model: RewardModel | None, console: Console
    ) -> None:
        self.config, self.engine, self.reward_model, self.console = config, engine, reward_model, console
        self.talk_to, self.system = talk_to, config.system
        self.histories: dict[str, list[Message]] = {}
        self.turns = self.tokens = 0

    def take(self, line: str) -> bool:
        """Do what a line says; returns whether to go on."""
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                return False
            if command == "/reset":
                self.begin(self.system)
            elif command == "/system":
                self.begin(rest.strip())
            elif command == "/models":
                self.choose(rest.split())
            elif command.startswith("/"):
                self.say(f"{command} is no command; there are {COMMANDS}")
            elif line.strip():
                self.answer(line.strip())
        except UserError as error:
            self.say(str(error))
        return True

    def begin(self, system: str) -> None:
        """Forget what was said, and go on under a system message."""
        self.system = system
        self.histories.clear()
        self.say(f"begun anew{' under: ' + system if system else ''}")

    def choose(self, names: list[str]) -> None:
        """List the models, or have others answer, each from where it was."""
        known = self.engine.base.names
        if names:
            self.talk_to = known_models(names, known)
        self.say("  ".join(f"{'*' if name in self.talk_to else ''}{name}" for name in known))

    def answer(self, text: str) -> None:
        """Have every chosen model answer; broken off, the turn is forgotten."""
        from alignkit.core.records import Message
        from alignkit.reporting.chat import AnswerView

        prompts = {name: [*self.history(name), Message(role="user", content=text)] for name in self.talk_to}
        arrived: queue.SimpleQueue[tuple[str, Part]] = queue.SimpleQueue()
        requests = {name: self.request(name, prompt, arrived) for name, prompt in prompts.items()}
        with AnswerView(self.console, self.talk_to) as view:
            try:
                for request in requests.values():
                    self.engine.submit(request)
                self.follow(view, arrived)
            except KeyboardInterrupt:
                view.notes = dict.fromkeys(requests, "broken off")
                return
            finally:  # those that have ended do not mind
                for request in requests.values():
                    request.cancelled = True
            for name, prompt in prompts.items():
                self.histories[name] = [*prompt, Message(role="assistant", content=view.texts[name])]
            if self.reward_model:
                self.score(view)
        self.turns += 1
        self.tokens += sum(request.tokens_written for request in requests.values())

    def history(self, model: str) -> list[Message]:
        """What a model has heard and said so far."""
        from alignkit.core.records import Message

        begun = [Message(role="system", content=self.system)] if self.system else []
        return self.histories.setdefault(model, begun)

    def request(self, model: str, prompt: list[Message], arrived: queue.SimpleQueue[Any]) -> Request:
        """A request whose parts arrive in a queue. Raises `UserError` for a prompt that cannot be answered."""
        from alignkit.generation.continuous import PromptError, Request, encode_request

        most, tokenizer = self.config.max_tokens, self.engine.base.tokenizer
        try:
            ids, room = encode_request(tokenizer, prompt, None, most, self.config.model.max_length)
        except PromptError as error:
            raise UserError(f"{error}{'; /reset begins anew' if error.tokens else ''}") from error
        drawn = replace(sampling(self.config), max_new_tokens=room)
        seed = self.config.seed + self.turns
        return Request(model, ids, drawn, seed, tokenizer, lambda part: arrived.put((model, part)))

    def follow(self, view: AnswerView, arrived: queue.SimpleQueue[tuple[str, Part]]) -> None:
        """Show what arrives until every answer has ended."""
        running = set(self.talk_to)
        while running:
            name, part = arrived.get()
            view.add(name, part.text)
            if part.finish_reason in ("error", "cancelled"):
                raise UserError(f"{name}: the answer failed ({part.finish_reason}); the log says how")
            if part.finish_reason:
                running.discard(name)
                view.notes[name] = "cut" if part.finish_reason == "length" else ""

    def score(self, view: AnswerView) -> None:
        """Put each answer's reward beside it, or why it has none."""
        assert self.reward_model is not None
        conversations = [self.histories[name] for name in self.talk_to]
        reward_model = self.reward_model
        found = self.engine.call(lambda: reward_model.scores_or_reasons(conversations)).result()
        for name, score in zip(self.talk_to, found, strict=True):
            note = f"not scored: {score}" if isinstance(score, str) else f"reward {score:+.2f}"
            view.notes[name] = ", ".join(each for each in (view.notes[name], note) if each)

    def say(self, text: str) -> None:
        """Something of our own."""
        from rich.text import Text

        from alignkit.reporting.plain import visible

        self.console.print(Text(visible(text)), style="dim", soft_wrap=True)


if __name__ == "__main__":
    from alignkit.core.app import stage_main

    stage_main("chat")
