"""Where soft tokens go, and the vectors that they start as: what the model's own embedding says of some tokens.

The one idea: a soft token that starts as a word is somewhere the model has been. Vectors are float32, drawn on the CPU
from (seed, place) alone; on the meta device nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import ConfigError
from tunesmith.core.rng import torch_generator
from tunesmith.models.ports import Port
from tunesmith.models.targets import match

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded
    from tunesmith.models.targets import Target


def embedding_place(loaded: Loaded, kind: str) -> Target:
    """The embedding that documents go through; of an encoder-decoder, its encoder's. Raises ConfigError without one."""
    if "embed" not in loaded.family.roles:
        raise ConfigError(
            f"the embedding of {loaded.family.name} is not known, which {kind} needs", where="method.kind"
        )
    return match(loaded.model, loaded.family, ["embed"], "method.kind")[0]


def drawn_words(model: nn.Module, target: Target, count: int, seed: int) -> nn.Parameter:
    """The embeddings of `count` tokens that are drawn from all of the vocabulary: [count, width]."""
    size = _embedding(model, target).weight.shape[0]
    draw = torch_generator(seed, "init", target.path, target.role)
    return words(model, target, torch.randint(size, (count,), generator=draw, device="cpu").tolist())


def words(model: nn.Module, target: Target, ids: Sequence[int]) -> nn.Parameter:
    """The embeddings of some tokens, as the model's blocks get them: [ids, width]."""
    module = _embedding(model, target)
    with torch.no_grad():
        found: Tensor = module(torch.tensor(list(ids), dtype=torch.int64, device=module.weight.device))
    return nn.Parameter(found.detach().float())


def spread_uniform(model: nn.Module, target: Target, count: int, seed: int) -> nn.Parameter:
    """Numbers from -0.5 to 0.5: [count, width] (Lester et al. 2021, section 3.2)."""
    module = _embedding(model, target)
    width = words(model, target, [0]).shape[1]
    if module.weight.is_meta:
        return nn.Parameter(torch.empty(count, width, device="meta"))
    draw = torch_generator(seed, "init", target.path, target.role)
    return nn.Parameter(torch.empty(count, width).uniform_(-0.5, 0.5, generator=draw).to(module.weight.device))


def _embedding(model: nn.Module, target: Target) -> Any:
    module = model.get_submodule(target.path)
    return module.base if isinstance(module, Port) else module
