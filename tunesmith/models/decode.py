"""Llama-like decoders as writing runs them: maps looked up once, keys and values in pages, nothing kept for a backward.

The one idea: a prompt and a token are the same work on documents end to end, of many tokens or of one, so that prompts
of any length are read together and rows at any place are written together. Rows may have low-rank adapters of their
own. Whatever else stands at a place runs through its module. Which rows run, and where their pages are, is
`running.py`; models of other kinds write in `padded.py`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.switches import on
from tunesmith.kernels import elementwise, few
from tunesmith.kernels.packed import Packed
from tunesmith.kernels.quantized import Quantized
from tunesmith.models import blocks
from tunesmith.models.copies import swap_of
from tunesmith.models.cross_entropy import shaping_of
from tunesmith.models.forms import NORMS, form_of, modules_at
from tunesmith.models.ports import Port, attached_to, is_watched
from tunesmith.models.route import Route, Segments, current_route

log = logging.getLogger(__name__)
# rotary tables that depend on nothing but the position
_ROPES = {"default", "linear", "llama3", "yarn"}
# weights are laid out anew for products of up to so many rows, once there have been so many of these: what it costs
PACKED_ROWS, OFTEN = 128, 4
_PACKED_SHARE = 0.2  # of the machine's memory, for models up to that size
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> [tokens, heads, width]


def decoder_of(model: Any, route: Route | None) -> Decoder | None:
    """How a model writes here under a route; None where it does not."""
    form = form_of(model)
    if not on("paged") or not blocks.fits(model) or form is None or model.device.type != "cpu":
        return None
    if type(model).__name__ != form.writer:
        return None
    if not _is_steady(model.base_model):
        _tell(type(model).__name__)
        return None
    attached = attached_to(model)
    acting = attached.settled(current_route() if route is None else route)
    if any(name in attached.soft or name in attached.keys for name in acting.adapters):
        return None
    return Decoder(model, acting, route)


def may_pack(model: nn.Module) -> bool:
    """Whether there is memory for a model's weights laid out anew."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return size < _PACKED_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _is_steady(base: Any) -> bool:
    """Whether a token is turned by its position alone, and sees nothing that comes after it."""
    kinds = getattr(base.rotary_emb, "rope_type", "default")
    ropes = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    return ropes <= _ROPES and all(layer.self_attn.is_causal for layer in base.layers)


@cache
def _tell(name: str) -> None:
    log.info("%s has positions or attention that pages do not hold: rows are written padded", name)


@dataclass(frozen=True)
class Rows:
    """Documents of one forward pass.

    Attributes:
        lengths: tokens of each.
        route: of each of them, or of all, for modules that ask.
        groups: int32 [documents]: which of the decoder's groups each is of; None where there is one.
    """

    lengths: tuple[int, ...]
    route: Route | None
    groups: Tensor | None

    @contextmanager
    def enter(self, lengths: Sequence[int]) -> Iterator[Tensor | None]:
        """Lets modules know their rows, of these lengths; gives the group of each token."""
        groups = self.groups
        if groups is not None and len(groups) != sum(lengths):
            groups = groups.repeat_interleave(torch.tensor(lengths))
        with Segments(tuple(lengths)).enter():
            if self.route is None:
                yield groups
            else:
                with self.route.enter():
                    yield groups


