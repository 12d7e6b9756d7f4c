"""Text from a model: many prompts at once, or one as a stream of tokens.

Rows of similar length share a left-padded batch, padding is known by the mask and never by an id, a prefix that all
prompts share is read once, and rows that have finished leave. None of it changes what is written. The memory is in
`cache.py`, the choice of tokens in `sampling.py`, models of other kinds in `delegated.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.models.cache import SPARE, RowCache
from tunesmith.models.delegated import Delegate
from tunesmith.models.families import setting
from tunesmith.models.modes import evaluating
from tunesmith.models.route import Route, current_route
from tunesmith.models.sampling import Chooser
from tunesmith.models.soft import PLACEHOLDER, Holes, Layout, Room, layout

if TYPE_CHECKING:
    from tunesmith.models.load import Loaded

# rows leave once this share of the batch has finished: moving the rest costs about one token of all rows
_LEAVE = 0.25


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
        ids: new tokens, without the stop token.
        stopped: it ended with a stop token, rather than at the limit.
    """

    ids: list[int]
    stopped: bool


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
        batch_size: rows at a time.
        shared_prefix: what every prompt begins with.
        progress: called with (done, all).

    Raises:
        ConfigError: settings out of range, or the model does not write.
        DataError: a prompt without tokens, or longer than the model's table of positions has room for.
    """
    whole = [[*shared_prefix, *prompt] for prompt in prompts]
    writer = _Writer(loaded, route, max_new_tokens, stop_ids, Chooser(temperature, top_p, seed, max_new_tokens))
    writer.check(whole, batch_size)
    order = sorted(range(len(whole)), key=lambda row: -len(whole[row]))  # longest first: memory fails at once or never
    found: dict[int, Completion] = {}
    with evaluating(loaded.model):
        for rows in writer.together(order):
            if writer.delegated:
                parts = writer.delegate(whole, rows, batch_size)
            else:
                parts = writer.batches(whole, rows, batch_size, len(shared_prefix))
            for part in parts:
                found |= part
                if progress is not None:
                    progress(len(found), len(whole))
    return [found[row] for row in range(len(whole))]


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
        if writer.delegated:
            for part in writer.delegate([list(prompt)], [0], 1):
                yield from part[0].ids
            return
        for turn in writer.turns([list(prompt)], [0], None):
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

    def batches(
        self, prompts: list[list[int]], order: list[int], size: int, shared: int
    ) -> Iterator[dict[int, Completion]]:
        """The completions of some rows, a few at a time; `shared` tokens of every prompt are the same."""
        shared = min([shared, *(len(prompt) - 1 for prompt in prompts)])  # each row needs a token of its own
        route = self._route(order)
        if not self._may_pad_inside(prompts) or (route is not None and route.rows):
            shared = 0  # what is read once is read under one route
        prefix = self._read(prompts[0][:shared], route) if shared > 0 else None
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            ids: dict[int, list[int]] = {row: [] for row in rows}
            for turn in self.turns([prompts[row] for row in rows], rows, prefix):
                for row, token in turn:
                    ids[row].append(token)
            yield {row: self._completion(ids[row]) for row in rows}

    def turns(
        self, prompts: list[list[int]], numbers: list[int], prefix: RowCache | None
    ) -> Iterator[list[tuple[int, int]]]:
        """(row number, token) of every row that has not ended, token by token; a stop token is a row's last."""
        rows = _Rows(self.model, self._route(numbers), prompts, prefix, min(self.limit, SPARE))
        numbers, ended = list(numbers), [False] * len(numbers)
        logits = self._forward(rows.ids, rows)
        for turn in range(self.limit):
            tokens = self.choose(logits, numbers, turn)
            ids = tokens.tolist()
            yield [(number, token) for number, token, end in zip(numbers, ids, ended, strict=True) if not end]
            ended = [end or token in self.stops for end, token in zip(ended, ids, strict=True)]
            if all(ended) or turn + 1 == self.limit:
                return
            if sum(ended) >= _LEAVE * len(ended) and any(ended):
                staying = [row for row, end in enumerate(ended) if not end]
                rows.keep(staying)
                tokens = tokens[torch.tensor(staying, device=tokens.device)]
                numbers, ended = [numbers[row] for row in staying], [False] * len(staying)
            logits = self._forward(tokens[:, None], rows)

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

    def delegate(self, prompts: list[list[int]], order: list[int], size: int) -> Iterator[dict[int, Completion]]:
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
            with torch.no_grad(), _entered(self._route(rows)):
                found = delegate.write([prompts[row] for row in rows], rows)
            yield {row: self._completion(ids) for row, ids in zip(rows, found, strict=True)}

    @torch.no_grad()
    def _forward(self, ids: Tensor, rows: _Rows) -> Tensor:
        """Logits [rows, vocabulary], float32, after ids [rows, new tokens]."""
        inputs: dict[str, Any] = {"input_ids": ids, **rows.advance(ids.shape[1])}
        # as an index: what a slice leaves is not contiguous, and a frozen bfloat16 head is then copied to be multiplied
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        inputs |= {"use_cache": True, "return_dict": True, "logits_to_keep": last}
        with _entered(rows.route), _entered(rows.holes):
            output = self.model(**{name: value for name, value in inputs.items() if name in self.accepted})
        logits: Tensor = output.logits[:, -1]
        return logits.float()

    def _read(self, prefix: list[int], route: Route | None) -> RowCache:
        """The cache of the shared prefix, one row."""
        rows = _Rows(self.model, route, [prefix], None, 0, whole=False)
        self._forward(rows.ids, rows)
        return rows.cache

    def _completion(self, ids: list[int]) -> Completion:
        stopped = bool(ids) and ids[-1] in self.stops
        return Completion(ids[:-1] if stopped else ids, stopped)

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


