"""`train.recompute: auto` makes again as little as fits: found in few traces, said in a line, kept when resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_folders import tiny_folder

from tunesmith.config import Config, build_config
from tunesmith.core.errors import ResourceError
from tunesmith.models import policy as policies
from tunesmith.models.recompute import Recompute
from tunesmith.plan import room
from tunesmith.plan.choice import cheapest, check_fits, choice_line
from tunesmith.plan.memory import Memory, Parameters
from tunesmith.plan.plan import Plan
from tunesmith.run import run
from tunesmith.run.planning import plan_run
from tunesmith.run.prepare import prepare

pytestmark = pytest.mark.slow

BLOCKS = 30


def made(asked: list[Recompute], bend: float = 1.0) -> Any:
    """Plans of a model of 30 blocks of 20 bytes each, 11 of them the MLP's, over 100 that are always there."""

    def plan(how: Recompute) -> Plan:
        asked.append(how)
        freed = (20 * how.whole + 11 * how.partly) ** bend
        peak = 100 + 600 - round(freed * 600 ** (1 - bend))
        memory = Memory(0, 0, 0, 0, 0, peak_bytes=peak)
        return Plan(Parameters(1, 1), memory, 1, 1, 1000 + 10 * how.whole + 3 * how.partly)

    return plan


@pytest.mark.parametrize("bend", [1.0, 0.6, 1.6])
@pytest.mark.parametrize("limit", [100, 101, 150, 330, 369, 370, 371, 500, 600, 689, 690, 699])
def test_the_least_that_fits_is_found_in_few_traces(limit: int, bend: float) -> None:
    """Kills: a rung too many; a rung that does not fit; a trace for each block."""
    asked: list[Recompute] = []
    plan = cheapest(made(asked, bend), BLOCKS, limit)
    chosen = plan.recompute
    assert chosen is not None
    assert plan.memory.peak_bytes <= limit
    rung = BLOCKS + chosen["whole"] if chosen["whole"] else chosen["partly"]
    below = Recompute(0, rung - 1) if rung <= BLOCKS else Recompute(rung - BLOCKS - 1, 2 * BLOCKS - rung + 1)
    assert made([], bend)(below).memory.peak_bytes > limit
    assert len(asked) == len(set(asked)) <= 12


def test_what_fits_as_it_is_costs_one_trace_and_no_work() -> None:
    """Kills: a ladder walked from the wrong end; tracing what is not asked for."""
    asked: list[Recompute] = []
    plan = cheapest(made(asked), BLOCKS, 700)
    assert asked == [Recompute()]
    assert plan.recompute == {
        "whole": 0, "partly": 0, "blocks": BLOCKS, "saved_bytes": 0, "more_flops": 0.0, "room_bytes": 700, "fits": True,
    }  # fmt: skip
    assert choice_line(plan.recompute) == ""


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        (568, "recompute: the MLP of 12 of 30 blocks, saves 132 bytes for 3.6 % more work"),
        (370, "recompute: the MLP of all 30 blocks, saves 330 bytes for 9 % more work"),
        (352, "recompute: 2 of 30 blocks and the MLP of the others, saves 348 bytes for 10 % more work"),
        (100, "recompute: all 30 blocks, saves 600 bytes for 30 % more work"),
        (
            99,
            "recompute: all 30 blocks, saves 600 bytes for 30 % more work; "
            "it still does not fit into the 99 bytes there are",
        ),
    ],
)
def test_the_choice_is_said_in_one_line(limit: int, line: str) -> None:
    plan = cheapest(made([]), BLOCKS, limit)
    assert plan.recompute is not None
    assert choice_line(plan.recompute) == line


def test_a_run_that_cannot_fit_is_told_what_it_needs() -> None:
    """Kills: beginning it nevertheless; blaming recomputation where no blocks are known."""
    check_fits(cheapest(made([]), BLOCKS, 100))
    with pytest.raises(ResourceError, match=r"needs 100 bytes even with every block computed again; 99 bytes are free"):
        check_fits(cheapest(made([]), BLOCKS, 99))
    with pytest.raises(ResourceError, match=r"needs 700 bytes; 99 bytes are free") as told:
        check_fits(cheapest(made([]), 0, 99))
    assert "micro_batch_tokens" in told.value.hint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), num_hidden_layers=4, max_position_embeddings=1024)


