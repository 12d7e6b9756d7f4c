"""States of frozen blocks that are kept: the same losses, blocks that do not run again, and runs that may break."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DECODERS, ENCODERS, TinyLoaded, disturb, tiny_batch, tiny_loaded
from torch import Tensor

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.bitfit import BitFit
from tunesmith.adapt.bottleneck import Bottleneck
from tunesmith.adapt.full import Full
from tunesmith.adapt.linear_probe import LinearProbe
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.method import Method
from tunesmith.adapt.prompt import Prompt
from tunesmith.adapt.top_layers import TopLayers
from tunesmith.core.problem import Problem
from tunesmith.kernels import products
from tunesmith.models import blocks
from tunesmith.models.inputs import documents
from tunesmith.models.kept import Kept
from tunesmith.models.policy import Policy
from tunesmith.models.targets import block_paths
from tunesmith.models.trunk import Trunk, frozen_blocks

pytestmark = pytest.mark.slow

BATCHES = tiny_batch((37, 5, 21)), tiny_batch((12, 20), seed=1)
PLENTY = 10**9
FAMILIES = [family for family in (*DECODERS, *ENCODERS) if family not in ("granite", "cohere")]


def losses_and_gradients(adapter: Adapter, policy: Policy, batch: Any) -> tuple[float, dict[str, Tensor]]:
    for parameter in adapter.parameters.values():
        parameter.grad = None
    if adapter.head is not None:
        loss = torch.nn.functional.softplus(policy.scores(batch)).sum()
    elif policy.family.kind == "encoder":
        hidden = policy.hidden(batch)
        draw = torch.Generator().manual_seed(0)
        loss = torch.nn.functional.softplus(hidden * torch.randn(hidden.shape, generator=draw).to(hidden)).sum()
    else:
        loss = policy.token_losses(batch).sum()
    loss.backward()
    found = {name: value.grad.clone() for name, value in adapter.parameters.items() if value.grad is not None}
    return float(loss.detach()), found


def assert_equal(found: tuple[float, dict[str, Tensor]], plain: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    assert found[1].keys() == plain[1].keys()
    largest = max(float(grad.norm()) for grad in plain[1].values())
    for name, grad in plain[1].items():
        assert float((found[1][name] - grad).norm()) <= 2e-6 * max(float(grad.norm()), 0.1 * largest), name


@contextmanager
def counted(loaded: TinyLoaded, calls: list[int]) -> Iterator[None]:
    """Notes the number of every block that runs, fused or not."""
    held = [loaded.model.get_submodule(path) for path in block_paths(loaded.model, loaded.family)]
    with pytest.MonkeyPatch.context() as patch:
        plain = blocks._block

        def fused(shape: Any, layer: Any, *args: Any) -> Any:
            calls.append(held.index(layer))
            return plain(shape, layer, *args)

        patch.setattr(blocks, "_block", fused)
        kind = type(held[0])
        forward = kind.forward

        def module(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(held.index(self))
            return forward(self, *args, **kwargs)

        patch.setattr(kind, "forward", module)
        yield


def three_epochs(loaded: TinyLoaded, method: Method, folder: Path, packed: bool = True, **options: Any) -> list[int]:
    """Checks losses and gradients of three epochs against those of a policy that keeps nothing; blocks of the last."""
    adapter = method.attach(loaded, "a")
    if method.kind != "full":
        disturb(adapter)
    policy = Policy(loaded, adapter.route, packed=packed).train()
    plain = [losses_and_gradients(adapter, policy, batch) for batch in BATCHES]
    policy.trunk = Trunk(loaded, folder / "cache", options.get("budget", PLENTY))
    calls: list[int] = []
    for _ in range(3):
        calls.clear()
        for batch, wanted in zip(BATCHES, plain, strict=True):
            with counted(loaded, calls):
                found = losses_and_gradients(adapter, policy, batch)
            assert_equal(found, wanted)
    policy.trunk.close()
    return calls


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_layers_learn_the_same_and_the_blocks_below_run_once(family: str, packed: bool, tmp_path: Path) -> None:
    """Kills: states of another document, or of another place in the batch; a trunk that runs all the same."""
    assert three_epochs(tiny_loaded(family), TopLayers(layers=1), tmp_path, packed) == [1, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_is_restricted_to_upper_blocks_learns_the_same(family: str, tmp_path: Path) -> None:
    place = {"llama": r".*layers\.1\..*q_proj", "gpt2": r".*h\.1\.mlp\.c_fc", "bert": r".*layer\.1\..*query"}[family]
    assert three_epochs(tiny_loaded(family), LoRA(rank=2, targets=(place,)), tmp_path / "lora") == [1, 1]
    assert three_epochs(tiny_loaded(family), Bottleneck(size=3, skip_layers=1), tmp_path / "pairs") == [1, 1]


def test_a_head_alone_runs_no_block_again(tmp_path: Path) -> None:
    """Kills: a last norm that is left out or applied twice; states that are not picked where they are wanted."""
    assert three_epochs(tiny_loaded("llama"), LinearProbe(), tmp_path / "llama") == []
    for family in ("bert", "llama", "deberta-v2"):
        loaded = tiny_loaded(family)
        loaded.predicts = Problem("classes", ("a", "b", "c"))
        assert three_epochs(loaded, LinearProbe(), tmp_path / family) == []


def test_documents_that_share_beginnings_still_do_above(tmp_path: Path) -> None:
    """Kills: states of tokens that are not computed."""
    batch = tiny_batch((40, 40, 30))
    ids = batch.ids.clone()
    ids[40:70] = ids[80:110] = ids[:30]
    batch = replace(batch, ids=ids, targets=ids[batch.sources + 1])
    loaded = tiny_loaded("llama")
    adapter = TopLayers(layers=1).attach(loaded)
    policy = Policy(loaded, adapter.route).train()
    plain = losses_and_gradients(adapter, policy, batch)
    policy.trunk = Trunk(loaded, tmp_path, PLENTY)
    for _ in range(2):
        assert_equal(losses_and_gradients(adapter, policy, batch), plain)


@pytest.mark.skipif(not products.fast(torch.bfloat16), reason="only our own products compute rows by themselves")
def test_where_kernels_compute_rows_by_themselves_documents_run_together(tmp_path: Path) -> None:
    """Kills: a bound below which another kernel runs; states that depend on what stands beside them."""
    loaded = tiny_loaded("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96)
    even = blocks.even_from(loaded.model)
    assert even == 32  # 32 tokens x 32 x 64 of the smallest map are as many as the kernel wants
    batch = tiny_batch((41, 32, 31, 77, 33))
    policy = Policy(loaded, TopLayers(layers=1).attach(loaded).route).train()
    policy.trunk = Trunk(loaded, tmp_path / "one", PLENTY)
    calls: list[int] = []
    with counted(loaded, calls):
        policy.token_losses(batch)
    assert calls.count(0) == 3  # the first document alone, those that are long enough, the other one
    together = by_length(policy.trunk)
    assert together.keys() == set(batch.lengths)
    for row, length in enumerate(batch.lengths):
        policy.trunk = Trunk(loaded, tmp_path / str(row), PLENTY)
        policy.hidden(documents(batch, [row])[0])
        assert torch.equal(by_length(policy.trunk)[length], together[length])


def by_length(trunk: Trunk) -> dict[int, Tensor]:
    """What a trunk keeps, by how long documents are."""
    file = trunk.kept
    assert file is not None
    found = {}
    for key, (_, tokens) in list(file.places.items()):
        found[tokens] = torch.empty(tokens, file.width, dtype=file.dtype)
        assert file.read(key, found[tokens])
    trunk.close()
    return found


def test_the_budget_is_kept_and_the_rest_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Kills: a file that outgrows its budget; a row that is left out."""
    caplog.set_level(logging.INFO)
    budget = 10_000
    assert 0 in three_epochs(tiny_loaded("llama"), TopLayers(layers=1), tmp_path, budget=budget)
    assert budget / 2 < (tmp_path / "cache" / "trunk.bin").stat().st_size <= budget
    told = "the lower 1 of 2 blocks are frozen: their states are kept on disk, at most 10.0 kB"
    assert [record.message for record in caplog.records].count(told) == 1
    assert sum("is used up" in record.message for record in caplog.records) == 1


