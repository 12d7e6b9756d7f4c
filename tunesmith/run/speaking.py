"""Makes a model write: answers to many prompts at once, or a conversation whose words appear as they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from tunesmith.core.progress import Progress, progress_bar
from tunesmith.data.encode import prompt_ids
from tunesmith.data.rows import Dialogue, Message
from tunesmith.run.exam import common_prefix
from tunesmith.run.opening import Opened, look, open_model


class Speaker:
    """An opened model that answers.

    Args:
        source: anything `opening.find` knows.
        template: `auto`, a name, or a file.
    """

    def __init__(self, source: str, *, template: str = "auto", precision: str = "auto") -> None:
        self.seen, self.precision = look(source, template=template), precision
        self.template, self.codec = self.seen.template, self.seen.codec
        self.stops = set(self.template.stop_ids)

    @cached_property
    def opened(self) -> Opened:
        """The model itself, loaded when something is to be written first."""
        return open_model(self.seen, precision=self.precision)

    def dialogue(self, prompt: str, system: str | None = None) -> Dialogue:
        """A question as a dialogue without an answer."""
        opening = (Message("system", system),) if system else ()
        return Dialogue((*opening, Message("user", prompt)), "--prompt")

    def from_data(self, data: str, rows: int | None = None) -> list[Dialogue]:
        """The questions of a data set."""
        from tunesmith.run.judging import Question

        dataset = Question(data, ()).dataset(data, self.codec, "auto")
        return list(dataset.dialogues(rows))

    def answer(
        self,
        dialogues: list[Dialogue],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """[{prompt, completion, tokens}], in the order of the questions; without `progress` a bar is shown."""
        prompts = [prompt_ids(dialogue, self.template, self.codec) for dialogue in dialogues]
        shared = common_prefix(prompts)
        from tunesmith.models.generate import generate

        opened = self.opened
        shown = progress_bar("writing", len(prompts), bytes_=False)
        with nullcontext(progress) if progress else shown as report:
            found = generate(
                opened.loaded,
                opened.route,
                [prompt[len(shared) :] for prompt in prompts],
                max_new_tokens=max_new_tokens,
                stop_ids=self.stops,
                temperature=temperature,
                seed=seed,
                shared_prefix=shared,
                progress=report,
            )
        return [
            {"prompt": _asked(dialogue), "completion": self.codec.decode(one.ids).strip(), "tokens": len(one.ids)}
            for dialogue, one in zip(dialogues, found, strict=True)
        ]

    def conversation(self, system: str | None = None) -> Conversation:
        """A new conversation."""
        return Conversation(self, system)


class Conversation:
    """Turns of a chat, kept as messages and rendered afresh for each answer."""

    def __init__(self, speaker: Speaker, system: str | None) -> None:
        self.speaker = speaker
        self.messages: list[Message] = [Message("system", system)] if system else []

    def say(self, words: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The answer in pieces, as it is written; afterwards it is part of the conversation."""
        from tunesmith.models.generate import stream

        speaker = self.speaker
        self.messages.append(Message("user", words))
        ids: list[int] = []
        shown = ""
        prompt = prompt_ids(Dialogue(tuple(self.messages)), speaker.template, speaker.codec)
        for token in stream(
            speaker.opened.loaded,
            speaker.opened.route,
            prompt,
            max_new_tokens=max_new_tokens,
            stop_ids=speaker.stops,
            temperature=temperature,
            seed=seed,
        ):
            ids.append(token)
            text = speaker.codec.decode(ids)
            # a character of several tokens is shown once it is whole
            if not text.endswith("�"):
                yield text[len(shown) :]
                shown = text
        self.messages.append(Message("assistant", shown))

    def forget_last(self) -> None:
        """Drops a question whose answer was broken off."""
        if self.messages and self.messages[-1].role == "user":
            self.messages.pop()


def _asked(dialogue: Dialogue) -> str:
    turns = [message for message in dialogue.messages if message.role != "assistant"]
    return turns[-1].text if turns else ""
