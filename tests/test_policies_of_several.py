"""Policies over several processes: each writes some of the completions, and all learn what one process would.

`python test_policies_of_several.py FOLDER CONFIG` is what each process of a launch does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from several import launch
from test_rollouts import OBJECTIVES, config, filled, records

from tunesmith.config import as_dict, load_config
from tunesmith.core.errors import ConfigError
from tunesmith.run import run
from tunesmith.train import trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("several"))


def noted(name: Path) -> Path:
    """A run of a configuration that leaves the gradients of its first update, where a process has them whole."""
    real, made = trainer.update, run

    def update(optimizer: Any, *args: Any, **settings: Any) -> float:
        path = name.with_suffix(".pt")
        if not path.exists():
            torch.save({key: master.grad for key, master in optimizer.masters.items()}, path)
        return real(optimizer, *args, **settings)

    trainer.update = update
    try:
        return made(load_config(str(name)))
    finally:
        trainer.update = real


@pytest.mark.slow
def test_two_processes_write_and_learn_what_one_does(folder: Path) -> None:
    """Kills: draws that depend on the process; whitening of one's own tokens alone; rewards that get lost."""
    train = {"steps": 5, "rows_per_step": 3, "micro_batch_rows": 1, "lr": 0.01}
    asked = {size: folder / f"ppo-{size}.yaml" for size in (1, 2)}
    for size, path in asked.items():
        one = config(folder, OBJECTIVES["ppo"], path.stem, train=train, layout={"data": size})
        path.write_text(json.dumps(as_dict(one)))
    noted(asked[1])
    processes = launch(folder, 2, str(asked[2]), script=__file__)
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)
    one, two = (folder / path.stem for path in asked.values())
    assert (one / "rollouts.jsonl").read_bytes() == (two / "rollouts.jsonl").read_bytes()
    for ours, theirs in zip(records(one), records(two), strict=True):
        for name in ("reward", "rows", "supervised_tokens"):
            assert theirs.get(name) == ours.get(name)
        for name in ("loss", "grad_norm", "kl", "kl_weight", "value_loss"):
            assert theirs.get(name, 0.0) == pytest.approx(ours.get(name, 0.0), rel=1e-4, abs=1e-6)
    found, wanted = (torch.load(path.with_suffix(".pt")) for path in (asked[2], asked[1]))
    far = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted]).norm()
    assert far <= 1e-6 * torch.cat([value.flatten() for value in wanted.values()]).norm()


@pytest.mark.parametrize("layout", [{"data": 2, "shard": "zero3"}, {"tensor": 2}, {"pipeline": 2}])
def test_a_layout_without_a_whole_model_cannot_write(folder: Path, layout: dict[str, Any]) -> None:
    """Kills: a run that waits for ever for parameters that another process has."""
    with pytest.raises(ConfigError, match=r"grpo writes with a whole model, and zero3|grpo is not there with"):
        config(folder, OBJECTIVES["grpo"], "none", layout=layout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    noted(Path(sys.argv[2]))
