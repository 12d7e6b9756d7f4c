"""Laws of layouts: what is computed, held and sent by several processes is what one computes, and what was planned."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import CASES
from safetensors.torch import load_file
from several import COMPARING, FEW, METHODS, OFFLOADS, SHARDS, SIZES, STEPS, examples, gradients, launch, made, trained

from tunesmith.core.switches import SAVINGS, without
from tunesmith.data.deal import deal
from tunesmith.data.order import Mixture
from tunesmith.data.pack import StepStream
from tunesmith.parallel.layout import Single
from tunesmith.parallel.world import ALONE
from tunesmith.plan.memory import count_memory, tensor_specs
from tunesmith.plan.spread import Spread

WORLDS = (2, pytest.param(4, marks=pytest.mark.slow))
EVERY = [(shard, method) for shard in SHARDS for method in METHODS]


def finished(folder: Path, size: int, *laws: str) -> Path:
    """The files of a launch whose processes have all ended well."""
    processes = launch(folder, size, *laws)
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(told)
    return folder


@pytest.fixture(scope="module", params=WORLDS)
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Gradients and runs of two and of four processes."""
    size = request.param
    return size, finished(tmp_path_factory.mktemp(f"several{size}"), size, "gradients")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of one process: gradients, for zero3 without savings, for its blocks have hooks; and the runs."""
    folder = tmp_path_factory.mktemp("alone")
    found: dict[str, Any] = {}
    for method in METHODS:
        trained(ALONE, "none", method, folder / method)
        found[method] = folder / method
        for shard in SHARDS:
            with without(*SAVINGS) if shard == "zero3" else nullcontext():
                found[f"{method} {shard}"] = gradients(ALONE, "none", method)
    return found


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("others"), 2, "others")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path, file: str = "weights.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{STEPS:06d}" / file)


@pytest.mark.parametrize(("shard", "method"), EVERY)
def test_gradients_are_those_of_one_process(several: Any, alone: Any, shard: str, method: str) -> None:
    """Kills: a mean over processes; dividing by a process's own weight; a process without rows that sends nothing."""
    _, folder = several
    found, wanted = load_file(folder / f"gradients-{shard}-{method}.safetensors"), alone[f"{method} {shard}"]
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert (found[name] - value).double().norm() <= 1e-6 * value.double().norm(), name


@pytest.mark.parametrize(("shard", "method"), EVERY)
def test_a_run_ends_with_the_weights_of_one_process(several: Any, alone: Any, shard: str, method: str) -> None:
    """Kills: a piece that decays as a vector, or is updated by two processes; a weight that is not gathered."""
    _, folder = several
    run, one = folder / f"run-{shard}-{method}", alone[method]
    wanted = last(one)
    assert max((last(run)[name] - value).abs().max().item() for name, value in wanted.items()) <= 1e-5
    same = ("step", "epoch", "lr", "rows", "tokens", "supervised_tokens", "total_tokens")
    for mine, theirs in zip(records(run), records(one), strict=True):
        assert {name: mine[name] for name in same} == {name: theirs[name] for name in same}
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert {path.name for path in run.iterdir()} == {"metrics.jsonl", "checkpoints"}


@pytest.mark.parametrize(("shard", "method"), EVERY)
def test_a_process_holds_and_sends_what_is_planned(several: Any, shard: str, method: str) -> None:
    """Kills: a master that stays whole, a gradient that is kept, a reduction a micro-batch, a state that travels."""
    size, folder = several
    tuned = made(method, Single())
    specs = tensor_specs(tuned.policy.model, tuned.parameters.values())
    rounds = [record["reduce_scatter_sent_bytes"] for record in records(folder / f"run-{shard}-{method}")] if shard in (
        "zero2", "zero3") else []  # fmt: skip
    whole = count_memory(specs, fp32_gradients=True)
    share = (size - 1) / size
    micro_batches = rounds[0] / (whole.gradients_bytes * share) if rounds else 1.0
    assert micro_batches == pytest.approx(round(micro_batches), rel=0.02)
    spread = Spread(size, shard, round(micro_batches))  # type: ignore[arg-type]
    held, sent = spread.memory(whole, specs), spread.sent_bytes(whole, specs)
    for rank in json.loads((folder / f"ranks-{shard}-{method}.json").read_text()):
        for part in ("weights_bytes", "master_bytes", "gradients_bytes", "optimizer_bytes"):
            assert rank[part] == pytest.approx(getattr(held, part), rel=0.05, abs=64), part
    # a checkpoint is after the fifth step: each process writes its own numbers of it
    assert not any("copies_sent_bytes" in record for record in records(folder / f"run-{shard}-{method}"))
    first = records(folder / f"run-{shard}-{method}")[0]
    for kind, count in sent.items():
        assert first[f"{kind}_sent_bytes"] == pytest.approx(count, rel=0.02), kind
    assert first["sent_bytes"] == pytest.approx(sum(sent.values()), rel=0.02)


def test_rows_are_dealt_evenly_and_each_once() -> None:
    """Kills: a row that two processes have, or none; dealing rows in turn, whatever their length."""
    rows = examples(60)
    for step in StepStream(Mixture([60]), lambda source, row: rows[row], SIZES, epochs=1):
        for size in (1, 2, 3, 7):
            hands = deal(step, size)
            dealt = sorted(row.where for hand in hands for row in hand)
            assert dealt == sorted(row.where for batch in step.micro_batches for row in batch)
            tokens = [sum(len(row.ids) for row in hand) for hand in hands]
            longest = max(len(row.ids) for hand in hands for row in hand)
            assert max(tokens) - min(tokens) <= longest