def config(folder: Path, model: Path, **train: Any) -> Config:
    rows = [{"instruction": f"say {'la ' * (5 + number)}", "output": "la " * 9} for number in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return build_config(
        {
            "model": str(model),
            "data": {"train": str(folder / "rows.jsonl"), "template": "plain"},
            "method": {"kind": "lora", "rank": 2},
            "train": {"steps": 2, "rows_per_step": 8, "micro_batch_rows": 8, "recompute": "auto"} | train,
            "precision": {"compute": "fp32"},
            "evaluate": {},
            "log": [],
            "out": str(folder / "run"),
        }
    )


def peaks(folder: Path, model: Path) -> dict[str, int]:
    kinds = ("none", "selective", "full")
    plans = {kind: plan_run(prepare(config(folder, model, recompute=kind)), calibrated=False) for kind in kinds}
    assert all(plan.recompute is None for plan in plans.values())
    return {kind: plan.memory.peak_bytes for kind, plan in plans.items()}


def planned(folder: Path, model: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(room, "free_bytes", lambda: limit)
    return plan_run(prepare(config(folder, model)), calibrated=False)


def test_auto_goes_from_nothing_to_everything_as_memory_gets_less(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a limit that is not asked; a peak compared before its share is taken; traces of another policy's step."""
    needed = peaks(tmp_path, model)
    assert needed["none"] > needed["selective"] > needed["full"]

    def chosen(limit: int) -> tuple[int, int, bool]:
        found = planned(tmp_path, model, round((limit + room.SPARE_BYTES) / room.SHARE) + 1, monkeypatch).recompute
        assert found is not None
        return found["whole"], found["partly"], found["fits"]

    assert chosen(needed["none"]) == (0, 0, True)
    whole, partly, fits = chosen((needed["none"] + needed["selective"]) // 2)
    assert (whole, fits) == (0, True)
    assert 0 < partly < 4
    assert chosen(needed["selective"]) == (0, 4, True)
    assert chosen(needed["full"] - 100) == (4, 0, False)
    assert planned(tmp_path, model, 10**12, monkeypatch).memory.peak_bytes == needed["none"]


def test_a_run_does_what_was_chosen_and_so_does_it_when_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a plan that the run does not follow; a resumed run that chooses anew in other memory."""
    seen: list[Any] = []
    plain = policies.Policy.recompute
    monkeypatch.setattr(policies.Policy, "recompute", lambda self, how: (seen.append(how), plain(self, how))[1])
    monkeypatch.setattr(room, "free_bytes", lambda: round((needed + room.SPARE_BYTES) / room.SHARE) + 1)
    whole = config(tmp_path, model)
    needed = peaks(tmp_path, model)["selective"]
    folder = run(whole, before=False)
    assert Recompute(0, 4) in seen
    facts, plan = (json.loads((folder / name).read_text()) for name in ("run.json", "plan.json"))
    assert facts["recompute"] == plan["recompute"]
    assert (plan["recompute"]["whole"], plan["recompute"]["partly"], plan["recompute"]["fits"]) == (0, 4, True)
    first = (folder / "metrics.jsonl").read_text()

    (folder / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    monkeypatch.setattr(room, "free_bytes", lambda: 1)
    seen.clear()
    assert run(whole, resume=True, before=False) == folder
    assert Recompute(0, 4) in seen
    assert json.loads((folder / "plan.json").read_text())["recompute"] == plan["recompute"]

    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(room, "free_bytes", lambda: 10**12)
    again = run(config(other, model), before=False)
    texts = (first, (again / "metrics.jsonl").read_text())
    norms = [[json.loads(line)["grad_norm"] for line in text.splitlines()] for text in texts]
    assert norms[0] == norms[1]


def test_a_run_that_cannot_fit_leaves_no_folder_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match="even with every block computed again"):
        run(config(tmp_path, model))
    assert not (tmp_path / "run" / "config.yaml").exists()


# how much memory there is


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(room, "_PROC", folder / "proc")
    monkeypatch.setattr(room, "_CGROUPS", folder / "cgroup")


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"proc/cgroup": "0::/\n", "cgroup/memory.max": "max\n", "cgroup/memory.current": "5\n"}, None),
        ({"proc/cgroup": "0::/\n", "cgroup/memory.max": "900\n", "cgroup/memory.current": "500\n"}, 400),
        (
            {
                "proc/cgroup": "0::/a/b\n",
                "cgroup/a/b/memory.max": "max\n",
                "cgroup/a/b/memory.current": "500\n",
                "cgroup/a/memory.max": "900\n",
                "cgroup/a/memory.current": "700\n",
                "cgroup/a/memory.stat": "anon 300\ninactive_file 50\n",
            },
            250,
        ),
        (
            {
                "proc/cgroup": "9:cpu,cpuacct:/\n4:memory:/x\n",
                "cgroup/memory/x/memory.limit_in_bytes": "900\n",
                "cgroup/memory/x/memory.usage_in_bytes": "850\n",
            },
            50,
        ),
    ],
)
def test_control_groups_are_limits(
    files: dict[str, str], free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: the group of the process alone; files read once counted as taken; version 1 forgotten."""
    pretend(monkeypatch, tmp_path, {})
    without = room.free_bytes()
    pretend(monkeypatch, tmp_path, files)
    assert room.free_bytes() == free if free is not None else room.free_bytes() > 0.3 * without


def test_a_limit_on_data_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: what is taken already counted as free; a limit of kB."""
    resource = pytest.importorskip("resource")
    limits = {resource.RLIMIT_DATA: 5_000_000, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    pretend(monkeypatch, tmp_path, {"proc/status": "Name:\tx y\nVmSize:\t  9000 kB\nVmData:\t  4000 kB\n"})
    assert room.free_bytes() == 5_000_000 - 4000 * 1024
    limits[resource.RLIMIT_DATA] = 1000
    assert room.free_bytes() == 0
