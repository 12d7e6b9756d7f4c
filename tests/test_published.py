"""Methods against the formulas of their papers, written again in float64, and against published counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IDS, TinyLoaded, answers, disturb, tiny_batch, tiny_loaded
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.bitfit import BitFit
from tunesmith.adapt.bottleneck import Bottleneck
from tunesmith.adapt.fpt import FPT
from tunesmith.adapt.linear_probe import LinearProbe
from tunesmith.adapt.method import Method
from tunesmith.adapt.subspace import Subspace
from tunesmith.core.errors import ConfigError
from tunesmith.models.families import family_of
from tunesmith.models.policy import Policy
from tunesmith.models.route import Route

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "relu": lambda h: h.clamp(min=0),
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "tanh": torch.tanh,
}


def attached(method: Method, family: str = "gpt2", size: float = 0.2) -> tuple[TinyLoaded, dict[str, Tensor]]:
    """A float64 model with an adapter that says something, and the adapter's numbers in float64."""
    loaded = tiny_loaded(family, dtype=torch.float64)
    adapter = method.attach(loaded)
    disturb(adapter, size=size)
    return loaded, {name: value.detach().double() for name, value in adapter.parameters.items()}


class Plain:
    """GPT-2 in float64 as its papers have it, with a function at every place where a method acts."""

    def __init__(self, loaded: TinyLoaded) -> None:
        self.state = {name: value.double() for name, value in loaded.model.state_dict().items()}
        self.heads, self.width = loaded.config.n_head, loaded.config.n_embd
        self.at: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}

    def place(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.at[name](x, y) if name in self.at else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return self.place(name, unit, unit * self.state[f"{name}.weight"] + self.state[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return self.place(name, x, x @ self.state[f"{name}.weight"] + self.state[f"{name}.bias"])

    def attention(self, name: str, x: Tensor) -> Tensor:
        q, k, v = self.linear(f"{name}.c_attn", x).split(self.width, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in (q, k, v))  # heads tokens d_head
        scores = q @ k.mT / q.shape[-1] ** 0.5
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        return self.linear(f"{name}.c_proj", mixed.transpose(0, 1).flatten(-2))

    def __call__(self, ids: Tensor) -> Tensor:
        x = self.state["transformer.wte.weight"][ids] + self.state["transformer.wpe.weight"][: len(ids)]
        x = self.place("embed", ids, x)
        for block in ("transformer.h.0", "transformer.h.1"):
            x = x + self.attention(f"{block}.attn", self.norm(f"{block}.ln_1", x))
            read = self.norm(f"{block}.ln_2", x)
            inner = self.linear(f"{block}.mlp.c_fc", read)
            inner = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
            x = x + self.place(f"{block}.mlp", read, self.linear(f"{block}.mlp.c_proj", inner))
        x = self.norm("transformer.ln_f", x)
        return self.place("head", x, x @ self.state["lm_head.weight"].T)


def same(loaded: TinyLoaded, plain: Plain) -> None:
    found, wanted = answers(loaded)[0], plain(IDS[0])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_plain_model_is_the_model() -> None:
    loaded = tiny_loaded("gpt2", dtype=torch.float64)
    same(loaded, Plain(loaded))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("style", ["houlsby", "lin", "pfeiffer", "parallel"])
def test_adapters_are_those_of_their_papers(style: str, activation: str) -> None:
    """Kills: a missing residual, bias or norm; a pair that stands or reads elsewhere; another activation."""
    loaded, own = attached(Bottleneck(style=style, size=5, activation=activation))
    act, plain = ACTIVATIONS[activation], Plain(tiny_loaded("gpt2", dtype=torch.float64))

    def pair(path: str) -> Callable[[Tensor], Tensor]:
        down, d, up, u = (own[f"{path}.{name}"] for name in "DdUu")
        return lambda h: act(h @ down.T + d) @ up.T + u

    for block in ("transformer.h.0", "transformer.h.1"):
        last = f"{block}.mlp.c_proj"
        inner = pair(f"{last}.down")
        if style == "houlsby":
            after = pair(f"{block}.attn.c_proj.o")
            plain.at[f"{block}.attn.c_proj"] = lambda x, y, after=after: y + after(y)
        if style == "parallel":
            plain.at[f"{block}.mlp"] = lambda x, y, inner=inner: y + inner(x)
        elif style == "lin":
            gain, bias = own[f"{last}.down.gain"], own[f"{last}.down.bias"]

            def normed(x: Tensor, y: Tensor, inner: Any = inner, gain: Tensor = gain, bias: Tensor = bias) -> Tensor:
                unit = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
                return y + inner(unit * gain + bias)

            plain.at[last] = normed
        else:
            plain.at[last] = lambda x, y, inner=inner: y + inner(y)
    same(loaded, plain)


def test_bitfit_moves_every_bias_of_blocks_and_norms() -> None:
    """Kills: a bias that is added before the map, left out, or counted twice."""
    loaded, own = attached(BitFit())
    plain = Plain(tiny_loaded("gpt2", dtype=torch.float64))
    biases = {name for name in plain.state if name.endswith(".bias") and plain.state[name].dim() == 1}
    moved = {f"{name.rsplit('.', 2)[0]}.bias": value for name, value in own.items()}
    assert moved.keys() == biases
    for name, value in moved.items():
        plain.state[name] = plain.state[name] + value
    same(loaded, plain)


def test_bitfit_says_where_it_adds_biases_to_a_model_without(caplog: pytest.LogCaptureFixture) -> None:
    """Kills: biases at norms or at the head of a model that has none."""
    with caplog.at_level("INFO"):
        loaded = tiny_loaded("llama")
        adapter = BitFit().attach(loaded)
    assert [record.message for record in caplog.records] == [
        "tiny-llama has no biases: bitfit adds zero biases to the 14 maps of its blocks"
    ]
    assert {name.split(".")[-3] for name in adapter.parameters} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    some = BitFit().attach(tiny_loaded("qwen2"))
    assert {name.split(".")[-3] for name in some.parameters} == {"q_proj", "k_proj", "v_proj"}, "those that are there"


def test_fpt_moves_norms_and_the_layers_at_both_ends() -> None:
    """Kills: a gain that is multiplied twice; a head that follows the embedding it was tied to."""
    loaded, own = attached(FPT())
    plain = Plain(tiny_loaded("gpt2", dtype=torch.float64))
    norms = [name.removesuffix(".weight") for name in plain.state if ".ln_" in name and name.endswith("weight")]
    for name in norms:
        for leaf in ("weight", "bias"):
            plain.state[f"{name}.{leaf}"] = plain.state[f"{name}.{leaf}"] + own.pop(f"{name}.norm.{leaf}")
    plain.state["transformer.wte.weight"] = plain.state["transformer.wte.weight"] + own.pop(
        "transformer.wte.embed.weight"
    )
    plain.state["lm_head.weight"] = plain.state["lm_head.weight"] + own.pop("lm_head.head.weight")
    assert own == {}
    same(loaded, plain)


@pytest.mark.parametrize("family", ["llama", "gemma", "cohere", "olmo2", "qwen3", "bert", "t5"])
def test_a_moved_norm_is_the_norm_with_moved_parameters(family: str) -> None:
    """Kills: gemma's gain of 1 + w taken for w; a bias that a norm does not have."""
    loaded = tiny_loaded(family)
    adapter = FPT(layers=()).attach(loaded)
    disturb(adapter)
    said = answers(loaded)
    moved = tiny_loaded(family)
    with torch.no_grad():
        for name, value in adapter.parameters.items():
            path, _, leaf = name.rsplit(".", 2)
            moved.model.get_submodule(path)._parameters[leaf].add_(value)
    torch.testing.assert_close(answers(moved), said, rtol=1e-4, atol=1e-4)


def test_small_gains_act_in_bfloat16() -> None:
    """A change of a thousandth at a gain of one is less than bfloat16 can write. Kills: w + g rounded to that."""
    loaded = tiny_loaded("llama", dtype=torch.bfloat16)
    adapter = FPT(layers=()).attach(loaded)
    port, _, insert = adapter.inserts()[0]
    with torch.no_grad():
        insert["weight"].fill_(1e-3)
    x = torch.linspace(-3, 3, 64, dtype=torch.bfloat16).view(2, 32)
    wanted = 1e-3 * x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(insert.method.delta(insert, x, port.base(x)).float(), wanted, rtol=1e-2, atol=1e-5)


def test_a_linear_probe_is_the_head_alone() -> None:
    loaded, own = attached(LinearProbe())
    plain = Plain(tiny_loaded("gpt2", dtype=torch.float64))
    plain.state["lm_head.weight"] = plain.state["lm_head.weight"] + own["lm_head.head.W"]
    same(loaded, plain)


# a random subspace


def matrices(adapter: Adapter) -> Tensor:
    """All weights that an adapter adds, in one vector."""
    found = [insert.method.weight(insert) for _, _, insert in adapter.inserts()]
    return torch.cat([one.flatten() for one in found if one is not None])


def projection_of(adapter: Adapter) -> Tensor:
    """P, column by column: [weights, dimension]."""
    [z] = adapter.parameters.values()
    columns = []
    for place in range(z.numel()):
        with torch.no_grad():
            z.zero_()[place] = 1
        columns.append(matrices(adapter))
    return torch.stack(columns, 1)


def test_a_subspace_is_a_fixed_orthogonal_projection() -> None:
    """W - W0 = P z with P'P diagonal and of about one. Kills: parts that repeat each other, a P that trains."""
    loaded = tiny_loaded("llama")
    adapter = Subspace(dimension=40).attach(loaded, seed=5)
    [z] = adapter.parameters.values()
    projection = projection_of(adapter)
    gram = projection.T @ projection
    assert torch.equal(gram, gram.diag().diag())
    assert (gram.diag() - 1).abs().max() < 0.25
    assert (
        len({insert.method.weight(insert).flatten()[:64].numpy().tobytes() for _, _, insert in adapter.inserts()}) == 14
    )
    with torch.no_grad():
        z.normal_()
    torch.testing.assert_close(matrices(adapter), projection @ z.detach(), rtol=1e-6, atol=1e-6)
    positive = (projection > 0).sum() / (projection != 0).sum()
    assert 0.45 < positive < 0.55


def test_the_gradient_of_a_subspace_is_the_projection_of_the_weights_gradient() -> None:
    """Kills: a backward pass that draws another projection than the forward."""
    loaded = tiny_loaded("gpt2", dtype=torch.float64)
    adapter = Subspace(dimension=30).attach(loaded)
    [z] = adapter.parameters.values()
    disturb(adapter, size=0.01)
    loaded.model(input_ids=IDS).logits.pow(2).mean().backward()
    plain = tiny_loaded("gpt2", dtype=torch.float64)
    for port, _, insert in adapter.inserts():
        plain.model.get_submodule(port.path).weight.data += insert.method.weight(insert).T  # a Conv1D's is flipped
    plain.model(input_ids=IDS).logits.pow(2).mean().backward()
    gradients = [plain.model.get_submodule(port.path).weight.grad.T.flatten() for port, _, _ in adapter.inserts()]
    wanted = torch.cat(gradients).float() @ projection_of(adapter)
    torch.testing.assert_close(z.grad, wanted, rtol=1e-4, atol=1e-7)


def test_the_projection_follows_from_the_seed() -> None:
    first, second, other = (Subspace(dimension=20).attach(tiny_loaded("llama"), seed=seed) for seed in (1, 1, 2))
    for adapter in (first, second, other):
        disturb(adapter)
    assert torch.equal(matrices(first), matrices(second))
    assert not torch.equal(matrices(first), matrices(other))
    with pytest.raises(ConfigError, match="is more than the"):
        Subspace(dimension=10**6).attach(tiny_loaded("llama"))


# the parallel style hears what its own rows are


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_a_parallel_adapter_survives_recomputation_and_company(family: str) -> None:
    """Rows that have it alone and with another. Kills: the last rows heard taken for all, or for the first."""
    loaded = tiny_loaded(family)
    adapters = [Bottleneck(style="parallel", size=4).attach(loaded, name, seed) for seed, name in enumerate("ab")]
    for seed, adapter in enumerate(adapters):
        disturb(adapter, seed, 0.3)
        for value in adapter.parameters.values():
            value.requires_grad_(True)
    batch = tiny_batch((7, 3, 9, 5))
    route = Route.of_rows(("a",), ("a", "b"), ("b", "a"), ("b",))
    found = []
    for recompute in ("none", "full", "full"):
        policy = Policy(loaded, route, recompute=recompute)
        policy.hidden(batch).pow(2).mean().backward()
        found.append([value.grad.clone() for one in adapters for value in one.parameters.values()])
        for adapter in adapters:
            for value in adapter.parameters.values():
                value.grad = None
    assert all(torch.equal(one, again) for others in found[1:] for one, again in zip(found[0], others, strict=True))


def test_a_pass_that_was_broken_off_leaves_nothing_behind() -> None:
    """Kills: an activation of an interrupted pass that the next one takes for its own."""
    loaded = tiny_loaded("llama")
    disturb(Bottleneck(style="parallel", size=4).attach(loaded), size=0.3)
    said = answers(loaded)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = loaded.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loaded.model(input_ids=IDS[:, :-3])
    hook.remove()
    assert torch.equal(answers(loaded), said)


# published counts, on the meta device


def bare(**sizes: Any) -> TinyLoaded:
    config = GPT2Config(**sizes)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    return TinyLoaded(model, Path(), "gpt", family_of(config), "", config)


GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}


@pytest.mark.parametrize(
    ("sizes", "method", "count"),
    [
        (GPT3, Bottleneck(size=1), 7_078_080),
        (GPT3, Bottleneck(size=8), 40_109_568),
        (GPT3, BitFit(), 12_988_416),
        (MEDIUM, Bottleneck(style="lin", size=6), 368_784),
        (MEDIUM, Bottleneck(style="lin", size=224), 11_089_152),
        (MEDIUM, Bottleneck(style="pfeiffer", size=6, skip_layers=4), 20 * (2 * 1024 * 6 + 6 + 1024)),
        (MEDIUM, FPT(layers=()), 49 * 2 * 1024),
        (MEDIUM, FPT(), 49 * 2 * 1024 + 2 * 50257 * 1024),
        (MEDIUM, LinearProbe(), 50257 * 1024),
        (GPT3, Subspace(dimension=1234), 1234),
    ],
)  # fmt: skip
def test_counts_are_those_of_the_papers(sizes: dict[str, int], method: Method, count: int) -> None:
    """Kills: a bias, a norm or a block too many or too few."""
    assert sum(value.numel() for value in method.attach(bare(**sizes)).parameters.values()) == count


def test_adapter_drop_leaves_some_block() -> None:
    """Of an encoder-decoder, blocks are counted on each side. Kills: the decoder's lowest taken for the third."""
    with pytest.raises(ConfigError, match="2 leaves none of the 2 blocks"):
        Bottleneck(skip_layers=2).attach(tiny_loaded("llama"))
    with pytest.raises(ConfigError, match=r"method\.skip_layers"):
        Bottleneck(skip_layers=24).check({"n_layer": 24, "model_type": "gpt2"})
    kept = {name.split(".layer.")[0] for name in Bottleneck(skip_layers=1).attach(tiny_loaded("t5")).parameters}
    assert kept == {"encoder.block.1", "decoder.block.1"}
