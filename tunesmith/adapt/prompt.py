"""Prompt tuning: a few trained vectors before every document (Lester et al. 2021, arXiv 2104.08691).

They stand where the embeddings of words would, take positions of their own, and are all that trains. A fresh prompt is
text that the model has not seen, so that the adapted model is not the base at step 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError

if TYPE_CHECKING:
    from typing import Self

    from torch import nn

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target


class Prompt(Method):
    """Soft tokens before the input; of an encoder-decoder, before its encoder's.

    Attributes:
        length: how many.
        init: vocabulary: they start as the embeddings of tokens drawn from the vocabulary; text: as those of `text`,
            repeated or cut to the length; random: as numbers from -0.5 to 0.5.
        text: for init text.
    """

    identity_at_start: ClassVar[bool] = False

    kind: Literal["prompt"] = "prompt"
    length: int = Field(default=20, ge=1)
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    text: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _text_belongs_to_init(self) -> Self:
        if (self.init == "text") != (self.text is not None):
            raise ValueError("init: text and text: ... go together" if self.text is None else "text needs init: text")
        return self

    @property
    def positions(self) -> int:
        """One for each vector."""
        return self.length

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts the vectors at the embedding.

        Raises:
            ConfigError: the model's embedding is not known, or the text has no tokens.
            AdapterError: the name is taken.
        """
        from tunesmith.adapt.adapter import Adapter
        from tunesmith.adapt.vectors import embedding_place
        from tunesmith.models.inserts import SoftTokens

        target = embedding_place(loaded, self.kind)
        vectors = self._vectors(loaded, target, seed)
        adapter = Adapter(name, self, loaded)
        adapter.add(target, SoftTokens(self, vectors, self.length))
        return adapter.close()

    def _vectors(self, loaded: Loaded, target: Target, seed: int) -> nn.Parameter:
        from tunesmith.adapt.vectors import drawn_words, spread_uniform, words

        if self.init == "random":
            return spread_uniform(loaded.model, target, self.length, seed)
        # without weights there is nothing to look up, and shapes are the same
        if self.init == "vocabulary" or next(loaded.model.parameters()).is_meta:
            return drawn_words(loaded.model, target, self.length, seed)
        ids = loaded.tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(f"{self.text!r} has no tokens", where="method.text")
        return words(loaded.model, target, [ids[place % len(ids)] for place in range(self.length)])
