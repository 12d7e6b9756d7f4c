"""Top layers: the last blocks train, everything below stays frozen (FT-Top2 for two).

What comes after the last block (the final norm, the head) stays frozen, too, so that two blocks of GPT-2 M are
25,192,448 parameters, as published (Hu et al. 2021, arXiv 2106.09685, table 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.adapt.method import Method
from tunesmith.core.errors import ConfigError

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded


class TopLayers(Method):
    """Trains the last `layers` blocks.

    Attributes:
        layers: how many, counted from the top; of an encoder-decoder, its decoder's.
    """

    kind: Literal["top_layers"] = "top_layers"
    layers: int = Field(default=2, ge=1)

    def check(self, config: dict[str, Any]) -> None:
        """Raises ConfigError when the model has fewer blocks."""
        from tunesmith.models.families import setting

        count = setting(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
        if isinstance(count, int):
            self._fits(count)

    def attach(self, loaded: Loaded, name: str = "default", seed: int = 0) -> Adapter:
        """Replaces the parameters of the last blocks by trainable copies. Raises ConfigError as `check` does."""
        from tunesmith.adapt.adapter import Adapter
        from tunesmith.models.ports import base_state
        from tunesmith.models.targets import block_paths

        blocks = block_paths(loaded.model, loaded.family)
        self._fits(len(blocks))
        adapter = Adapter(name, self, loaded)
        chosen = tuple(f"{path}." for path in blocks[-self.layers :])
        own = base_state(loaded.model)  # what other adapters have put into the blocks is theirs
        for path in [path for path, _ in loaded.model.named_parameters() if path.startswith(chosen) and path in own]:
            adapter.train_copy(path)
        return adapter.close()

    def _fits(self, blocks: int) -> None:
        if self.layers > blocks:
            raise ConfigError(
                f"{self.layers} is more than the {blocks} blocks of the model",
                where="method.layers",
                hint="kind: full trains everything" if blocks else "",
            )
