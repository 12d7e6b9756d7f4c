"""The policy: losses are exact, documents do not see each other, recomputing and fusing change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from tiny_models import DECODERS, ENCODERS, UNKNOWN, disturb, one_document, tiny_batch, tiny_loaded

from tunesmith.adapt.full import Full
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.core.errors import ConfigError
from tunesmith.models import cross_entropy
from tunesmith.models.cross_entropy import Shaping, fused_losses, plain_losses
from tunesmith.models.policy import Policy

BATCH = tiny_batch((7, 3, 9))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda device: 4)


def own_loss(loaded: object, batch: object) -> torch.Tensor:
    """The loss that transformers computes, document by document, summed over targets."""
    model, total = loaded.model, torch.zeros(())  # type: ignore[attr-defined]
    for index in range(len(batch.lengths)):  # type: ignore[attr-defined]
        part = one_document(batch, index)  # type: ignore[arg-type]
        labels = torch.full_like(part.ids, -100)
        labels[part.sources + 1] = part.targets
        total = total + model(part.ids[None], labels=labels[None]).loss * len(part.targets)
    return total


@pytest.mark.parametrize("family", [*DECODERS, *UNKNOWN])
def test_the_loss_is_that_of_transformers(family: str) -> None:
    """Kills: logits at the target's own place; softcap, logit scale or sliding window forgotten, or one too wide."""
    loaded, reference = tiny_loaded(family), tiny_loaded(family)
    with torch.no_grad():
        ours, theirs = Policy(loaded).token_losses(BATCH), own_loss(reference, BATCH)
    assert ours.dtype == torch.float32
    assert ours.shape == BATCH.targets.shape
    assert float(ours.sum()) == pytest.approx(float(theirs), rel=2e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_the_loss_is_that_of_double_precision_arithmetic(family: str) -> None:
    loaded = tiny_loaded(family)
    policy = Policy(loaded)
    with torch.no_grad():
        hidden = policy.hidden(BATCH)[BATCH.sources].double().numpy()
        losses = policy.token_losses(BATCH).numpy()
    logits = hidden @ loaded.model.get_output_embeddings().weight.detach().double().numpy().T
    logits = logits * policy.shaping.scale
    if policy.shaping.cap is not None:
        logits = policy.shaping.cap * np.tanh(logits / policy.shaping.cap)
    top = logits.max(1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    wanted = total - logits[np.arange(len(logits)), BATCH.targets.numpy()]
    np.testing.assert_allclose(losses, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_packed_documents_are_separate_documents(family: str) -> None:
    """Kills: attention over the whole row; positions that run on."""
    policy = Policy(tiny_loaded(family))
    with torch.no_grad():
        together = policy.hidden(BATCH)
        apart = torch.cat([policy.hidden(one_document(BATCH, index)) for index in range(3)])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_a_document_does_not_notice_its_neighbour(family: str) -> None:
    policy = Policy(tiny_loaded(family))
    other = BATCH.ids.clone()
    other[7:10] = (other[7:10] + 11) % 90 + 3
    with torch.no_grad():
        first, second = policy.hidden(BATCH), policy.hidden(replace(BATCH, ids=other))
    assert torch.equal(first[:7], second[:7])
    assert torch.equal(first[10:], second[10:])
    assert not torch.equal(first[7:10], second[7:10])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "bert", "roberta"])
def test_padded_and_packed_agree(family: str) -> None:
    """A token that looks like padding is not taken for it. Kills: a mask or positions made from pad ids."""
    ids = BATCH.ids.clone()
    ids[2] = ids[12] = int(tiny_loaded(family).config.pad_token_id)
    batch = replace(BATCH, ids=ids)
    with torch.no_grad():
        packed = Policy(tiny_loaded(family)).hidden(batch)
        padded = Policy(tiny_loaded(family), packed=False).hidden(batch)
    torch.testing.assert_close(packed, padded, rtol=0, atol=2e-6)


def gradients(
    family: str, method: LoRA | TopLayers | Full, recompute: Literal["none", "full"] = "none"
) -> dict[str, torch.Tensor]:
    """Gradients of the summed loss of BATCH."""
    loaded = tiny_loaded(family)
    adapter = method.attach(loaded)
    if isinstance(method, LoRA):
        disturb(adapter)
    policy = Policy(loaded, adapter.route, recompute=recompute).train(True)
    torch.manual_seed(0)
    policy.token_losses(BATCH).sum().backward()
    return {name: p.grad.clone() for name, p in adapter.parameters.items() if p.grad is not None}


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], bound: float) -> None:
    assert list(one) == list(two)
    largest = max(float(value.norm()) for value in one.values())
    for name in one:
        assert float((one[name] - two[name]).norm()) <= bound * max(float(one[name].norm()), 0.1 * largest), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", *UNKNOWN])