@pytest.mark.slow
def test_every_method_learns_in_every_layout_or_is_refused_by_name(tmp_path: Path) -> None:
    """And objectives that compare. Kills: an insert that no process gathers; a copy beside the base; a head outside of
    the blocks; a reference whose weights are in parts."""
    found = json.loads((finished(tmp_path, 2, "cases") / "cases.json").read_text())
    refused = {"lp_ft, zero3": "phases", "subspace, zero3": "all blocks"}
    assert set(found) == {f"{case}, {shard}" for case in (*CASES, *COMPARING) for shard in SHARDS}
    for name, told in found.items():
        if name in refused:
            assert refused[name] in told
            assert "zero3" in told
        else:
            assert told <= 1e-6, name


@pytest.mark.slow
def test_full_training_in_bf16_keeps_its_masters_in_parts(others: Path) -> None:
    """Kills: updating the rounded weights; gathering what was rounded twice."""
    reference = last(others / "bf16-none")
    for shard in SHARDS[1:]:
        found = last(others / f"bf16-{shard}")
        for name, value in reference.items():
            assert found[name].dtype == torch.float32
            assert (found[name] - value).norm() <= 2e-3 * value.norm(), (shard, name)


@pytest.mark.slow
def test_what_is_computed_again_is_gathered_again(others: Path) -> None:
    """Kills: a backward that finds a block in parts."""
    reference = last(others / "again-none")
    for shard in SHARDS[1:]:
        found = last(others / f"again-{shard}")
        assert max((found[name] - value).abs().max().item() for name, value in reference.items()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "offload"), OFFLOADS)
def test_what_waits_outside_memory_changes_no_bit(others: Path, shard: str, offload: str) -> None:
    """Kills: a bucket that is filled from masters before they are where they stay."""
    reference, found = last(others / f"bf16-{shard}"), last(others / f"{offload}-{shard}")
    assert all(torch.equal(found[name], value) for name, value in reference.items())


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_sigterm_to_one_process_saves_all_and_the_resumed_run_is_the_same(others: Path, shard: str) -> None:
    """With moments of 8 bits under zero3. Kills: processes that stop at different steps; moments that are handed out to
    the wrong process."""
    broken, whole = others / f"broken-{shard}", others / f"unbroken-{shard}"
    for file in ("weights.safetensors", "moments.safetensors"):
        parts = [(run / "checkpoints" / f"step-{STEPS:06d}" / file).read_bytes() for run in (broken, whole)]
        assert parts[0] == parts[1]
    assert (broken / "metrics.jsonl").read_text().count("\n") == STEPS


@pytest.mark.slow
def test_int8_moments_are_those_of_one_process_but_for_a_few_codes(
    others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs is what rounding of gradients puts on the other side of chance; a number moves by a part of the
    rate. Kills: blocks that begin with a piece; a scale of one process's numbers alone; chance drawn for each process.
    """
    monkeypatch.setattr("tunesmith.core.moments.SMALL", FEW)
    trained(ALONE, "none", "full", tmp_path / "one", optimizer_state="int8")
    (tmp_path / "on" / "checkpoints").mkdir(parents=True)
    step = Path("checkpoints") / "step-000010"
    shutil.copytree(others / "int8-zero3" / step, tmp_path / "on" / step)
    trained(ALONE, "none", "full", tmp_path / "on", optimizer_state="int8", resume=True)
    moments, weights = last(tmp_path / "one", "moments.safetensors"), last(tmp_path / "one")
    codes = [name for name, value in moments.items() if value.dtype == torch.uint8]
    assert sum(moments[name].numel() for name in codes) > 0.9 * sum(value.numel() for value in moments.values())
    for run in (*(others / f"int8-{shard}" for shard in SHARDS), tmp_path / "on"):
        found, kept = last(run), last(run, "moments.safetensors")
        assert kept.keys() == moments.keys()
        assert sum((kept[name] != moments[name]).sum() for name in codes) <= 200, run
        for name in set(moments) - set(codes):
            torch.testing.assert_close(kept[name], moments[name], rtol=1e-3, atol=1e-6)
        far = torch.cat([(found[name] - value).abs().flatten() for name, value in weights.items()])
        assert far.max() <= 0.3 * 1e-3
        assert far.mean() <= 1e-6


@pytest.mark.slow
def test_a_loss_without_a_number_on_one_process_stops_all(others: Path) -> None:
    """Kills: a process that goes on alone; a message that does not say whose rows they were."""
    for rank in (0, 1):
        found = json.loads((others / f"nan-{rank}.json").read_text())
        assert set(found) == set(SHARDS)
        assert all("rows:7" in told and "rank " in told for told in found.values())


@pytest.mark.parametrize("shard", SHARDS)
def test_checkpoints_of_every_layout_go_on_in_one_process(several: Any, alone: Any, tmp_path: Path, shard: str) -> None:
    """Kills: a format of a layout's own; parts in the order of processes instead of that of the whole."""
    _, folder = several
    run = folder / f"run-{shard}-full"
    copied = tmp_path / "run"
    (copied / "checkpoints").mkdir(parents=True)
    half = Path("checkpoints", f"step-{STEPS // 2:06d}")
    (run / half).rename(copied / half)
    (copied / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    result = trained(ALONE, "none", "full", copied, resume=True)
    assert result.resumed_step == STEPS // 2
    wanted = last(alone["full"])
    assert max((last(copied)[name] - value).abs().max().item() for name, value in wanted.items()) <= 1e-5
