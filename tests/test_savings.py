"""Every saving leaves losses and gradients as they are: all families, all methods, each switch alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import CASES, REFUSED, built, model_of
from tiny_models import disturb, tiny_batch, with_exact_norms
from torch import Tensor, nn

from tunesmith.core.errors import ConfigError
from tunesmith.core.switches import SAVINGS, VARIABLE, from_environment, on, without
from tunesmith.kernels.build import library
from tunesmith.models import blocks
from tunesmith.models.policy import Policy
from tunesmith.models.route import Route

# long enough for tiles of 16 and 32 to have edges, short enough for the sliding windows of the tiny models to matter
LENGTHS = (37, 5, 21)
FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
FAMILIES = (*FUSED, "gpt2", "bert", "t5")
# one stands for all where time is short
IN_TURN = ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])]


def learnt(loaded: Any, case: str, recompute: Any = "none", seed: int = 0) -> tuple[float, dict[str, Tensor]]:
    """A loss and its gradients with a disturbed adapter, on a model of which nothing else is asked."""
    batch = tiny_batch(LENGTHS, seed)
    adapter = built(case).attach(loaded, "a", 0)
    if case not in ("full", "lp_ft"):
        disturb(adapter, seed)
    policy = Policy(loaded, Route(("a",)), recompute=recompute).train()
    if loaded.family.kind == "encoder":
        hidden = policy.hidden(batch)
        draw = torch.Generator().manual_seed(0)
        pulled = hidden * torch.randn(hidden.shape, generator=draw).to(hidden)
        loss = torch.nn.functional.softplus(pulled.float()).sum()  # of one sign: a sum near zero has no exact digits
    else:
        loss = policy.token_losses(batch).sum()
    loss.backward()
    found = {name: p.grad.double() for name, p in adapter.parameters.items() if p.grad is not None}
    return float(loss.detach()), found


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of two gradients, relative to the second one's norm."""
    assert found.keys() == exact.keys()
    gap = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return float((gap / sum(float(grad.square().sum()) for grad in exact.values())) ** 0.5)


@pytest.mark.parametrize("family", IN_TURN)
@pytest.mark.parametrize("case", CASES)
def test_all_savings_together_change_nothing_in_fp32(case: str, family: str, tmp_path: Path) -> None:
    if (case.split()[0], family) in REFUSED:
        pytest.skip("the family refuses this method, by name: tests/test_methods.py")
    loss, found = learnt(model_of(family, tmp_path), case)
    with without(*SAVINGS):
        exact_loss, exact = learnt(model_of(family, tmp_path), case)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    if distance(found, exact) > 2e-6:  # most of a gradient may cancel: then neither is near to exact arithmetic
        wide = model_of(family, tmp_path, dtype=torch.float64)
        wide.model.load_state_dict(model_of(family, tmp_path).model.state_dict())
        _, widest = learnt(with_exact_norms(wide), case)
        assert distance(exact, widest) > 2e-6
        assert distance(found, widest) <= 1.1 * distance(exact, widest)


@pytest.mark.parametrize("family", IN_TURN)
@pytest.mark.parametrize("case", ["lora", "full", "bitfit", "adapter"])
def test_in_bf16_savings_are_as_near_to_exact_arithmetic_as_the_plain_path(
    case: str, family: str, tmp_path: Path
) -> None:
    """Over several draws: on one, either may be the luckier."""
    errors = []
    for seed in range(4):
        narrow, narrow_too = (model_of(family, tmp_path, dtype=torch.bfloat16) for _ in range(2))
        wide = model_of(family, tmp_path, dtype=torch.float64)
        wide.model.load_state_dict(narrow.model.state_dict())  # the numbers of all three are bfloat16's
        exact_loss, exact = learnt(wide, case, seed=seed)
        loss, found = learnt(narrow, case, seed=seed)
        with without(*SAVINGS):
            plain_loss, plain = learnt(narrow_too, case, seed=seed)
        errors.append((distance(found, exact), distance(plain, exact), loss - exact_loss, plain_loss - exact_loss))
    ours, plains, our_loss, plain_losses = (math.hypot(*column) for column in zip(*errors, strict=True))
    assert ours <= 1.1 * plains
    assert our_loss <= 1.5 * plain_losses + 1e-3 * abs(exact_loss)


@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_each_saving_alone_can_be_switched_off(saving: str, recompute: str, tmp_path: Path) -> None:
    loss, found = learnt(model_of("llama", tmp_path), "lora", recompute)
    with without(saving):
        assert not on(saving)
        exact_loss, exact = learnt(model_of("llama", tmp_path), "lora", recompute)
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    assert distance(found, exact) <= 2e-6


