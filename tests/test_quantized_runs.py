"""The whole program on a frozen base of codes: tuned, killed, resumed, judged, asked, exported, offloaded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_cases import config, run_here, tree
from killing import results

from tunesmith.run.opening import open_model
from tunesmith.train import spill

pytestmark = pytest.mark.slow


def told(line: str) -> dict[str, Any]:
    """What the program says on stdout, as JSON, of a command that must go well."""
    answer = run_here(line)
    assert answer["code"] == 0, answer["err"]
    return json.loads(answer["out"]) if "--json" in line else answer


def killed_at(step: int, line: str) -> None:
    """Runs the program in a process of its own that kills itself when a step has been recorded."""
    pid = os.fork()
    if pid == 0:
        try:
            from tunesmith.train.log import MetricsLog

            plain = MetricsLog.write

            def write(self: MetricsLog, record: dict[str, Any]) -> None:
                plain(self, record)
                if record["step"] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            MetricsLog.write = write  # type: ignore[method-assign]
            run_here(line)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_run_on_codes_is_killed_resumed_judged_asked_and_exported(
    base: str, begin: Callable[[Path], Path], good: Path
) -> None:
    """Kills: a resume, a judge or an export that opens the base in the numbers of its files."""
    folder = begin(good)
    train = "{steps: 8, rows_per_step: 3, save_every: 3, lr: 2e-2}"
    section = f"{{compute: fp32, base: {base}}}"
    method = "{kind: lora, rank: 2, targets: [q, v, down], dropout: 0.1}"
    (folder / "q.yaml").write_text(config(train=train, precision=section, method=method))
    told("tune q.yaml out=whole")
    killed_at(7, "tune q.yaml out=cut")  # the checkpoint of step 6 was begun, so that the one before is on the disk
    assert (folder / "cut/checkpoints/step-000003").is_dir()
    told("tune q.yaml out=cut --resume")
    assert results(folder / "cut") == results(folder / "whole")

    told("export cut merged --to merged")
    plain = open_model("model", precision="fp32")
    run, merged = (open_model(name, precision="fp32") for name in ("cut", "merged"))
    ids = torch.tensor([[5, 9, 2, 7, 11, 3]])
    said = {}
    for name, opened in (("plain", plain), ("run", run), ("merged", merged)):
        with opened.route.enter(), torch.no_grad():
            said[name] = opened.loaded.model(input_ids=ids).logits
    torch.testing.assert_close(said["merged"], said["run"], rtol=0, atol=1e-4)
    assert (said["plain"] - said["run"]).abs().max() > 1e-2

    judged = told("evaluate cut merged --data eval.jsonl --metrics loss --precision fp32 --json")["models"]
    losses = [one["metrics"]["loss"]["value"] for one in judged]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    report = json.loads((folder / "cut/eval.json").read_text())
    assert losses[0] == pytest.approx(_loss(report), rel=1e-6)
    assert told("generate cut --prompt Say --json")[0]["completion"]


def _loss(report: dict[str, Any]) -> float:
    """Of eval.json, the loss of the tuned model."""
    return report["models"][-1]["metrics"]["loss"]["value"]


@pytest.mark.parametrize("offload", ["optimizer", "activations"])
def test_a_killed_run_with_offload_leaves_no_file_and_goes_on_without(
    offload: str, begin: Callable[[Path], Path], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: scratch files with a name; a resume that is told off because less waits outside."""
    monkeypatch.setattr(spill, "LEAST_BYTES", 64)
    folder = begin(good)
    (folder / "o.yaml").write_text(config(method="full", precision="{compute: bf16}"))
    told("tune o.yaml out=whole")
    killed_at(3, f"tune o.yaml train.offload={offload} out=cut")
    assert not {Path(path).parts[0] for path in tree(folder / "cut")} - {*tree(folder / "whole"), ".lock"}
    told("tune o.yaml train.offload=none out=cut --resume")
    assert results(folder / "cut") == results(folder / "whole")
    plan = json.loads((folder / "cut/plan.json").read_text())["memory"]
    assert plan["offloaded_bytes"] == 0
    planned = told(f"plan o.yaml train.offload={offload} out=new --json")["memory"]
    assert planned["offloaded_bytes"] > 10_000
    assert planned["total_bytes"] < plan["total_bytes"]
    if offload == "optimizer":
        assert planned["offloaded_bytes"] == plan["master_bytes"] + plan["optimizer_bytes"]
