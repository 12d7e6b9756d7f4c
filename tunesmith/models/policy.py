"""The model as objectives see it: losses, logits and hidden states of a batch of documents, under a fixed route.

The one idea: documents lie end to end without padding and logits exist only where they are asked for. Families that
cannot do so run padded behind the same three functions; what differs is decided by the family's table entry.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import ConfigError
from tunesmith.core.switches import on
from tunesmith.models import attention, blocks, seq2seq
from tunesmith.models.copies import swap_of
from tunesmith.models.cross_entropy import fused_losses, plain_losses, shaping_of, wide
from tunesmith.models.distances import Distance, taught
from tunesmith.models.inputs import states
from tunesmith.models.modes import evaluating
from tunesmith.models.ports import Port
from tunesmith.models.recompute import Blocks, How, Recompute
from tunesmith.models.route import BASE, Owners, Route
from tunesmith.models.scores import scores
from tunesmith.models.trunk import Trunk, through

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.models.heads import Head
    from tunesmith.models.load import Loaded


class Policy:
    """A loaded model under one route.

    Attributes:
        trunk: keeps what comes out of the blocks below all that trains; None keeps nothing.
        reference: the route of the model as the stage received it.
        value: a head that says what it expects to earn, where one is trained.
        teacher: a model to become like, where there is one.

    Args:
        route: the adapters that act; none by default.
        recompute: what is computed again in the backward pass instead of kept: of every block (`full`), of the MLP
            of every block (`selective`), or as a plan has chosen.
        packed: False runs padded although the family could do without.
    """

    def __init__(
        self,
        loaded: Loaded,
        route: Route = BASE,
        *,
        recompute: How | Recompute = "none",
        packed: bool = True,
    ) -> None:
        self.model, self.family, self.route = loaded.model, loaded.family, route
        self.config = loaded.model.config
        self.trunk: Trunk | None = None
        self.reference = BASE
        self.value: Head | None = None
        self.teacher: Policy | None = None
        self.packed = packed and self.family.packed
        if self.packed:
            attention.use(self.model)
        self.shaping = shaping_of(self.config)
        self.recompute(recompute)

    def train(self, mode: bool = True) -> Policy:
        """Switches dropout, of the model and of adapters."""
        self.model.train(mode)
        return self

    def under(self, route: Route) -> Policy:
        """The same model under another route, for batches whose rows have adapters of their own."""
        other = copy(self)
        other.route = route
        return other

    def at(self, temperature: float) -> Policy:
        """The same model, its logits divided by a temperature. Raises ConfigError where it makes them itself."""
        if temperature == 1.0:
            return self
        if not self.family.head:
            told = f"{self.family.name} makes its logits itself: they cannot be divided by {temperature}"
            raise ConfigError(told, where="objective.temperature", hint="set it to 1")
        other, shaping = copy(self), self.shaping
        cap = None if shaping.cap is None else shaping.cap / temperature
        other.shaping = replace(shaping, scale=shaping.scale / temperature, cap=cap)
        return other

    def recompute(self, how: How | Recompute) -> None:
        """Switches activation recomputation for the whole model."""
        Blocks(self.model, self.family).set(how)

    def token_losses(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each target given what precedes it in its document.

        Returns:
            float32 (float64 for a float64 model) [supervised], differentiable in what is trainable.

        Raises:
            ConfigError: the model does not generate text from left to right.
        """
        if self.family.kind == "seq2seq":
            return seq2seq.token_losses(self, batch)
        self._needs_decoder()
        if not self.family.head:
            logits = self._own_logits(batch, batch.sources)
            return nn.functional.cross_entropy(logits.to(wide(logits.dtype)), batch.targets, reduction="none")
        return self._losses(self.hidden(batch, batch.sources), batch)

    def valued(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`token_losses`, and what the value head says of the states they come from: one forward pass for both.

        Returns:
            Two of float32 (float64 for a float64 model) [supervised], differentiable.
        """
        assert self.value is not None
        self._needs_decoder()
        hidden = self.hidden(batch, batch.sources)
        return self._losses(hidden, batch), self.value(hidden)[:, 0]

    def _losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Losses of the targets from the states before them."""
        with self.route.enter():
            weight, bias = self._frozen_head()
            if weight is not None:
                return fused_losses(hidden, weight, bias, batch.targets, self.shaping)
            return plain_losses(hidden, self._head, batch.targets, self.shaping, self._owners(batch, batch.sources))

    def reference_losses(self, batch: Batch) -> Tensor:
        """`token_losses` of the model as the stage received it: without dropout, and without a gradient."""
        reference = self.under(self.reference)
        reference.trunk = None
        with torch.no_grad(), evaluating(self.model):
            return reference.token_losses(batch)

    def taught(self, batch: Batch, distance: Distance, hard: float) -> Tensor:
        """What is to be learnt of a teacher at every supervised position; see `distances.taught`."""
        self._needs_decoder()
        return taught(self, self.teacher, batch, distance, hard)

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] of states [n, width], float32 (float64 for a float64 model), under the caller's route.

        Raises ConfigError where a family makes its logits itself.
        """
        if not self.family.head:
            told = f"{self.family.name} makes its logits itself, of whole texts"
            raise ConfigError(told, where="model", hint="take a llama-like decoder")
        return self.shaping(self._head(hidden))

    @property
    def has_frozen_head(self) -> bool:
        """Whether nothing about the head trains or acts."""
        return self._frozen_head()[0] is not None

    def hidden(self, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """What the last norm gives for every token, [tokens, width], in the model's dtype.

        Args:
            wanted: int64 [n], for these tokens only: [n, width].
        """
        return states(self, batch, self._run, wanted)

    def scores(self, batch: Batch) -> Tensor:
        """What prediction heads say of each document, or each labelled token; see `scores.scores`."""
        return scores(self, batch)

    def logits(self, batch: Batch, index: Tensor) -> Tensor:
        """Logits after some tokens: `index` int64 [n] into `batch.ids`; float32 [n, vocabulary]."""
        self._needs_decoder()
        if not self.family.head:
            return self._own_logits(batch, index).float()
        hidden, owners = self.hidden(batch, index), self._owners(batch, index)
        with self.route.enter(), nullcontext() if owners is None else Owners(owners).enter():
            return self.shaping(self._head(hidden))

    @property
    def _head(self) -> Callable[[Tensor], Tensor]:
        head: Callable[[Tensor], Tensor] = self.model.get_output_embeddings()
        return head

    def _frozen_head(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the head when nothing about it trains or acts; else nothing."""
        head: Any = self._head
        plain = head.base if isinstance(head, Port) else head
        if type(plain) is not nn.Linear or (isinstance(head, Port) and any(True for _ in head.acting())):
            return None, None
        if torch.is_grad_enabled() and any(p.requires_grad for p in plain.parameters()):
            return None, None
        if swap_of(plain) is not None:  # which weight acts is known to the module alone
            return None, None
        return plain.weight, plain.bias

    def _run(self, inputs: dict[str, Any], rows: Tensor | None) -> Tensor:
        if self.packed and blocks.fits(self.model):
            # rows with adapters of their own are told apart by their places in the whole
            if on("trim") and rows is not None and not self.route.rows:
                return blocks.hidden(self.model, inputs, rows)
            return _picked(blocks.hidden(self.model, inputs), rows)
        found = through(self.model, self.family, lambda: self.model.base_model(**inputs).last_hidden_state)
        return _picked(found[0], rows) if self.packed else found

    def _own_logits(self, batch: Batch, wanted: Tensor) -> Tensor:
        def run(inputs: dict[str, Any], rows: Tensor | None) -> Tensor:
            found = through(self.model, self.family, lambda: self.model(**inputs).logits)
            return _picked(found[0], rows) if self.packed else found

        return states(self, batch, run, wanted)

    def _owners(self, batch: Batch, index: Tensor) -> tuple[int, ...] | None:
        """The document of each token, where documents have adapters of their own."""
        if not self.route.rows:
            return None
        ends = torch.tensor(batch.lengths, device=index.device).cumsum(0)
        return tuple(torch.searchsorted(ends, index, right=True).tolist())

    def _needs_decoder(self) -> None:
        if self.family.kind != "decoder":
            raise ConfigError(
                f"{self.family.name} is {_article(self.family.kind)} and cannot be trained on text to come",
                where="objective",
                hint="choose a decoder such as llama, qwen2 or gpt2",
            )


def _picked(found: Tensor, rows: Tensor | None) -> Tensor:
    return found if rows is None else found[rows]


def _article(kind: str) -> str:
    return {"encoder": "an encoder", "seq2seq": "an encoder-decoder"}.get(kind, kind)
