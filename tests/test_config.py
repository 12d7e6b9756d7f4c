"""The configuration: what YAML may hold, how sections are put together, how problems are worded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.config import apply_override, as_dict, build_config, differences, load_config
from tunesmith.core.errors import ConfigError
from tunesmith.core.yaml import read_yaml_text, write_yaml_text

SMALL = {"model": "m", "data": {"train": "rows.jsonl"}, "train": {"steps": 3}, "out": "runs/x"}


def problem(raw: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(raw, "c.yaml")
    return str(caught.value)


def test_a_small_configuration_gets_every_default_written_out() -> None:
    """Kills: leaving defaults out of the resolved configuration."""
    written = as_dict(build_config(SMALL))
    assert written["method"]["kind"] == "lora"
    assert written["method"]["rank"] == 8
    assert written["train"]["tokens_per_step"] == 4096
    assert build_config(written) == build_config(SMALL)


def test_the_resolved_configuration_survives_yaml() -> None:
    """Kills: a writer that turns 1e-4 or 'no' into something else."""
    config = build_config({**SMALL, "train": {"steps": 3, "lr": 1e-4}, "out": "no"})
    assert build_config(read_yaml_text(write_yaml_text(as_dict(config)), "x")) == config


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("no", "no"), ("010", 10), ("12:30:45", "12:30:45"), ("[q, v]", ["q", "v"])]
)
def test_yaml_values_are_those_of_yaml_1_2(text: str, value: object) -> None:
    """Kills: a YAML 1.1 reader, for which 1e-4 is a string, no is False and 12:30:45 is 45045."""
    raw: dict = {}
    apply_override(raw, f"a.b={text}")
    assert raw == {"a": {"b": value}}


def test_all_problems_are_shown_together_with_their_keys() -> None:
    """Kills: stopping at the first problem; a path without its section."""
    told = problem(
        {**SMALL, "method": {"kind": "lora", "rank": 0}, "train": {"steps": 3, "lrr": 1}, "data": {"max_length": "a"}}
    )
    assert "c.yaml: method.rank" in told
    assert "c.yaml: train.lrr: unknown key 'lrr'" in told
    assert "did you mean lr?" in told
    assert "c.yaml: data.max_length" in told


def test_an_unknown_kind_names_the_nearest() -> None:
    """Kills: a bare KeyError for a kind that is not in the table."""
    told = problem({**SMALL, "method": "lorra"})
    assert "'lorra' is no method" in told
    assert "did you mean lora?" in told


def test_a_setting_without_effect_is_an_error() -> None:
    """Kills: accepting an early stop that never looks, or metrics with nothing to measure."""
    assert "data.eval is not set" in problem({**SMALL, "evaluate": {"metrics": ["bleu"]}})
    assert "train.stop" in problem({**SMALL, "train": {"steps": 3, "stop": {"metric": "loss"}}})


def test_an_override_reaches_into_a_section_given_by_its_name() -> None:
    """Kills: `method: lora` with `method.rank=4` losing the kind."""
    raw = {**SMALL, "method": "lora"}
    apply_override(raw, "method.rank=4")
    assert build_config(raw).method.model_dump()["rank"] == 4


def test_differences_name_key_paths_with_both_values() -> None:
    """Kills: comparing top-level sections only."""
    old, new = as_dict(build_config(SMALL)), as_dict(build_config({**SMALL, "train": {"steps": 4}}))
    assert differences(old, new) == ["train.steps: 3 -> 4"]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("a: &x 1\nb: *x\n", "anchors and aliases"),
        ("a: !!python/object:os.system 1", "tag"),
        ("\ta: 1", "t:1:1"),
        ("[" * 3000, "nested too deeply"),
        ("a: \x00", "not allowed"),
        ("a: b: c", "t:1:5"),
    ],
)
def test_surprises_in_yaml_are_refused_with_their_line(text: str, told: str) -> None:
    """Kills: each guard of the YAML reader, one case a guard."""
    with pytest.raises(ConfigError) as caught:
        read_yaml_text(text, "t")
    assert told in str(caught.value)


def test_a_file_that_is_no_file_is_told(tmp_path: Path) -> None:
    """Kills: a traceback for a folder, a missing file, or one that is not UTF-8."""
    (tmp_path / "bad.yaml").write_bytes("model: x".encode("utf-16"))
    for path, told in ((tmp_path, "folder"), (tmp_path / "no.yaml", "no such file"), (tmp_path / "bad.yaml", "UTF-8")):
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert told in str(caught.value)
