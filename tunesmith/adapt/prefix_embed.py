"""Embedding prefix (PreEmbed): trained vectors before a prompt and where its answer begins.

As in the LoRA paper's comparison (Hu et al. 2021, arXiv 2106.09685, section 5.1), after Li and Liang (2021, arXiv
2101.00190): `prefix` + `infix` vectors as wide as the embedding. A fresh prefix is not the base at step 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from tunesmith.adapt.method import Method

if TYPE_CHECKING:
    from typing import Self

    from torch import nn

    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target


class PrefixEmbed(Method):
    """Soft tokens before the input and within it. They start as the embeddings of tokens drawn from the vocabulary.

    Attributes:
        prefix: how many before a document.
        infix: how many where its first answer begins (a document without one, or a prompt to be continued: behind it).
    """

    identity_at_start: ClassVar[bool] = False

    kind: Literal["prefix_embed"] = "prefix_embed"
    prefix: int = Field(default=20, ge=0)
    infix: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _is_some(self) -> Self:
        if self.prefix + self.infix == 0:
            raise ValueError("prefix and infix are both 0, and nothing would train")
        return self

    @property
    def positions(self) -> int:
        """One for each vector."""
        return self.prefix + self.infix

    def places(self, loaded: Loaded) -> list[Target]:
        """The embedding. Raises ConfigError where it is not known."""
        from tunesmith.adapt.vectors import embedding_place

        return [embedding_place(loaded, self.kind)]

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """The vectors: [prefix + infix, width]."""
        from tunesmith.adapt.vectors import drawn_words
        from tunesmith.models.inserts import SoftTokens

        vectors = drawn_words(model, target, self.prefix + self.infix, seed)
        return SoftTokens(self, vectors, self.prefix, self.infix)
