"""What a run over its own completions warns of, and what its report shows of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith.evaluate.own_writing import written
from tunesmith.evaluate.report import write_report
from tunesmith.evaluate.signs import signs


def records(count: int = 12, **columns: list[float]) -> list[dict[str, Any]]:
    usual = {"kl": [0.1], "completion_tokens": [20.0], "equal_groups": [0.5], "reward": [0.3]}
    found = {name: (values * count)[:count] for name, values in (usual | columns).items()}
    return [{"step": step + 1, **{name: values[step] for name, values in found.items()}} for step in range(count)]


def test_each_sign_of_trouble_is_told_and_health_is_not() -> None:
    """Kills: a warning that is always there, or never."""
    assert signs([]) == signs(records()) == {}
    assert set(signs(records(kl=[0.1] * 6 + [3.0] * 6))) == {"kl"}
    assert signs(records(kl=[0.1] * 9 + [400.0, 0.1, 0.1])) == {}
    assert set(signs(records(completion_tokens=[20.0] * 6 + [60.0] * 6))) == {"length"}
    assert set(signs(records(equal_groups=[1.0]))) == {"equal"}
    falls = [{"eval_exact_match": value} for value in (50.0, 55.0, 30.0, 31.0)]
    rises = [{**record, "reward": 0.1 * record["step"]} for record in records()]
    assert set(signs([*rises, *falls])) == {"eval_exact_match"}
    assert signs([*records(), *falls]) == signs([*rises, {"eval_loss": 9.0}, *[{"eval_loss": 2.0}] * 3]) == {}
    assert signs([*rises, *falls[:3]]) == {}  # one evaluation alone may be chance
    # updates that use a rollout again have no rewards of their own
    assert signs([{"step": 1, "kl": 0.1}, {"step": 2, "kl": None}]) == {}


def test_a_report_shows_completions_over_time_and_what_a_constant_earns(tmp_path: Path) -> None:
    """Kills: the beginning without the end; markup of a completion that acts."""
    lines = [
        {"step": step, "prompt": "Name <b>one</b>", "completion": f"<script>{step}</script>", "reward": step / 40}
        for step in range(1, 41)
        for _ in range(10)
    ]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = [{**record, "ratio_to_1.03": 0.75, "ratio_to_0.5": 0.25} for record in records(equal_groups=[1.0])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in told))
    (tmp_path / "run.json").write_text(json.dumps({"constant": {"text": "red", "reward": 0.125}}))
    shown = written(lines, {"text": "red", "reward": 0.125}, told)
    assert [step["number"] for step in shown["steps"]] == [1, 11, 21, 30, 40]
    assert [len(step["rows"]) for step in shown["steps"]] == [3, 3, 3, 3, 10]
    assert [part["name"] for part in shown["ratios"]] == ["steps 1 to 4", "steps 5 to 8", "steps 9 to 12"]
    page = write_report(tmp_path).read_text()
    for part in (
        "earns 0.125",
        "step 40",
        "&lt;script&gt;40",
        "there is nothing left to learn from",
        "mean reward",
        "\u2264 1.03 75,",
    ):
        assert part in page
    assert "<script>" not in page
