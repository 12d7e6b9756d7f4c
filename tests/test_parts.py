"""Layouts in which a process holds a part of the model compute what one process does, and send what is planned."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import in_parts
import pytest
import torch
from in_parts import CASES, CUTS, LOW, STEPS, TABLE, TRAINED, Case, gradients, made, trained
from safetensors.torch import load_file
from several import METHODS, launch, steps

from tunesmith.core.switches import SAVINGS, without
from tunesmith.data.pack import Cursor
from tunesmith.parallel import limits
from tunesmith.parallel.layout import LayoutSection, Single
from tunesmith.parallel.world import ALONE
from tunesmith.plan.memory import count_memory, tensor_specs
from tunesmith.plan.parts import PartsSpread
from tunesmith.plan.spread import Spread

pytestmark = pytest.mark.slow
# of methods that are there, what a layout cannot do
REFUSED = {
    "adapter parallel, tensor": "method.style",
    "lora dora, tensor": "method.dora",
    "top_layers, pipeline": "process 0 of the pipeline would have nothing to train",
}
NAMED = {name: case for held in CASES.values() for name, case in held.items()}
EACH = [(name, method) for name, case in NAMED.items() for method in case.methods]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a launch of two and one of four processes leave."""
    found = tmp_path_factory.mktemp("parts")
    for size in CASES:
        for process in launch(found, size, script=in_parts.__file__):
            _, said = process.communicate(timeout=600)
            assert process.returncode == 0, said
    return found


def alone(case: Case) -> Case:
    """The same in one process."""
    return replace(case, section=LayoutSection(), recompute="none")


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, case in NAMED.items() for method in case.methods]
)
def test_gradients_norms_and_losses_are_those_of_one_process(folder: Path, name: str, method: str) -> None:
    """Kills: a tied weight's gradient of one end only; a norm that counts a whole tensor on every part; a filled-up
    micro-batch that teaches; a gradient of a factor that is not added up."""
    wanted = gradients(ALONE, alone(NAMED[name]), method)
    found = load_file(folder / f"gradients-{name}-{method}.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        error = torch.linalg.vector_norm((found[key] - value).double()) / torch.linalg.vector_norm(value.double())
        assert error < 1e-6, (key, float(error))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_ends_with_the_weights_of_one_process_also_when_that_goes_on(
    folder: Path, tmp_path: Path, name: str, method: str
) -> None:
    """Kills: a checkpoint whose parts are put together in another order; moments of another part."""
    case = alone(NAMED[name])
    _, wanted = trained(ALONE, case, method, tmp_path / "one")
    found = load_file(folder / f"weights-{name}-{method}.safetensors")
    _, gone_on = trained(ALONE, case, method, folder / f"{name}-{method}-begun", resume=True)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value.detach().float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(gone_on[key].detach().float(), value.detach().float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LOW)
def test_in_bf16_parts_are_about_as_near_to_exact_arithmetic_as_one_process(
    folder: Path, name: str, method: str
) -> None:
    """Kills: sums of parts that round once more than the parts; gradients of micro-batches that add up in bf16."""
    one = Case(LayoutSection(), low=True)
    exact = gradients(ALONE, replace(one, exact=True), method)
    # blocks under tensor parallelism run as transformers has them, whose sums are rounded more often
    with without(*SAVINGS) if LOW[name].section.tensor > 1 else nullcontext():
        plain = gradients(ALONE, one, method)
    found = load_file(folder / f"gradients-{name}-{method}.safetensors")
    assert distance(found, exact) <= 1.1 * distance(plain, exact)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of gradients alone, each as a share of its own norm, together."""
    names = [name for name in wanted if name.rpartition("/")[2] not in ("rows", "loss", "norm")]
    far = [(found[name].double() - wanted[name].double()).norm() / wanted[name].double().norm() for name in names]
    return float(torch.stack(far).norm())


def test_every_method_is_exact_in_both_cuts_or_refused_by_name(folder: Path) -> None:
    """Kills: what acts on a sum acting on its parts; a factor cut along the other axis; a method let through."""
    found = json.loads((folder / "table.json").read_text())
    assert set(found) == {f"{name}, {cut}" for name in TABLE for cut in CUTS}
    for name, told in found.items():
        kind, cut = TABLE[name.rpartition(", ")[0]][0], name.rpartition(", ")[2]
        if isinstance(told, str):
            assert kind not in limits.METHODS[cut] or name in REFUSED, name
            assert REFUSED.get(name, f"{kind} is not there with {cut}") in told
        else:
            assert told <= 1e-6, name


def test_a_pipeline_tells_how_long_it_waited(folder: Path) -> None:
    """Kills: time in passes counted as waiting; the bound of another schedule."""
    for rank in json.loads((folder / "interleaved-lora" / "ranks.json").read_text()):
        # five rows a step, two in a micro-batch: K = 3, P = 2, v = 2
        assert rank["least_idle_share"] == pytest.approx(1 / (2 * 3 + 1), abs=1e-4)
        assert 0 < rank["idle_share"] < 1
    assert len((folder / "interleaved-lora" / "metrics.jsonl").read_text().splitlines()) == STEPS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_part_holds_and_sends_what_is_planned(folder: Path, name: str, method: str) -> None:
    """Kills: a sum of activations for each map; states sent back to where nothing trains; a part that stays whole."""
    case = NAMED[name]
    tuned = made(method, Single(), alone(case))
    specs = tensor_specs(tuned.policy.model, tuned.parameters.values())
    item_bytes = 8 if case.exact else 4
    parts, data = case.section.parts, case.section.data
    in_passes = case.section.shard in (("zero2", "zero3") if case.section.pipeline > 1 else ("zero3",))
    for rank, told in enumerate(json.loads((folder / f"{name}-{method}" / "ranks.json").read_text())):
        sent: Counter[str] = Counter()
        replicas = [steps(SimpleNamespace(rank=one, size=data))(Cursor()) for one in range(data)]
        for hands in islice(zip(*replicas, strict=False), STEPS):
            hand, most = hands[rank // parts], max(len(hand.micro_batches) for hand in hands)
            sizes = [sum(len(row.ids) for row in rows) for rows in hand.micro_batches]
            # where replicas wait for each other within passes, all make as many
            missing = most - len(sizes) if in_passes else 0
            tokens = sum(sizes) + missing * sum(len(row.ids) for row in hand.spare)
            plan = PartsSpread(case.section, 4, 32, item_bytes, len(sizes) + missing, tokens, max(sizes))
            sent["activations"] += plan.activations_sent_bytes(rank % parts, specs)
            # and reduce as often as the one with most
            sent.update({**replace(plan, micro_batches=most).sent_bytes(rank % parts, specs), "activations": 0})
        if case.exact and method == "full":
            continue  # float64 is for the test alone: a plan knows gradients of 32 bits
        for kind, count in sent.items():
            assert told[f"{kind}_sent_bytes"] == pytest.approx(count, rel=0.02), kind
        mine = plan.mine(rank % parts, specs)
        whole = count_memory(mine, fp32_gradients=True)
        held = Spread(case.section.data, case.section.shard).memory(whole, mine)
        for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
            assert told[part] == pytest.approx(getattr(held, part), rel=0.05, abs=64), part
