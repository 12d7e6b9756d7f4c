"""The blocks of llama-like decoders in few passes over memory, with the parameters and ports of transformers' modules.

The one idea: what a block computes is written here once more, so that maps that share an input are one product, a sum
and the norm after it are one pass, and the last block works only where an answer is wanted. Whatever is not plain at a
place (an adapter that is no low-rank change, rows with adapters of their own, a norm that trains deltas) runs through
the module that stands there, as in transformers. `tests/test_savings.py` holds both against each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.switches import on
from tunesmith.kernels import elementwise, products
from tunesmith.kernels.build import usable
from tunesmith.kernels.lowrank import Again, Map, maps
from tunesmith.models.attention import attend, is_heard
from tunesmith.models.copies import acting_parameters
from tunesmith.models.forms import NORMS, Form, Tables, form_of, modules_at
from tunesmith.models.ports import Port, as_map, is_any_watched
from tunesmith.models.recompute import again, is_again, made_again
from tunesmith.models.trunk import current_cut

log = logging.getLogger(__name__)
_GATES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"
}  # fmt: skip


def fits(model: Any) -> bool:
    """Whether a model's blocks are known here, its tensors are such that the kernels take them, and nobody listens."""
    base = model.base_model
    if form_of(model) is None or gate_of(model.config) is None:
        _tell(type(base).__name__)
        return False
    if is_heard() or is_any_watched(base):
        return False
    return on("elementwise") and usable(model.get_input_embeddings().weight)


def hidden(model: Any, inputs: dict[str, Any], rows: Tensor | None = None) -> Tensor:
    """What the last norm gives: [tokens, width], or for some tokens only, [rows, width].

    Under a cut (`trunk.py`) blocks below it are left out, or those above and the norm, or both.

    Args:
        inputs: `input_ids` and `position_ids`, [1, tokens].
        rows: int64, the tokens whose states are wanted; None for all.
    """
    base, cut, form = model.base_model, current_cut(), form_of(model)
    assert form is not None  # `fits` was asked before
    begin, end, given = (0, None, None) if cut is None else (cut.begin, cut.end, cut.states)
    x = base.embed_tokens(inputs["input_ids"]) if given is None else given
    shape = _Shape(model.config, form, form.tables(base, x, inputs["position_ids"]))
    x, beside = x[0], None
    for number, layer in enumerate(base.layers[begin:end], begin + 1):
        run = partial(_block, shape, layer)
        if is_again(layer):
            run = partial(again, run)
        x, beside = run(x, beside, rows if number == len(base.layers) else None)
    if end is not None:
        return x if beside is None else x + beside
    if rows is not None and begin == len(base.layers):
        x = x[rows]
    found, _, _ = _normed(shape, base.norm, x, beside)
    return found