def test_a_full_disk_ends_the_writing_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kills: a run that ends for want of a cache; half a record that is read."""
    calls = [0]
    plain = os.pwrite

    def full(handle: int, data: Any, place: int) -> int:
        calls[0] += 1
        if calls[0] == 3:
            return plain(handle, data[:100], place)  # a disk gives what it has left
        if calls[0] > 3:
            raise OSError(errno.ENOSPC, "full")
        return plain(handle, data, place)

    monkeypatch.setattr(os, "pwrite", full)
    assert 0 in three_epochs(tiny_loaded("llama"), TopLayers(layers=1), tmp_path)
    assert calls[0] == 4
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{tmp_path}/cache/trunk.bin: the disk is full; the run goes on, and no more states are kept"
    ]


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    assert 0 in three_epochs(tiny_loaded("llama"), TopLayers(layers=1), tmp_path)


@pytest.mark.parametrize(
    ("method", "changes", "why"),
    [
        (Full(), {}, "model.embed_tokens trains"),
        (BitFit(), {"attention_bias": True}, "model.layers.0.self_attn.q_proj"),
        (LoRA(rank=2), {}, "model.layers.0.self_attn.q_proj"),
        (Prompt(length=2), {}, "model.embed_tokens has an adapter"),
        (TopLayers(layers=2), {}, "model.layers.0.self_attn.q_proj trains"),
        (TopLayers(layers=1), {"attention_dropout": 0.1}, "model.layers.0.self_attn drops out"),
    ],
)
def test_what_changes_from_step_to_step_is_not_kept(method: Method, changes: Any, why: str) -> None:
    """Kills: states that a moving weight or a dropout has made."""
    loaded = tiny_loaded("llama", **changes)
    method.attach(loaded)
    loaded.model.train()
    found, told = frozen_blocks(loaded.model, loaded.family)
    assert found == 0
    assert why in told


def test_an_encoder_decoder_is_left_alone() -> None:
    loaded = tiny_loaded("t5")
    LinearProbe().attach(loaded)
    assert frozen_blocks(loaded.model, loaded.family)[0] == 0


def test_an_evaluation_keeps_nothing(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama")
    policy = Policy(loaded, TopLayers(layers=1).attach(loaded).route).train(False)
    policy.trunk = Trunk(loaded, tmp_path / "cache", PLENTY)
    policy.token_losses(BATCHES[0])
    assert not (tmp_path / "cache").exists()


# the file


def kept(path: Path, budget: int = PLENTY, **facts: Any) -> Kept:
    return Kept(path, budget, facts, 4, torch.bfloat16)


def test_the_file_gives_back_what_was_kept_and_nothing_that_is_damaged(tmp_path: Path) -> None:
    """Kills: a reader that trusts the disk; a cut-off record that hides those before it, or those to come."""
    path = tmp_path / "states"
    states = {bytes([n]) * 16: torch.randn(n + 1, 4).bfloat16() for n in range(4)}
    first = kept(path, a=1)
    for key, value in states.items():
        first.write(key, value)
    first.close()

    def there(file: Kept) -> list[bool]:
        outs = {key: torch.empty_like(value) for key, value in states.items()}
        found = [file.read(key, out) for key, out in outs.items()]
        assert all(torch.equal(out, states[key]) for (key, out), hit in zip(outs.items(), found, strict=True) if hit)
        return found

    whole = path.read_bytes()
    assert there(kept(path, a=1)) == [True] * 4
    path.write_bytes(whole[:-1])
    cut = kept(path, a=1)
    assert there(cut) == [True, True, True, False]
    cut.write(bytes([3]) * 16, states[bytes([3]) * 16])
    assert path.read_bytes() == whole
    for place in range(len(first.begun), len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        assert there(kept(path, a=1)).count(False) >= 1
    path.write_bytes(whole)
    assert there(kept(path, a=2)) == [False] * 4
    path.write_bytes(whole)
    assert there(kept(path, budget=len(whole) - 1, a=1)) == [False] * 4
