"""What a plan answers beyond itself: what fits, how right plans were, what the data and the run come to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.core.amounts import read_bytes
from tunesmith.core.errors import ConfigError
from tunesmith.plan.bill import bill
from tunesmith.plan.cluster import Cluster, ClusterSection
from tunesmith.plan.data_need import Need, show_need
from tunesmith.plan.fit import Planned, fit, shards, show_fit
from tunesmith.plan.history import history_of, interval, show_history
from tunesmith.run.placing import read_cluster

CONFIG = {
    "method": {"kind": "lora", "rank": 8},
    "train": {"micro_batch_tokens": 1024, "micro_batch_rows": None, "recompute": "none", "optimizer_state": "fp32"}
    | {"offload": "none", "stop": None},
    "precision": {"base": "same"},
    "data": {"max_length": 512},
    "layout": {"data": 1, "tensor": 1, "pipeline": 1, "shard": "none"},
}


def planned(changes) -> Planned:
    """100 of the base, a byte a token, 40 of moments, and half of the activations away by recomputation."""
    settings = {key: value for change in changes for key, value in change.settings}
    tokens = settings.get("train.micro_batch_tokens", 1024)
    again = {"none": 1.0, "selective": 0.8, "full": 0.5}[settings.get("train.recompute", "none")]
    base = {"same": 100, "int8": 50, "nf4": 25}[settings.get("precision.base", "same")]
    rank = settings.get("method.rank", 8)
    moments = {"fp32": 40, "bf16": 20, "int8": 10}[settings.get("train.optimizer_state", "fp32")] * rank // 8
    moments //= {"none": 1, "zero1": 2, "zero2": 4, "zero3": 8}[settings.get("layout.shard", "none")]
    return Planned(tuple(changes), base + moments + int(tokens * again), 10 / again, 10)


def test_a_run_that_fits_is_left_alone():
    found = fit(CONFIG, 2000, planned)
    assert found.fits
    assert not found.options


@pytest.mark.parametrize("room", [1140, 900, 700, 660, 300, 250])
def test_what_is_suggested_fits_and_the_next_larger_micro_batch_does_not(room: int):
    """Kills: stopping at the smallest; forgetting what else was changed."""
    found = fit(CONFIG, room, planned)
    assert found.options
    for option in found.options:
        assert option.needed_bytes <= room
        settings = {key: value for change in option.changes for key, value in change.settings}
        tokens = settings.get("train.micro_batch_tokens")
        if tokens:
            others = [change for change in option.changes if change.settings[0][0] != "train.micro_batch_tokens"]
            larger = planned([*others, *_micro(2 * tokens)])
            assert larger.needed_bytes > room


def _micro(tokens: int):
    from tunesmith.plan.fit import TIME, Change

    return [Change((("train.micro_batch_tokens", tokens),), TIME, "")]


def test_what_leaves_the_result_alone_comes_first_and_of_that_the_fastest():
    """Kills: ranking by bytes."""
    found = fit(CONFIG, 1130, planned).as_dict()
    paid = [option["paid_with"] for option in found["options"]]
    assert paid == sorted(paid, key=["time", "rounding", "result"].index)
    assert [option["more_time"] for option in found["options"]][:2] == sorted(
        option["more_time"] for option in found["options"][:2]
    )
    assert found["options"][0]["settings"] == {"train.micro_batch_tokens": 512}


def test_where_time_is_not_enough_bits_are_given_up_and_where_nothing_is_that_is_said():
    tight = fit(CONFIG, 120, planned)
    assert {"precision.base", "train.recompute"} <= set(tight.as_dict()["options"][0]["settings"])
    none = fit(CONFIG, 20, planned)
    assert not none.options
    assert none.least is not None
    assert show_fit(none.as_dict())[1].startswith("nothing does: with")


def run_folder(folder: Path, ratio: float, seconds: float = 10.0) -> None:
    folder.mkdir(parents=True)
    memory = {"resident_bytes": 1_000_000}
    (folder / "plan.json").write_text(json.dumps({"memory": memory, "seconds": 5.0, "tokens": 100}))
    measured = {"peak_bytes": int(1_000_000 * ratio), "seconds": seconds, "tokens": 200}
    (folder / "run.json").write_text(json.dumps({"measured": measured}))


def test_the_history_says_how_far_plans_were_off(tmp_path: Path):
    """A run of twice the tokens had twice the time. Kills: low and high exchanged; planned over measured."""
    for number, ratio in enumerate((0.8, 0.9, 1.0, 1.1, 1.4)):
        run_folder(tmp_path / f"run-{number}", ratio)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    found = history_of(tmp_path)
    memory, time = found.memory(), found.time()
    assert memory is not None
    assert time is not None
    assert (memory.runs, memory.middle, time.middle) == (5, 1.0, 1.0)
    assert interval(100.0, memory) == pytest.approx((84.0, 128.0))
    assert "1.00 in the median of 5 runs" in show_history(found)[-2]


def test_few_runs_say_nothing_of_the_next_one(tmp_path: Path):
    run_folder(tmp_path / "run", 1.0)
    assert interval(100.0, history_of(tmp_path).memory()) is None
    with pytest.raises(ConfigError, match="no such folder"):
        history_of(tmp_path / "none")


def need(**changes) -> Need:
    values = {"parameters": 70, "tokens": 140, "set_tokens": 70, "rows": 5000, "supervised_share": 0.5}
    return Need(**{**values, "padding_share": 0.3, "lengths": {}, "flops": int(8.64e19), **changes})  # type: ignore[arg-type]


def test_the_amount_of_data_is_put_beside_the_rule_with_its_source():
    """20 tokens a parameter: 1.4 T for 70 B. Kills: under and over exchanged."""
    found = need(parameters=70 * 10**9, tokens=10**9, set_tokens=10**9)
    assert found.optimal_tokens == 14 * 10**11
    assert found.as_dict()["petaflops_days"] == 1.0
    assert "Hoffmann" in show_need(found.as_dict())[1]
    assert "under the 20" in show_need(found.as_dict())[1]
    assert "over the 20" in show_need(need(tokens=70 * 21, set_tokens=70 * 21).as_dict())[1]


def test_reading_a_small_set_often_is_warned_of():
    assert need().warnings() == []
    assert len(need(tokens=350).warnings()) == 1
    assert len(need(tokens=350, rows=200).warnings()) == 2


def test_the_bill_of_llama_7b_is_the_published_one():
    """82,432 GPU-hours at 400 W and PUE 1.1: 36 MWh, 14 t (Touvron et al. 2023, table 15)."""
    cluster = Cluster(ClusterSection.model_validate({"nodes": [{"device": "a100"}], "price_per_hour": 2}))
    found = bill(cluster, steps=82_432, step_seconds=3600 / 8, mfu=0.5)
    assert found.device_hours == 82_432
    assert found.kilowatt_hours == pytest.approx(36_270, rel=1e-3)
    assert found.co2_kilograms == pytest.approx(13_964, rel=1e-3)
    assert found.price == 2 * 82_432
    assert found.petaflops_days == pytest.approx(0.5 * 8 * 312e12 * 82_432 * 450 / 8.64e19)


def test_a_device_of_unknown_power_has_no_energy():
    device = {"name": "x", "tflops": 1, "memory_gb": 1, "memory_gb_per_second": 1}
    link = {"gb_per_second": 1, "microseconds": 1}
    section = ClusterSection.model_validate({"nodes": [{"device": {**device, "within": link, "between": link}}]})
    assert bill(Cluster(section), 1, 1.0, 0.5).kilowatt_hours is None


def test_a_cluster_can_be_said_in_words():
    assert read_cluster("2x8xh100").devices == 16
    assert read_cluster("1xrtx-a6000").line() == "1 x 1 rtx-a6000"
    with pytest.raises(ConfigError, match="no device"):
        read_cluster("8xh1000")


def test_sizes_are_read_as_people_write_them():
    assert [read_bytes(text, "") for text in ("24GB", "1.5 GiB", "800mb", "12")] == [24 * 10**9, 3 << 29, 8 * 10**8, 12]
    with pytest.raises(ConfigError, match="no amount of memory"):
        read_bytes("many", "--fit")


def test_the_bill_of_this_machine_is_time_times_what_was_said_of_it():
    """Half an hour of 65 W. Kills: watts of each process; energy where nobody knows the watts."""
    from tunesmith.plan.bill import local_bill, show_local_bill

    found = local_bill(1800, 8.64e19, 2, 65.0, 0.4)
    assert (found.device_hours, found.petaflops_days) == (1.0, 1.0)
    assert found.kilowatt_hours == pytest.approx(0.0325)
    assert found.co2_kilograms == pytest.approx(0.0325 * 0.385)
    assert found.price == pytest.approx(0.2)
    unknown = local_bill(1800, 8.64e19, 1, None, None)
    assert unknown.kilowatt_hours is None
    assert "unknown" in show_local_bill(unknown.as_dict())


def test_several_processes_may_hold_parts_where_that_is_not_refused():
    """Kills: layouts for one process; zero3 of a base in codes, which is refused."""
    assert not shards(CONFIG)
    two = {**CONFIG, "layout": {**CONFIG["layout"], "data": 2, "shard": "zero1"}}
    assert [dict(change.settings)["layout.shard"] for change in shards(two)] == ["zero2", "zero3"]
    coded = {**two, "precision": {"base": "nf4"}}
    assert [dict(change.settings)["layout.shard"] for change in shards(coded)] == ["zero2"]
    found = fit({**two, "layout": {**two["layout"], "shard": "none"}}, 1150, planned).as_dict()
    assert {"layout.shard": "zero2"} in [option["settings"] for option in found["options"]]