def even_from(model: Any) -> int | None:
    """From how many tokens on a document's states are the same bits whatever runs beside it; None where unknown.

    The kernels compute each row of tokens by itself; torch's products choose their order by how many there are.
    """
    dtype = model.get_input_embeddings().weight.dtype
    if not products.fast(dtype) or not fits(model):
        return None
    maps = [one for one in model.base_model.layers.modules() if isinstance(one, nn.Linear)]
    smallest = min((one.weight.numel() for one in maps), default=1)
    return max(products.FEWEST, -(-products.LEAST // smallest))


def gate_of(config: Any) -> str | None:
    """The activation of the MLP as the kernels name it; None where they lack it."""
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return _GATES.get(str(name))


@dataclass(frozen=True)
class _Shape:
    """What all blocks of a forward pass have in common."""

    config: Any
    form: Form
    tables: Tables


def _block(shape: _Shape, layer: Any, x: Tensor, beside: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """One block: the stream and what is still to be added to it, before and after. All [tokens, width]."""
    attention, mlp, form = layer.self_attn, layer.mlp, shape.form
    h, x, make = _normed(shape, layer.input_layernorm, x, beside)
    qkv = _mapped(modules_at(attention, form.qkv), h, make)
    beside = _attended(shape, attention, _heads_normed(shape, attention, qkv))
    if rows is not None:
        x, beside = x[rows], beside[rows]
    beside = _mapped((attention.o_proj,), beside)
    if form.after:
        beside, _, _ = _normed(shape, getattr(layer, form.after[0]), beside, None)
    run = partial(_mlp, shape, layer)
    return again(run, x, beside) if is_again(mlp) and _known(modules_at(mlp, form.inner)) is None else run(x, beside)


def _mlp(shape: _Shape, layer: Any, x: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """The second half of a block, with arguments and results as the whole."""
    mlp, form = layer.mlp, shape.form
    inner = modules_at(mlp, form.inner)
    h, x, make = _normed(shape, getattr(layer, form.between), x, beside)
    both = _mapped(inner, h, make)
    gate = partial(elementwise.gated, kind=gate_of(shape.config) or "")
    known = _known(inner) if is_again(mlp) else None
    with nullcontext() if known is None else made_again(both, _product(known, h, make)):
        beside = _mapped((mlp.down_proj,), gate(both), Again(gate, (both.detach(),)))
    if form.after:
        beside, _, _ = _normed(shape, getattr(layer, form.after[1]), beside, None)
    return x, beside


def _attended(shape: _Shape, attention: Any, qkv: Tensor) -> Tensor:
    """Attention of a product of q, k and v: [tokens, heads x width]."""
    form = shape.form
    q, k, v = elementwise.split_rope(qkv, *shape.tables[form.table_of(attention)], *_counts(shape, attention, qkv))
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    found, _ = attend(
        attention,
        q,
        k,
        v,
        None,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=form.window_of(attention),
        softcap=form.cap_of(attention),
    )
    return found.reshape(len(qkv), -1)


def _counts(shape: _Shape, attention: Any, qkv: Tensor) -> tuple[int, int]:
    """How many heads of queries and of keys a product holds."""
    heads: int = shape.config.num_attention_heads
    return heads, (qkv.shape[1] // attention.head_dim - heads) // 2


def _heads_normed(shape: _Shape, attention: Any, qkv: Tensor) -> Tensor:
    """A product of q, k and v with each head of q and k normed, where the family does so."""
    if not shape.form.heads:
        return qkv
    norms, (heads, kv) = modules_at(attention, shape.form.heads), _counts(shape, attention, qkv)
    q, k = (None if _acts(module) else _gain(module) for module in norms)
    if q is not None and k is not None:
        return elementwise.norm_heads(qkv, q[0], k[0], heads, kv, q[1], shape.form.offset)
    parts = qkv.unflatten(1, (heads + 2 * kv, -1)).split([heads, kv, kv], 1)
    normed = [_normed(shape, module, part, None)[0] for module, part in zip(norms, parts[:2], strict=True)]
    return torch.cat([*normed, parts[2]], 1).flatten(1)


def _acts(module: nn.Module) -> bool:
    """Whether an insert acts at a module."""
    return isinstance(module, Port) and any(True for _ in module.acting())


def _gain(module: nn.Module) -> tuple[Tensor, float] | None:
    """A norm's weight as it acts now, without inserts, and its epsilon; None where the kernels do not know it."""
    plain: Any = module.base if isinstance(module, Port) else module
    own = acting_parameters(plain) if type(plain).__name__ in NORMS else None
    return None if own is None else (own["weight"], getattr(plain, "variance_epsilon", None) or plain.eps)


def _normed(shape: _Shape, module: nn.Module, x: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor, Again | None]:
    """The norm of x + beside, that sum, and how the norm can be made again."""
    gain, offset = _gain(module), shape.form.offset
    if gain is None:
        x = x if beside is None else x + beside
        return module(x), x, None
    weight, eps = gain
    if beside is None:
        found = elementwise.rms_norm(x, weight, eps, offset)
    else:
        x, found = elementwise.add_rms_norm(x, beside, weight, eps, offset)
    if isinstance(module, Port) and _acts(module):
        return module.changed(x, found), x, None
    make = partial(elementwise.rms_norm, eps=eps, offset=offset)
    return found, x, Again(make, (x.detach(), weight.detach()))


def _mapped(modules: Sequence[Any], x: Tensor, make: Again | None = None) -> Tensor:
    """What maps make of x, side by side: one product, then whatever acts on them and is no low-rank change."""
    held = [as_map(module) for module in modules]
    known = [one for one, _ in held if one is not None]
    if len(known) < len(held):
        return _side_by_side([module(x) for module in modules])
    make = make if on("remake") else None
    found = _side_by_side([maps(x, group, make) for group in _groups(known)])
    if all(is_all for _, is_all in held):
        return found
    parts = zip(modules, held, found.split([len(one.weight) for one in known], -1), strict=True)
    return _side_by_side([part if is_all else module.changed(x, part) for module, (_, is_all), part in parts])


def _known(modules: Sequence[Any]) -> list[Map] | None:
    """Maps with nothing but low-rank changes on them; None where one of them is more."""
    held = [as_map(module) for module in modules]
    return [one for one, _ in held if one is not None] if all(is_all for _, is_all in held) else None


def _groups(known: list[Map]) -> list[list[Map]]:
    """Which maps are one product."""
    return [known] if on("grouped") else [[one] for one in known]


def _product(known: list[Map], x: Tensor, make: Again | None) -> Callable[[], Tensor]:
    """Makes what `_mapped` makes once more, in a backward, where neither route nor switches are those of now."""
    groups, make = _groups(known), make or Again(Tensor.detach, (x.detach(),))

    def product() -> Tensor:
        made = make.make(*make.kept)
        return _side_by_side([maps(made, group) for group in groups])

    return product


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), -1) if len(parts) > 1 else parts[0]


@cache
def _tell(name: str) -> None:
    log.info("%s has no fused blocks here: it runs through the modules of transformers", name)
