"""Text from a model: many prompts at once, or one as a stream of tokens.

Who writes depends on the model: llama-like decoders in `running.py`, where a row that has finished makes room for the
next, other decoders in padded batches (`padded.py`), models of other kinds through transformers (`delegated.py`). The
batch changes nothing about what is written. The choice of tokens is in `sampling.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.models.decode import decoder_of
from tunesmith.models.delegated import Delegate
from tunesmith.models.families import setting
from tunesmith.models.modes import evaluating
from tunesmith.models.padded import Padded
from tunesmith.models.route import Route, current_route
from tunesmith.models.running import Running, Turn
from tunesmith.models.sampling import Chooser
from tunesmith.models.soft import layout

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
        ids: new tokens, without the stop token.
        stopped: it ended with a stop token, rather than at the limit.
        end: that token.
    """

    ids: list[int]
    stopped: bool
    end: int | None = field(default=None, compare=False)


def generate(
    loaded: Loaded,
    route: Route | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int = 16,
    shared_prefix: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """A completion for each prompt, in their order.

    Args:
        route: the adapters that act, of all rows or of each; None leaves it to the caller's.
        prompts: token ids of each, without `shared_prefix`.
        max_new_tokens: at most so many; a stop token takes one of them.
        stop_ids: tokens that end a completion.
        temperature, top_p, seed: see `sampling.Chooser`; a row's draws depend on its number, not on the batch.
        numbers: of the rows, where these are some of more; else they count from 0.
        batch_size: rows at a time.
        shared_prefix: what every prompt begins with.
        progress: called with (done, all).

    Raises:
        ConfigError: settings out of range, or the model does not write.
        DataError: a prompt without tokens, or longer than the model's table of positions has room for.
    """
    whole = [[*shared_prefix, *prompt] for prompt in prompts]
    choose = Chooser(temperature, top_p, seed, max_new_tokens, numbers)
    writer = _Writer(loaded, route, max_new_tokens, stop_ids, choose)
    writer.check(whole, batch_size)
    order = sorted(range(len(whole)), key=lambda row: -len(whole[row]))  # longest first: memory fails at once or never
    ids: list[list[int]] = [[] for _ in whole]
    done = 0
    with evaluating(loaded.model):
        for rows in writer.together(order):
            for turn in writer.turns(whole, rows, batch_size, len(shared_prefix)):
                for row, token in turn:
                    ids[row].append(token)
                ended = sum(writer.has_ended(ids[row]) for row in {row for row, _ in turn})
                done += ended
                if ended and progress is not None:
                    progress(done, len(whole))
    return [writer.completion(one) for one in ids]


def stream(
    loaded: Loaded,
    route: Route | None,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that `generate` would write after one prompt, each as soon as it is chosen. Same errors."""
    writer = _Writer(loaded, route, max_new_tokens, stop_ids, Chooser(temperature, top_p, seed, max_new_tokens))
    writer.check([list(prompt)], 1)
    with evaluating(loaded.model):
        for turn in writer.turns([list(prompt)], [0], 1, 0):
            for _, token in turn:
                if token not in stop_ids:
                    yield token


class _Writer:
    """What stays the same for all batches: the model, how it is called, when rows end."""

    def __init__(self, loaded: Loaded, route: Route | None, limit: int, stops: set[int], choose: Chooser) -> None:
        self.model: Any = loaded.model
        self.family, self.limit, self.stops, self.choose = loaded.family, limit, stops, choose
        self.route = current_route() if route is None else route
        self.config = loaded.model.config.get_text_config(decoder=True)

    @property
    def delegated(self) -> bool:
        """Whether transformers' own loop has to write."""
        kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        plain = kinds <= {"full_attention", "sliding_attention"} and not getattr(self.model, "_is_stateful", False)
        return self.family.kind == "seq2seq" or not plain or "past_key_values" not in self.accepted

    @cached_property
    def accepted(self) -> set[str]:
        """Names of the arguments of the model's forward."""
        return set(inspect.signature(self.model.forward).parameters)

    def check(self, prompts: list[list[int]], batch_size: int) -> None:
        """Raises what can be known before anything is computed."""
        if self.family.kind == "encoder":
            raise ConfigError(f"{self.family.name} is an encoder and does not write text", where="model")
        if self.limit < 1 or batch_size < 1:
            raise ConfigError(f"max_new_tokens is {self.limit} and batch_size {batch_size}; both are at least 1")
        bare = next((row for row, prompt in enumerate(prompts) if not prompt), None)
        if bare is not None:
            raise DataError(f"prompt {bare + 1} has no tokens", hint="a prompt needs at least a begin token")
        if self.route is not None and self.route.rows and len(self.route.rows) != len(prompts):
            raise ConfigError(f"the route is for {len(self.route.rows)} rows, there are {len(prompts)} prompts")
        places, lengths = self._table_size(), list(map(len, prompts))
        room = layout(self.model, self.route, lengths)
        longest = max(lengths, default=0) if room is None else room.longest
        if places is not None and longest + self.limit - 1 > places:
            raise DataError(
                f"a prompt of {longest} tokens and {self.limit} new ones need {longest + self.limit - 1} positions; "
                f"{self.family.name} has {places}",
                hint="shorten the prompts or write fewer tokens",
            )

    def turns(self, prompts: list[list[int]], order: list[int], size: int, shared: int) -> Iterator[Turn]:
        """(row number, token) of every row, as they are written; a stop token is a row's last.

        Args:
            shared: so many tokens of every prompt are the same.
        """
        if self.delegated:
            yield from self._delegate(prompts, order, size)
            return
        shared = min([shared, *(len(prompt) - 1 for prompt in prompts)])  # each row needs a token of its own
        route = self._route(order)
        if not self._may_pad_inside(prompts) or (route is not None and route.rows):
            shared = 0  # what is read once is read under one route
        decoder = decoder_of(self.model, self.route if route is not None and route.rows else route)
        writer: Running | Padded
        if decoder is None:
            writer = Padded(self.model, self._route, self.limit, self.stops, self.choose)
        else:
            writer = Running(decoder, self.limit, self.stops, self.choose)
        yield from writer.turns(prompts, order, size, shared)

    def together(self, order: list[int]) -> list[list[int]]:
        """Rows that may share a batch: all, or, in a model whose inner shapes are not known, those of one route."""
        if self.route is None or not self.route.rows or self.family.table:
            return [order]
        groups: dict[tuple[str, ...], list[int]] = {}
        for row in order:
            groups.setdefault(self.route.of(row), []).append(row)
        return list(groups.values())

    def _route(self, rows: Sequence[int]) -> Route | None:
        """The route of some rows: one for all of them where they have the same."""
        if self.route is None or not self.route.rows:
            return self.route
        found = {self.route.of(row) for row in rows}
        return Route(found.pop()) if len(found) == 1 else self.route.select(rows)

    def _delegate(self, prompts: list[list[int]], order: list[int], size: int) -> Iterator[Turn]:
        """The same through transformers' loop."""
        draw = self.choose
        delegate = Delegate(
            self.model,
            limit=self.limit,
            stops=self.stops,
            temperature=draw.temperature,
            top_p=draw.top_p,
            seed=draw.seed,
        )
        for rows in delegate.batches(order, size):
            route = self._route(rows)
            with torch.no_grad(), nullcontext() if route is None else route.enter():
                found = delegate.write([prompts[row] for row in rows], rows)
            yield [(row, token) for row, ids in zip(rows, found, strict=True) for token in ids]

    def has_ended(self, ids: list[int]) -> bool:
        """Whether a row goes on no further."""
        return len(ids) == self.limit or ids[-1] in self.stops

    def completion(self, ids: list[int]) -> Completion:
        """What was written, without the stop token."""
        stopped = bool(ids) and ids[-1] in self.stops
        return Completion(ids[:-1], True, ids[-1]) if stopped else Completion(ids, False)

    def _table_size(self) -> int | None:
        """Positions of a model that learns one vector each; None where positions are computed."""
        if self.delegated or setting(self.config, "rope_parameters", "rope_theta", "alibi") is not None:
            return None
        places = setting(self.config, "max_position_embeddings", "n_positions")
        return None if places is None else int(places)

    def _may_pad_inside(self, prompts: list[list[int]]) -> bool:
        # a window counts columns, so padding behind a shared prefix would take room in it
        window = setting(self.config, "sliding_window", "window_size")
        room = layout(self.model, self.route, list(map(len, prompts)))
        longest = max(map(len, prompts), default=0) if room is None else max(room.lengths)
        return window is None or longest + self.limit <= int(window)