_ROPE = {"rope_type": "default", "rope_theta": 100.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a window in some layers": (
        "qwen3",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "use_sliding_window": True},
    ),
    "biases": ("qwen3", {"attention_bias": True}),
    "heads that are turned in part, a window": (
        "phi3", {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}, "sliding_window": 6}
    ),
    "no caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "another factor of scores": ("gemma2", {"query_pre_attn_scalar": 3}),
    "bases far apart": (
        "gemma3_text", {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE | {"rope_theta": 1e7}}}
    ),
    "a cap that attention does not ask for": ("gemma3_text", {"attn_logit_softcapping": 0.5}),
}  # fmt: skip


@pytest.mark.skipif(library() is None, reason="fused blocks need the compiled kernels, and there is no C compiler here")
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_config_says_of_a_family_is_done_in_fused_blocks(variant: str, tmp_path: Path) -> None:
    """Kills: one rotary table for all layers; a window, a cap or a factor taken from somewhere else."""
    family, changes = VARIANTS[variant]
    loaded = model_of(family, tmp_path, **changes)
    assert blocks.fits(loaded.model)
    loss, found = learnt(loaded, "full")
    with without(*SAVINGS):
        exact_loss, exact = learnt(model_of(family, tmp_path, **changes), "full")
        plain_loss, _ = learnt(model_of(family, tmp_path), "full")
    assert loss == pytest.approx(exact_loss, rel=1e-6)
    assert distance(found, exact) <= 2e-6
    same = variant == "a cap that attention does not ask for"
    assert (exact_loss == plain_loss) == same  # or the variant would show nothing


@pytest.mark.skipif(library() is None, reason="fused blocks need the compiled kernels, and there is no C compiler here")
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_like_families_run_through_fused_blocks(family: str, tmp_path: Path) -> None:
    loaded = model_of(family, tmp_path)
    assert blocks.fits(loaded.model) == (family in FUSED)


WATCH = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "anywhere": lambda _: nn.modules.module.register_module_forward_hook(lambda *_: None),
}


@pytest.mark.skipif(library() is None, reason="fused blocks need the compiled kernels, and there is no C compiler here")
@pytest.mark.parametrize("watch", WATCH.values(), ids=WATCH)
@pytest.mark.parametrize(
    "place", ["layers.1", "layers.0.self_attn", "layers.1.mlp.act_fn", "layers.0.self_attn.q_proj"]
)
def test_a_hook_is_noticed_whenever_it_comes_and_wherever_it_is(place: str, watch: Any, tmp_path: Path) -> None:
    """Kills: an answer that is kept while a hook or a module comes; a module that a port stands for, not asked."""
    loaded = model_of("llama", tmp_path)
    base = loaded.model.base_model
    module = base.get_submodule(place)
    built("lora").attach(loaded, "a", 0)  # a port stands at q_proj
    for one in (module, base.get_submodule(place)):
        assert blocks.fits(loaded.model)
        hook = watch(one)
        assert not blocks.fits(loaded.model)
        hook.remove()
    assert blocks.fits(loaded.model)
    fresh = nn.SiLU()
    hook = watch(fresh)
    base.layers[1].mlp.act_fn = fresh
    assert not blocks.fits(loaded.model)
    hook.remove()


@pytest.mark.skipif(library() is None, reason="fused blocks need the compiled kernels, and there is no C compiler here")
@pytest.mark.parametrize("kind", ["forward", "forward pre"])
def test_a_hook_on_what_a_port_stands_for_is_called(kind: str, tmp_path: Path) -> None:
    """Kills: a base's weight multiplied by the port in its place."""
    loaded = model_of("llama", tmp_path)
    seen: list[str] = []
    module = loaded.model.base_model.layers[0].self_attn.q_proj
    adapter = built("lora").attach(loaded, "a", 0)
    register = module.register_forward_hook if kind == "forward" else module.register_forward_pre_hook
    register(lambda *_: seen.append(kind))
    Policy(loaded, adapter.route).token_losses(tiny_batch(LENGTHS)).sum().backward()
    assert seen == [kind]


@pytest.mark.skipif(library() is None, reason="fused blocks need the compiled kernels, and there is no C compiler here")
def test_nothing_below_the_lowest_trainable_place_builds_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = model_of("llama", tmp_path)
    adapter = built("top_layers").attach(loaded, "a", 0)
    seen: list[bool] = []
    plain = blocks._block

    def watched(*args: Any) -> Any:
        seen.append(args[2].requires_grad)
        return plain(*args)

    monkeypatch.setattr(blocks, "_block", watched)
    Policy(loaded, adapter.route).token_losses(tiny_batch(LENGTHS)).sum().backward()
    assert seen == [False, False]  # what goes into the lower block, and into the one that trains


def test_a_saving_that_does_not_exist_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "attention,trimm")
    from_environment.cache_clear()
    with pytest.raises(ConfigError, match=r"trimm.*trim"):
        on("attention")