def _entered(what: Route | Holes | None) -> AbstractContextManager[None]:
    return nullcontext() if what is None else what.enter()


class _Rows:
    """Rows of a batch: what each has read, which columns of the cache are its own, where it stands."""

    def __init__(
        self,
        model: Any,
        route: Route | None,
        prompts: list[list[int]],
        prefix: RowCache | None,
        spare: int,
        whole: bool = True,
    ) -> None:
        device: torch.device = model.device
        self.route = route
        shared = 0 if prefix is None else prefix.get_seq_length()
        room = layout(model, route, [len(prompt) for prompt in prompts])
        rooms = [Room()] * len(prompts) if room is None else list(room.rooms)
        if not whole:  # a prompt goes on behind this, and its infix comes then
            rooms = [replace(one, infix=()) for one in rooms]
        own = [
            [*[PLACEHOLDER] * one.before, *prompt, *[PLACEHOLDER] * one.inside][shared:]
            for one, prompt in zip(rooms, prompts, strict=True)
        ]
        width = max(map(len, own))
        padding = [[0] * (width - len(ids)) for ids in own]
        self.ids = torch.tensor([[*pad, *ids] for pad, ids in zip(padding, own, strict=True)], device=device)
        self.cache = RowCache(spare) if prefix is None else prefix.spread(len(own), width + spare)
        self.spare = spare
        self.seen = torch.ones(len(own), shared + width, dtype=torch.int64, device=device)
        for row, pad in enumerate(padding):
            self.seen[row, shared : shared + len(pad)] = 0
        self.padded = any(padding)
        # position of the next column
        ahead = [one.keys + shared - len(pad) for one, pad in zip(rooms, padding, strict=True)]
        self.ahead = torch.tensor(ahead, device=device)
        self.holes = self._holes(room, rooms, [len(pad) for pad in padding], width, shared)

    def _holes(self, room: Layout | None, rooms: list[Room], pads: list[int], width: int, shared: int) -> Holes | None:
        """Where soft tokens go in the first columns; what the shared prefix holds is written already."""
        if room is None:
            return None
        starts = [row * width + pad - shared for row, pad in enumerate(pads)]
        if shared:
            starts = [start + one.before for start, one in zip(starts, rooms, strict=True)]
            rooms = [replace(one, prefix=()) for one in rooms]
        return replace(room, rooms=tuple(rooms)).holes((len(rooms), width), starts, self.ids.device)

    def advance(self, tokens: int) -> dict[str, Any]:
        """The inputs that go with that many new tokens a row."""
        positions = (self.ahead[:, None] + torch.arange(tokens, device=self.ahead.device)).clamp(min=0)
        self.ahead = self.ahead + tokens
        past = self.cache.get_seq_length()
        if past + tokens > self.seen.shape[1]:
            more = self.seen.new_ones(len(self.seen), past + tokens + SPARE - self.seen.shape[1])
            self.seen = torch.cat([self.seen, more], 1)
        seen = self.seen[:, : past + tokens] if self.padded else None
        return {"position_ids": positions, "attention_mask": seen, "past_key_values": self.cache}

    def keep(self, staying: list[int]) -> None:
        """Drops the other rows, and columns in which the remaining ones have only padding."""
        rows = torch.tensor(staying, device=self.seen.device)
        past = self.cache.get_seq_length()
        seen = self.seen[rows, :past]
        columns = seen.any(0).nonzero()[:, 0]
        self.cache.keep(rows, columns, self.spare)
        self.seen = seen[:, columns]
        self.padded = not bool(self.seen.all())
        self.ahead = self.ahead[rows]
        self.route = self.route if self.route is None else self.route.select(staying)
