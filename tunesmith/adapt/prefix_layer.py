"""Layer prefix (PreLayer): trained keys and values before those of a document, in every block.

Prefix-tuning of Li and Liang (2021, arXiv 2101.00190, section 4). Real tokens take the positions behind the prefix, as
if it had been read, and always see all of it. A fresh prefix is not the base at step 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.families import Family
    from tunesmith.models.inserts import Insert
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target


class PrefixLayer(Method):
    """Keys and values before a document.

    They start as those of tokens drawn from the vocabulary, which the model has read.

    Attributes:
        length: how many of each, a block.
        reparameterise: they are made by a map of two layers from one small table, which trains more evenly (section
            4.3); only what it makes is saved.
    """

    identity_at_start: ClassVar[bool] = False

    kind: Literal["prefix_layer"] = "prefix_layer"
    length: int = Field(default=20, ge=1)
    reparameterise: bool = False

    @property
    def positions(self) -> int:
        """One for each key."""
        return self.length

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError for a family that attends in a way of its own, and for more than it has positions for."""
        from tunesmith.models.families import family_of
        from tunesmith.models.folder import position_limit

        self._can_attend(family_of(config))
        limit = position_limit(config)
        if limit is not None and self.length >= limit:
            raise ConfigError(f"{self.length} leaves none of the model's {limit} positions", where="method.length")

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Puts keys and values at the maps that make the others.

        Raises:
            ConfigError: the family's attention cannot take them, or it has too few positions.
            AdapterError: the name is taken.
        """
        from tunesmith.adapt import prefix_start

        if self.reparameterise:
            return prefix_start.attach_made(self, loaded, name, seed)
        adapter = prefix_start.attach_empty(self, loaded, name)
        prefix_start.read_words(adapter, self.length, seed)
        return adapter

    def places(self, loaded: Loaded) -> list[Target]:
        """Where keys and values are made."""
        from tunesmith.models.targets import match

        return match(loaded.model, loaded.family, ["k", "v"], "method.kind")

    def insert(self, model: nn.Module, target: Target, seed: int = 0) -> Insert:
        """Zeros [length, keys or values of a token], until words are read."""
        from tunesmith.adapt.prefix_start import features
        from tunesmith.adapt.start import filled
        from tunesmith.models.inserts import Keys

        return Keys(self, {"vectors": filled(model, target, self.length, features(model, target))}, self.length)

    def _can_attend(self, family: Family) -> None:
        if not family.packed:
            raise ConfigError(
                f"{family.name} attends in a way of its own, which takes no keys from outside",
                where="method.kind",
                hint="prompt and prefix_embed work with every family",
            )
