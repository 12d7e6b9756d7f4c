"""The micro-batches of a run that may take most memory, among those of its first steps.

The one idea: rows are dealt and cut as the run does it, and of the micro-batches that meet the same state (gradients
of the step, moments of earlier ones) only the largest is kept: by an estimate of what it holds, padding counted and
beginnings that documents share counted once.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from tunesmith.data.deal import deal
from tunesmith.data.pack import Cursor, cut, cut_into
from tunesmith.run.prepare import Prepared

if TYPE_CHECKING:
    from tunesmith.models.policy import Policy
    from tunesmith.plan.foreseen import Met, Seen
    from tunesmith.plan.shape import ModelShape

STEPS = 64  # that are looked at: the sizes of later ones differ little, for steps are cut evenly
_DROPOUTS = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
Place = tuple[bool, bool]  # whether gradients and moments are there


def largest(prepared: Prepared, policy: Policy, shape: ModelShape) -> tuple[tuple[Met, ...], float]:
    """The largest micro-batch of each kind, the largest of all first, and how many a process makes in a step.

    Args:
        policy: in training mode.
    """
    size = _Size(policy, shape, prepared.config.train.recompute == "full")
    layout, counts = prepared.config.layout, []

    def parted(rows: list[Any]) -> list[list[Any]]:
        return cut(rows, prepared.sizes) if layout.micro_batches is None else cut_into(rows, layout.micro_batches)

    found: dict[Place, list[list[Any]]] = {}
    for number, step in enumerate(islice(prepared.stream(Cursor()), min(STEPS, prepared.totals.steps))):
        hands = [parted(rows) for rows in deal(prepared.planned(step), layout.data)]
        counts.append(max(map(len, hands)))
        for hand in hands:
            for place, rows in enumerate(hand):
                # one process makes room for gradients before it begins, if they are of several (`Precision.make_room`)
                summed = place > 0 or (len(hand) > 1 and layout.processes == 1)
                found.setdefault((summed, number > 0), []).append(rows)
    met = [size.most(rows, *place) for place, rows in found.items()]
    return tuple(sorted(met, key=lambda one: -one.size_bytes)), sum(counts) / len(counts)


def judged(prepared: Prepared, policy: Policy) -> Seen | None:
    """The rows that are evaluated at once, the longest first; None where no loss is."""
    section = prepared.config.evaluate
    if prepared.eval is None or not (section.every or section.metrics):
        return None
    from tunesmith.data.batch import to_batch
    from tunesmith.data.encode import Example
    from tunesmith.evaluate.losses import BATCH_TOKENS, batches
    from tunesmith.plan.foreseen import seen

    places = list(prepared.eval.places())[: section.rows]
    kept = [one for place in places if isinstance(one := prepared.eval.example(*place), Example)]
    first = next(batches(kept, BATCH_TOKENS), None)
    return None if first is None else seen(policy, to_batch([kept[row] for row in first]))


def padding_share(prepared: Prepared) -> float:
    """Of the places in the first steps' micro-batches, were each row as long as the longest, the empty ones."""
    tokens = places = 0
    for step in islice(prepared.stream(Cursor()), min(STEPS, prepared.totals.steps)):
        for rows in prepared.planned(step).micro_batches:
            lengths = [len(row.ids) for row in rows]
            tokens, places = tokens + sum(lengths), places + len(lengths) * max(lengths)
    return 1 - tokens / max(1, places)


class _Size:
    """An estimate of what a micro-batch holds."""

    def __init__(self, policy: Policy, shape: ModelShape, recompute: bool) -> None:
        from tunesmith.models.families import setting

        self.policy, self.shape, self.recompute = policy, shape, recompute
        self.item_bytes = policy.model.dtype.itemsize
        self.keeps_scores = any(setting(policy.config, name) for name in _DROPOUTS)
        head = policy.model.get_output_embeddings() if policy.family.kind == "decoder" else None
        trains = head is not None and any(parameter.requires_grad for parameter in head.parameters())
        self.chunk = 0 if head is None else 512 if trains else 128

    def most(self, candidates: list[list[Any]], has_gradients: bool, has_moments: bool) -> Met:
        """The largest of some; only those are put together that what they share may have made smaller."""
        from tunesmith.data.batch import to_batch
        from tunesmith.plan.foreseen import Met, seen

        best: Met | None = None
        for rows in sorted(candidates, key=self.bytes, reverse=True):
            if best is not None and self.bytes(rows) <= best.size_bytes:
                break
            other = seen(self.policy, to_batch(rows))
            size = self.bytes(rows, len(other.batch.ids) - other.computed_tokens)
            if best is None or size > best.size_bytes:
                best = Met(other, size, has_gradients, has_moments)
        assert best is not None
        return best

    def bytes(self, rows: list[Any], shared_tokens: int = 0) -> int:
        """Of a micro-batch; scores that dropout keeps as Korthikanti et al. (2022, arXiv 2205.05198) count them."""
        from tunesmith.plan.memory import estimate_activations

        lengths = [len(row.ids) for row in rows]
        if not self.policy.packed:
            lengths = [max(lengths)] * len(lengths)
        learnt = sum(sum(row.supervised) for row in rows) if self.chunk else 0
        found = estimate_activations(
            self.shape, sum(lengths) - shared_tokens, learnt,
            item_bytes=self.item_bytes, recompute=self.recompute, chunk=self.chunk,
        )  # fmt: skip
        if not self.keeps_scores:
            return found
        blocks = 1 if self.recompute else self.shape.n_layers
        squares = sum(length * length for length in lengths)
        return found + round(blocks * self.shape.n_heads * squares * 2.5 * self.item_bytes)
