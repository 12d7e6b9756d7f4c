"""A batch as the inputs of a forward pass, and its outputs as the caller's tokens again.

The one idea: documents lie end to end in one row where the family allows it, else each in a padded row; what a route
puts before or into them (`soft.py`) is laid out here and gone again from what comes back. Where padded rows have
different adapters, those with the same ones run together: no model code has to keep rows apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core.errors import AdapterError
from tunesmith.models import blocks
from tunesmith.models.attention import is_heard
from tunesmith.models.families import setting
from tunesmith.models.places import runs
from tunesmith.models.route import Route, Segments
from tunesmith.models.seq2seq import prompts_of
from tunesmith.models.shared import Compact, compacted
from tunesmith.models.soft import Layout, check_positions, layout
from tunesmith.models.trunk import Cut

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.models.policy import Policy


def states(
    policy: Policy,
    batch: Batch,
    run: Callable[[dict[str, Any], Tensor | None], Tensor],
    wanted: Tensor | None = None,
) -> Tensor:
    """What a forward pass answers for each token, [tokens, width], or for some: [wanted, width].

    Args:
        run: calls the model with inputs. Packed, it gets the places of the tokens that are wanted, None for all, and
            answers [these, width]; padded it answers [rows, tokens, width].
        wanted: int64, tokens of the batch.

    Raises:
        AdapterError: the policy's route is for another number of rows.
        ConfigError: soft tokens leave a document too few positions.
    """
    rows = policy.route.rows
    if rows and len(rows) != len(batch.lengths):
        raise AdapterError(f"the route is for {len(rows)} rows, the batch has {len(batch.lengths)}")
    if rows and not policy.packed:
        found = _apart(policy, batch, run)
        return found if wanted is None else found[wanted]
    room = layout(policy.model, policy.route, batch.lengths, lambda: _splits(policy, batch))
    if room is not None:
        check_positions(policy.model, room)
    compact = None if room is not None else compacted(policy, batch)
    cut = None if room is not None else _cut(policy, batch, run)
    if compact is not None:
        return _once(policy, batch, compact, cut, run, wanted)
    wide = batch if room is None else _widened(batch, room)
    places = _chosen(room, wanted, batch.ids.device)
    if cut is not None and cut.states is not None and not policy.packed:
        cut = replace(cut, states=_in_rows(cut.states, batch))
    with policy.route.enter(), _entered(cut), (_packed if policy.packed else _padded)(policy, wide, room) as inputs:
        if policy.packed:
            return run(inputs, places)
        found = run(inputs, None)[_places(wide)]
    return found if places is None else found[places]


def _once(
    policy: Policy,
    batch: Batch,
    compact: Compact,
    cut: Cut | None,
    run: Callable[[dict[str, Any], Tensor | None], Tensor],
    wanted: Tensor | None,
) -> Tensor:
    """The same where documents share beginnings. A segment acts as a row: it has the adapters of its document."""
    route = policy.route.select(compact.owners)
    if cut is not None and cut.states is not None:
        cut = replace(cut, states=cut.states[:, compact.tokens])
    with route.enter(), _entered(cut), _packed(policy, compact.part(batch), None, compact.segments) as inputs:
        return compact.states(lambda places: run(inputs, places), wanted)


def _cut(policy: Policy, batch: Batch, run: Callable[[dict[str, Any], Tensor | None], Tensor]) -> Cut | None:
    """What comes out of the policy's trunk, [1, tokens, width], where it is kept; None where the trunk is to run."""
    trunk = policy.trunk
    if trunk is None or policy.route.rows or is_heard():
        return None

    def below(rows: Sequence[int]) -> Tensor:
        part, _ = documents(batch, rows)
        inside = (_packed if policy.packed else _padded)(policy, part, None)
        with policy.route.enter(), trunk.below().enter(), inside as inputs:
            found = run(inputs, None)
        return found if policy.packed else found[0]

    return trunk.cut(batch, below, blocks.even_from(policy.model) if policy.packed else None)


def _entered(cut: Cut | None) -> AbstractContextManager[None]:
    return nullcontext() if cut is None else cut.enter()


def _in_rows(states: Tensor, batch: Batch) -> Tensor:
    """States [1, tokens, width] as a padded batch has them: [documents, longest, width]."""
    shape = len(batch.lengths), max(batch.lengths), states.shape[2]
    return states.new_zeros(shape).index_put(_places(batch), states[0])