class Decoder:
    """A model under one route, which may differ from row to row.

    Args:
        acting: what is settled: the route without what is merged.
        route: as the caller said it.

    Attributes:
        groups: the adapters of rows, each combination once.
        layers, heads, kv, width, scale: blocks; heads of queries and of keys, their width, the factor of scores.
        windows, caps: of each layer, how many tokens a query sees, and where scores are capped; 0 for all and nowhere.
        kinds, turned: of each layer, which table turns heads, and of each table, how many columns of a head.
        shaping: what is done to logits.
        may_pack: whether there is memory for weights that are laid out anew.
        is_plain: whether nothing but low-rank changes acts on the maps, so that `step.py` can write.
    """

    def __init__(self, model: Any, acting: Route, route: Route | None) -> None:
        self.base, self.config, self.route, self.acting = model.base_model, model.config, route, acting
        self.groups = list(dict.fromkeys(acting.rows or [acting.adapters]))
        form = form_of(model)
        assert form is not None  # `decoder_of` has asked
        self.form, self.gate, self.shaping = form, str(blocks.gate_of(self.config)), shaping_of(self.config)
        attention = self.base.layers[0].self_attn
        self.layers, self.dtype = len(self.base.layers), model.dtype
        self.heads, self.kv = self.config.num_attention_heads, self.config.num_key_value_heads
        self.width, self.scale = attention.head_dim, float(attention.scaling)
        attentions = [layer.self_attn for layer in self.base.layers]
        self.windows = [form.window_of(one) or 0 for one in attentions]
        self.caps = [form.cap_of(one) or 0.0 for one in attentions]
        self.kinds = [form.table_of(one) for one in attentions]
        tables = form.tables(self.base, torch.empty(1, 1, 1), torch.zeros(1, 1, dtype=torch.int64))
        self.turned = {kind: cos.shape[1] for kind, (cos, _) in tables.items()}
        self.may_pack = may_pack(model)
        self.blocks = [_Block(layer, self) for layer in self.base.layers]
        self.norm, self.head = Norm(self.base.norm, self), Product([model.get_output_embeddings()], self)
        inner = [product for block in self.blocks for product in (block.qkv, block.o, block.both, block.down)]
        self.products = [*inner, self.head]
        norms = [self.norm, *(norm for block in self.blocks for norm in block.norms)]
        self.is_plain = all(one.plain for one in self.products) and all(one.weight is not None for one in norms)

    def rows(self, numbers: Sequence[int], lengths: Sequence[int]) -> Rows:
        """Documents of these lengths, for rows that have these numbers in the route."""
        if not self.acting.rows:
            return Rows(tuple(lengths), self.route, None)
        route = self.acting.select(numbers)
        groups = [self.groups.index(names) for names in route.rows]
        return Rows(tuple(lengths), route, torch.tensor(groups, dtype=torch.int32))

    def states(self, ids: Tensor, positions: Tensor, rows: Rows, attend: Attend) -> Tensor:
        """What the last norm gives: [tokens, width], for ids and positions, int64 [tokens]."""
        with rows.enter(rows.lengths) as groups:
            x = self.base.embed_tokens(ids[None])
            tables = self.form.tables(self.base, x, positions[None])
            x, beside = x[0], None
            for number, block in enumerate(self.blocks):
                h, x = block.before(x, beside)
                qkv = block.heads(block.qkv(h, groups), self.heads, self.kv)
                q, k, v = elementwise.split_rope(qkv, *tables[self.kinds[number]], self.heads, self.kv)
                beside = block.answered(0, block.o(attend(number, q, k, v).flatten(1), groups))
                h, x = block.between(x, beside)
                made = block.down(elementwise.gated(block.both(h, groups), self.gate), groups)
                beside = block.answered(1, made)
            return self.norm(x, beside)[0]

    def logits(self, states: Tensor, rows: Rows) -> Tensor:
        """The head's product: [documents, vocabulary] in the model's dtype, from a state [documents, width] of each."""
        with rows.enter((1,) * len(states)) as groups:
            return self.head(states, groups)


class _Block:
    """What one block is made of.

    Attributes:
        after: norms of the answers of attention and MLP; none where these are added as they are.
        heads: norms of heads.
        norms: all of them.
    """

    def __init__(self, layer: Any, decoder: Decoder) -> None:
        attention, mlp, form = layer.self_attn, layer.mlp, decoder.form
        self.before, self.between = Norm(layer.input_layernorm, decoder), Norm(getattr(layer, form.between), decoder)
        after = [module for module in modules_at(layer, form.after) if not isinstance(module, nn.Dropout)]
        self.after = [Norm(module, decoder) for module in after]
        self.heads = Heads([Norm(module, decoder) for module in modules_at(attention, form.heads)])
        self.norms = [self.before, self.between, *self.after, *self.heads.norms]
        self.qkv = Product(modules_at(attention, form.qkv), decoder)
        self.o, self.down = Product([attention.o_proj], decoder), Product([mlp.down_proj], decoder)
        self.both = Product(modules_at(mlp, form.inner), decoder)

    def answered(self, number: int, x: Tensor) -> Tensor:
        """What attention (0) or the MLP (1) answers, as it is added."""
        return self.after[number](x, None)[0] if self.after else x