@pytest.mark.parametrize("method", [LoRA(rank=2, targets=("up", "down"), dropout=0.3), TopLayers(layers=1), Full()])
def test_recomputation_gives_the_same_bits(family: str, method: LoRA | TopLayers | Full) -> None:
    """Dropout included. Kills: a recomputation that draws again or enters no segments."""
    kept, again = gradients(family, method), gradients(family, method, "full")
    assert list(kept) == list(again)
    assert kept
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("shaping", [Shaping(), Shaping(0.3), Shaping(2.0, 1.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_head_is_the_plain_head(shaping: Shaping, bias: bool) -> None:
    """Kills: the softcap's derivative, the scale or the weight of the step left out of the gradient."""
    draw = torch.Generator().manual_seed(3)
    weight, shift = torch.randn(31, 8, generator=draw), torch.randn(31, generator=draw) if bias else None
    targets, factor = torch.randint(31, (11,), generator=draw), torch.rand(11, generator=draw)
    hidden = torch.randn(11, 8, generator=draw)
    found = []
    for fused in (True, False):
        leaf = hidden.clone().requires_grad_()
        if fused:
            losses = fused_losses(leaf, weight, shift, targets, shaping)
        else:
            losses = plain_losses(leaf, lambda x: torch.nn.functional.linear(x, weight, shift), targets, shaping)
        (losses * factor).sum().backward()
        found.append((losses.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_the_fused_head_never_holds_all_logits() -> None:
    """Kills: one chunk for all rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype.is_floating_point:
                Largest.numbers = max(Largest.numbers, result.numel())
            return result

    hidden = torch.randn(40, 4, requires_grad=True)
    with Largest():
        fused_losses(hidden, torch.randn(50, 4), None, torch.zeros(40, dtype=torch.long), Shaping()).sum().backward()
    assert 0 < Largest.numbers <= 4 * 4 * 50  # four times `chunk_rows` where there is room


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_head_with_an_insert_learns(family: str) -> None:
    """Kills: the fused path taken although something acts on the head."""
    found = gradients(family, LoRA(rank=2, targets=("head", "q")))
    assert all(bool(value.any()) for value in found.values())
    assert any(name.startswith("lm_head") for name in found)


def test_full_tuning_has_the_gradients_of_transformers() -> None:
    for family in ("llama", "gemma2", "gpt2"):
        found, reference = gradients(family, Full()), tiny_loaded(family)
        own_loss(reference, BATCH).backward()
        close(found, {n: p.grad for n, p in sorted(reference.model.named_parameters()) if p.grad is not None}, 2e-6)


def test_nothing_below_the_lowest_trainable_place_builds_a_graph() -> None:
    loaded = tiny_loaded("llama")
    adapter = TopLayers(layers=1).attach(loaded)
    below = []
    loaded.model.model.layers[0].register_forward_hook(lambda m, i, output: below.append(output.requires_grad))
    assert Policy(loaded, adapter.route).token_losses(BATCH).requires_grad
    assert below == [False]


def test_logits_are_what_the_losses_come_from() -> None:
    for family in ("gemma2", *UNKNOWN):
        policy = Policy(tiny_loaded(family))
        with torch.no_grad():
            logits = policy.logits(BATCH, BATCH.sources)
            losses = policy.token_losses(BATCH)
        wanted = torch.nn.functional.cross_entropy(logits, BATCH.targets, reduction="none")
        torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)


def test_an_encoder_cannot_learn_text_to_come() -> None:
    with pytest.raises(ConfigError, match="bert is an encoder"):
        Policy(tiny_loaded("bert")).token_losses(BATCH)


def test_a_batch_with_nothing_supervised_has_no_losses() -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert Policy(tiny_loaded("llama")).token_losses(replace(BATCH, sources=none, targets=none)).shape == (0,)


def test_without_segments_attention_is_that_of_transformers() -> None:
    """Padded batches and caches go through sdpa as ever; gemma2's cap holds, which sdpa has not."""
    for family in ("llama", "mistral", "gemma2", "gemma3_text", "bert"):
        loaded, reference = tiny_loaded(family), tiny_loaded(family)
        Policy(loaded)
        ids = torch.arange(3, 17).view(2, 7)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        with torch.no_grad():
            ours, theirs = (m(ids, attention_mask=mask)[0] for m in (loaded.model, reference.model))
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=2e-6)
