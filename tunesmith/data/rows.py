"""The rows that every format is converted to: a dialogue, running text, labelled text or words, compared answers.

A row is plain text with roles and knows where it came from; it holds no token and no template. `formats`
makes rows out of what files hold, `templates` and `codec` turn them into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: one of `ROLES`.
        content: the text of the turn; for a function call the call as compact JSON.
        supervised: whether the model learns to write this turn; only assistant turns can be.
        context: what an instruction comes with (alpaca's `input`, dolly's `context`); a template without a
            place of its own for it renders `text`.
    """

    role: str
    content: str
    supervised: bool = False
    context: str = ""

    @property
    def text(self) -> str:
        """The instruction and, below an empty line, its context."""
        return f"{self.content}\n\n{self.context}" if self.context else self.content


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation that ends with an assistant turn: the row of supervised tuning.

    Attributes:
        messages: at most one system message, first; then user, assistant and tool turns.
        where: file and line, as in `train.jsonl:17`.
        plain: made from a bare prompt and completion, so that it is rendered without a template unless the
            user names one.
        references: every acceptable last turn, where the data names several; empty means the last turn alone.
        table: what an answer is executed on: a table as JSON, or the path of one; empty where there is none.
    """

    messages: tuple[Message, ...]
    where: str = ""
    plain: bool = False
    references: tuple[str, ...] = ()
    table: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What comes before the last turn."""
        return self.messages[:-1]

    @property
    def completion(self) -> str:
        """The last turn."""
        return self.messages[-1].content

    @property
    def answers(self) -> tuple[str, ...]:
        """The acceptable last turns, at least one."""
        return self.references or (self.completion,)


@dataclass(frozen=True, slots=True)
class Text:
    """Running text, all of it supervised."""

    text: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, with its class (str or int) or its score (float)."""

    text: str
    label: str | int | float
    text_pair: str | None = None
    where: str = ""

    def dialogue(self) -> Dialogue:
        """The same row for a generating model: the text is the user's turn, the label is the answer."""
        user = Message("user", self.text, context=self.text_pair or "")
        return Dialogue((user, Message("assistant", str(self.label), supervised=True)), where=self.where)


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, each with its label."""

    words: tuple[str, ...]
    labels: tuple[str | int, ...]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Compared:
    """Answers to one prompt, each with its rank; a single answer that was judged has rank 0 (good) or 1 (bad).

    Attributes:
        prompt: what all answers answer; none of it is learnt.
        answers: the turns of each answer, the best first; the last turn of each is the assistant's.
        ranks: of each answer, from 0 up; lower is better, equal is a tie.
        where: file and line.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    ranks: tuple[int, ...]
    where: str = ""

    @property
    def dialogues(self) -> tuple[Dialogue, ...]:
        """A dialogue for each answer, of which the last turn alone is supervised."""
        return tuple(self._dialogue(answer) for answer in self.answers)

    def _dialogue(self, answer: tuple[Message, ...]) -> Dialogue:
        read = tuple(replace(turn, supervised=False) for turn in (*self.prompt, *answer[:-1]))
        return Dialogue((*read, replace(answer[-1], supervised=True)), self.where)


Row = Dialogue | Text | Labelled | Tagged | Compared