def _chosen(room: Layout | None, wanted: Tensor | None, device: torch.device) -> Tensor | None:
    """Where the caller's tokens, or the wanted ones of them, lie in what is run; None for all as they are."""
    if room is None:
        return wanted
    sources = room.sources(device)
    return sources if wanted is None else sources[wanted]


def documents(batch: Batch, chosen: Sequence[int]) -> tuple[Batch, Tensor]:
    """Some documents of a batch with nothing supervised, and where their tokens are in it: int64 [tokens of these]."""
    places = runs(chosen, batch.lengths, batch.ids.device)
    none = places.new_zeros(0)
    part = replace(
        batch,
        ids=batch.ids[places],
        positions=batch.positions[places],
        lengths=tuple(batch.lengths[row] for row in chosen),
        sources=none,
        targets=none,
        rows=tuple(batch.rows[row] for row in chosen),
        labels=None,
        types=None if batch.types is None else batch.types[places],
        prompts=tuple(batch.prompts[row] for row in chosen) if batch.prompts else (),
    )
    return part, places


def _apart(policy: Policy, batch: Batch, run: Callable[[dict[str, Any], Tensor | None], Tensor]) -> Tensor:
    """The same for rows with different adapters, each group by itself."""
    route = policy.route
    batch = replace(batch, prompts=tuple(_splits(policy, batch)))
    parts, order = [], []
    for names in dict.fromkeys(route.rows):
        part, places = documents(batch, [row for row, held in enumerate(route.rows) if held == names])
        parts.append(states(policy.under(Route(names)), part, run))
        order.append(places)
    return torch.cat(parts)[torch.argsort(torch.cat(order))]


def _splits(policy: Policy, batch: Batch) -> Sequence[int]:
    """Tokens of each document before its infix: up to where its answer begins, else all."""
    # an encoder writes no answer, and labelled words are no answers
    whole = not batch.prompts and (policy.family.kind == "encoder" or batch.labels is not None)
    return batch.lengths if whole else prompts_of(batch)


def _widened(batch: Batch, room: Layout) -> Batch:
    return replace(
        batch,
        ids=room.spread(batch.ids),
        positions=room.positions(batch.ids.device),
        lengths=room.lengths,
        types=None if batch.types is None else room.spread(batch.types),
    )


@contextmanager
def _packed(
    policy: Policy, batch: Batch, room: Layout | None, segments: Segments | None = None
) -> Iterator[dict[str, Any]]:
    inputs = {"input_ids": batch.ids, "position_ids": batch.positions + _offset(policy), **_types(policy, batch)}
    with _holes(room, packed=True, like=batch.ids), (segments or Segments(batch.lengths)).enter():
        yield {**{name: values[None] for name, values in inputs.items()}, **_flags(policy)}


@contextmanager
def _padded(policy: Policy, batch: Batch, room: Layout | None) -> Iterator[dict[str, Any]]:
    inputs = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids), **_types(policy, batch)}
    if policy.family.table:
        # a family with a table takes positions; counted here, never found from pad ids
        inputs["position_ids"] = batch.positions + _offset(policy)
    places, shape = _places(batch), (len(batch.lengths), max(batch.lengths))
    padded = {name: values.new_zeros(shape).index_put(places, values) for name, values in inputs.items()}
    with _holes(room, packed=False, like=batch.ids):
        yield {**padded, **_flags(policy)}


@contextmanager
def _holes(room: Layout | None, *, packed: bool, like: Tensor) -> Iterator[None]:
    if room is None:
        yield
        return
    with (room.packed if packed else room.padded)(like.device).enter():
        yield


def _offset(policy: Policy) -> int:
    return int(policy.config.pad_token_id) + 1 if policy.family.pad_offset else 0


def _types(policy: Policy, batch: Batch) -> dict[str, Tensor]:
    """Which of two texts a token is of, for models that have an embedding of it."""
    held = batch.types is not None and int(setting(policy.config, "type_vocab_size") or 0) > 1
    return {"token_type_ids": batch.types} if held and batch.types is not None else {}


def _flags(policy: Policy) -> dict[str, Any]:
    return {"use_cache": False} if policy.family.kind == "decoder" else {}


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where each token lies in a padded batch: its row and its column."""
    lengths, tokens = torch.tensor(batch.lengths, device=batch.ids.device), batch.ids.numel()
    # the size is told, so that a plan needs no numbers to know it
    rows = torch.arange(len(batch.lengths), device=batch.ids.device).repeat_interleave(lengths, output_size=tokens)
    starts = torch.cumsum(lengths, 0) - lengths
    return rows, torch.arange(tokens, device=batch.ids.device) - starts[rows]
