"""Whether the counted peak is the profiler's: python benchmarks/plan_profiler.py [CASE]

One micro-batch of a case, forward and backward, once under the mode that counts storages and once under torch's
profiler, whose account of the allocator is added up. The allocator rounds up and also serves what is no tensor.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.plan_cases import config_of
from tunesmith.config import build_config
from tunesmith.models.load import load
from tunesmith.models.policy import Policy
from tunesmith.plan.shape import read_shape
from tunesmith.plan.trace import measure
from tunesmith.run.largest import largest
from tunesmith.run.prepare import prepare
from tunesmith.train.precision import resolve


def main() -> None:
    """Prints both peaks."""
    case = sys.argv[1] if len(sys.argv) > 1 else "llama-sft-lora-fp32-same-1024-256"
    prepared = prepare(build_config(config_of(case, Path("runs/plan-grid"))))
    config = prepared.config
    loaded = load(str(prepared.folder), dtype=resolve(config.precision), base=config.precision.base)
    loaded.predicts = prepared.problem
    policy = Policy(loaded, config.method.attach(loaded).route, packed=config.data.packing).train()
    met, _ = largest(prepared, policy, read_shape(prepared.folder))
    batch = met[0].seen.batch

    def loss() -> torch.Tensor:
        return config.objective.loss(policy, batch).total

    counted = measure(loaded.model, loss, len(batch.ids)).peak_bytes
    loaded.model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss().backward()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    print(f"{case}: counted {counted / 1e6:.2f} MB, profiler {peak / 1e6:.2f} MB ({100 * (peak / counted - 1):+.2f} %)")


if __name__ == "__main__":
    main()