class Norm:
    """The norm of a sum, and the sum."""

    def __init__(self, module: Any, decoder: Decoder) -> None:
        base: Any = module.base if isinstance(module, Port) else module
        acts = isinstance(module, Port) and any(module.of(name) for name in decoder.acting.adapters)
        plain = type(base).__name__ in NORMS and swap_of(base) is None and not acts
        self.module, self.offset = module, decoder.form.offset
        self.weight: Tensor | None = base.weight if plain else None
        self.eps = float(getattr(base, "variance_epsilon", None) or getattr(base, "eps", None) or 0.0)

    def __call__(self, x: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.weight is None:
            x = x if beside is None else x + beside
            return self.module(x), x
        if beside is None:
            return elementwise.rms_norm(x, self.weight, self.eps, self.offset), x
        x, normed = elementwise.add_rms_norm(x, beside, self.weight, self.eps, self.offset)
        return normed, x


class Heads:
    """The norms of each head of queries and of keys, where a family has them."""

    def __init__(self, norms: Sequence[Norm]) -> None:
        self.norms = norms

    def __call__(self, qkv: Tensor, heads: int, kv: int) -> Tensor:
        """The product of q, k and v, [tokens, (heads + 2 kv) x width], with its heads normed."""
        if not self.norms:
            return qkv
        of_q, of_k = self.norms
        if of_q.weight is not None and of_k.weight is not None:
            return elementwise.norm_heads(qkv, of_q.weight, of_k.weight, heads, kv, of_q.eps, of_q.offset)
        q, k, v = qkv.unflatten(1, (heads + 2 * kv, -1)).split([heads, kv, kv], 1)
        return torch.cat([of_q(q, None)[0], of_k(k, None)[0], v], 1).flatten(1)


class Product:
    """Maps of one input side by side, with the low-rank changes of each group of rows.

    Where something else acts on one of them, all run through their modules.
    """

    def __init__(self, modules: Sequence[Any], decoder: Decoder) -> None:
        self.modules = modules
        held: list[Any] = [module.base if isinstance(module, Port) else module for module in modules]
        found = [_pairs(*both, decoder) for both in zip(modules, held, strict=True)]
        self.plain = all(pairs is not None for pairs in found)
        if not self.plain:
            return
        self.weights: list[Tensor] = [base.weight for base in held]
        self.biases: list[Tensor] = [base.bias for base in held if base.bias is not None]
        self.plain = len(self.biases) in (0, len(held))
        self.sizes, self.inputs = [len(weight) for weight in self.weights], self.weights[0].shape[1]
        self.factors = [few.Factors(pairs) for pairs in found if pairs is not None]
        self.most = max(one.most for one in self.factors)
        self.down: Tensor | None = None
        self.ups: list[Tensor] = []
        self.packed: Packed | None = None
        self.may_pack = decoder.may_pack
        self.calls = 0
        if not decoder.acting.rows and self.most:
            self._alone([one.pairs[0] for one in self.factors])

    def __call__(self, x: Tensor, groups: Tensor | None) -> Tensor:
        """[tokens, sum of outputs] from x [tokens, inputs]; groups int32 [tokens] where rows differ."""
        if not self.plain:
            parts = [module(x) for module in self.modules]
            return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        narrow = None if self.down is None else few.nt(x, [self.down])
        y = self._base(x, narrow)
        if groups is not None:
            for part, factors in zip(y.split(self.sizes, 1), self.factors, strict=True):
                few.changes(part, x, factors, groups)
        return y

    def _base(self, x: Tensor, narrow: Tensor | None) -> Tensor:
        """The maps, with the changes of the only group where there is one."""
        if few.MOST[x.dtype] < len(x) <= PACKED_ROWS:
            self.calls += 1
            if self.calls == OFTEN and self.may_pack:
                self.packed = Packed(self.weights, self.biases)
            if self.packed is not None:
                y = self.packed(x)
                if narrow is not None:
                    for part, up in zip(y.split(self.sizes, 1), self.ups, strict=True):
                        part.addmm_(narrow, up.T)
                return y
        return few.nt(x, self.weights, narrow, self.ups, self.biases)

    def _alone(self, pairs: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """One pair of factors for all maps: each adds zero times what the others' first factors give."""
        ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
        self.down = torch.cat([pair[0] for pair in pairs if pair is not None])
        for number, (weight, pair) in enumerate(zip(self.weights, pairs, strict=True)):
            up = weight.new_zeros(len(weight), sum(ranks))
            if pair is not None:
                start = sum(ranks[:number])
                up[:, start : start + ranks[number]] = pair[1].T
            self.ups.append(up)


def _pairs(module: Any, base: Any, decoder: Decoder) -> list[tuple[Tensor, Tensor] | None] | None:
    """Factors of each group at a map; None where something else than low-rank changes acts on it."""
    if type(base) is not nn.Linear or is_watched(base) or swap_of(base) is not None:
        return None
    if isinstance(base.weight, Quantized) or not base.weight.is_contiguous():
        return None
    found: list[tuple[Tensor, Tensor] | None] = []
    for names in decoder.groups:
        inserts = [insert for name in names for insert in (module.of(name) if isinstance(module, Port) else [])]
        changes = [insert.low_rank() for insert in inserts]
        if any(change is None for change in changes):
            return None
        dtype = base.weight.dtype
        a = [change.a.detach().to(dtype) for change in changes if change is not None]
        b = [(change.b.detach() * change.scale).to(dtype).T for change in changes if change is not None]
        found.append((torch.cat(a).contiguous(), torch.cat(b).contiguous()) if a else None)
    return found
