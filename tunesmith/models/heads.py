"""Prediction heads: one linear map from a pooled state to labels or a number, one for each adapter that has one.

The one idea: a head belongs to an adapter, not to the model, so that rows of one batch may be answered by different
heads. What is pooled, and for which row, is `scores.py`; the question a head answers is `core/problem.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.core.files import canonical_json, read_json
from tunesmith.core.problem import HEAD_SETTINGS, Problem, read_problem
from tunesmith.core.rng import torch_generator
from tunesmith.models.families import setting
from tunesmith.models.ports import attached_to

if TYPE_CHECKING:
    from tunesmith.models.families import Family
    from tunesmith.models.load import Loaded

TENSORS = "predict.safetensors"
PREFIX = "predict."
POOLING = {"encoder": "mean", "decoder": "last", "seq2seq": "start"}


class Head(nn.Module):
    """Pooled states [n, width] to outputs [n, outputs], in float32 (float64 for states in float64).

    Attributes:
        problem: what it answers.
        pooling: mean (over a document's tokens), last (its last token), start (the first state of a decoder that
            has read nothing); each token's own state for a problem of kind tokens.
        weight: float32 [outputs, width]; bias: float32 [outputs], None of a score, whose zero means nothing.
    """

    def __init__(self, problem: Problem, pooling: str, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.problem, self.pooling = problem, pooling
        place = torch.device("meta" if torch.device(device).type == "meta" else "cpu")
        weight = torch.zeros(problem.outputs, width, device=place)
        if place.type != "meta":
            # drawn on the CPU from the seed alone: the same on every device and for every method
            weight.normal_(std=width**-0.5, generator=torch_generator(problem.seed, "init", "predict"))
        self.weight = nn.Parameter(weight.to(device))
        self.bias = None if problem.kind == "reward" else nn.Parameter(torch.zeros(problem.outputs, device=device))

    def forward(self, states: Tensor) -> Tensor:
        """Outputs [n, outputs] of states [n, width] of any dtype."""
        wide = torch.promote_types(states.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return nn.functional.linear(states.to(wide), self.weight.to(wide), bias)


def fresh_head(loaded: Loaded, problem: Problem) -> Head:
    """A head for a problem as it is before training.

    Raises ConfigError for words of an encoder-decoder, which reads them on one side and writes on the other.
    """
    family = loaded.family
    if problem.kind == "tokens" and family.kind == "seq2seq":
        raise ConfigError(
            f"{family.name} is an encoder-decoder: its states are not those of words",
            where="objective.problem",
            hint="label words with an encoder or a decoder",
        )
    device = next(loaded.model.parameters()).device
    return Head(problem, pooling_of(family, problem), head_width(loaded.config), device)


def attach_head(loaded: Loaded, name: str) -> Head | None:
    """Gives the adapter `name` the head that `loaded.predicts` asks for; None where it asks for none."""
    if loaded.predicts is None:
        return None
    head = attached_to(loaded.model).heads[name] = fresh_head(loaded, loaded.predicts)
    return head


def value_head(loaded: Loaded, seed: int) -> Head:
    """A head that says of each token what is still to be earned; it begins at 0 everywhere.

    It belongs to a run and not to an adapter: nothing that a run leaves behind has it.
    """
    device = next(loaded.model.parameters()).device
    head = Head(Problem("regression", (), seed), "token", head_width(loaded.config), device)
    nn.init.zeros_(head.weight)
    return head


def pooling_of(family: Family, problem: Problem) -> str:
    """How a family's states become one for a document."""
    return "token" if problem.kind == "tokens" else POOLING[family.kind]


def head_width(config: Any) -> int:
    """Width of the states that a head reads. Raises ModelError where the config does not say."""
    width = setting(config, "word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "dim")
    if not isinstance(width, int):
        family = str(setting(config, "model_type"))
        raise ModelError("the config does not say how wide its hidden states are", where=family)
    return width


def open_head(loaded: Loaded, folder: Path) -> Head | None:
    """The head that was saved in a model's own folder, put on the model as its only one; None where there is none.

    Raises ModelError for a damaged one.
    """
    if not (folder / HEAD_SETTINGS).is_file():
        return None
    settings = read_json(folder / HEAD_SETTINGS, ModelError)
    head = fresh_head(loaded, read_problem(settings, str(folder / HEAD_SETTINGS)))
    fill_head(head, settings, folder)
    attached_to(loaded.model).heads["default"] = head
    return head


# on the disk: one file of two tensors, and settings that the caller keeps


def save_head(head: Head, folder: Path) -> dict[str, Any]:
    """Writes `predict.safetensors` into a folder and answers what to keep beside it."""
    tensors = {PREFIX + name: value.detach().float().cpu().contiguous() for name, value in head.named_parameters()}
    (folder / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
    return {**head.problem.as_dict(), "pooling": head.pooling}


def keep_head(head: Head, folder: Path) -> None:
    """Writes a head and what it predicts into a model's own folder, for `open_head`."""
    settings = save_head(head, folder)
    (folder / HEAD_SETTINGS).write_text(canonical_json(settings, indent=2) + "\n", "utf-8")


def fill_head(head: Head, settings: Mapping[str, Any], folder: Path) -> None:
    """Gives a head the values that were saved. Raises ModelError where they are missing, damaged or do not fit."""
    path = folder / TENSORS
    if settings.get("pooling", head.pooling) != head.pooling:
        told = f"a head over {settings['pooling']!r} states; here they are {head.pooling!r}"
        raise ModelError(told, where=str(folder))
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"the prediction head cannot be read: {error}", where=str(path)) from error
    wanted = dict(head.named_parameters())
    for name, value in wanted.items():
        saved = found.get(PREFIX + name)
        if saved is None or saved.shape != value.shape or not torch.isfinite(saved).all():
            raise ModelError(f"{PREFIX}{name} is missing, misshapen or not finite", where=str(path))
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(found[PREFIX + name])
