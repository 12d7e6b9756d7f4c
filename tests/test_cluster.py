"""A cluster that is not there: its sections, its links, and the textbook's costs of what is moved over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunesmith.cli.main import app
from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.plan.cluster import Cluster, ClusterSection, Placement
from tunesmith.plan.devices import PRESETS
from tunesmith.plan.links import Link, all_gather, all_reduce, coefficients, fit, reduce_scatter
from tunesmith.run.placing import read_cluster

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}


def cluster_of(*nodes: dict[str, object], **more: object) -> Cluster:
    return Cluster(ClusterSection.model_validate({"nodes": list(nodes), **more}))


def run_folder(folder: Path, nodes: str = "{device: h100, devices: 4}", **config: object) -> tuple[str, str]:
    """A run whose model is a config.json alone, and a cluster."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA | config))
    run = {
        "model": str(folder / "model"),
        "data": {"train": "none.jsonl", "max_length": 64},
        "method": "full",
        "train": {"steps": 1, "tokens_per_step": 4096},
        "out": "o",
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    (folder / "cluster.yaml").write_text(f"nodes:\n  - {nodes}\n")
    return str(folder / "run.yaml"), str(folder / "cluster.yaml")


# sections


def test_presets_are_complete_and_in_plausible_units() -> None:
    """Kills: a TFLOP/s that is with sparsity, a bandwidth in bits, a link of both directions, a name that differs."""
    assert {"a100", "h100", "h200", "b200", "rtx-4090", "cpu"} <= set(PRESETS)
    for name, device in PRESETS.items():
        assert device.name == name
        assert 8 <= device.memory_gb <= 1024
        assert device.memory_gb_per_second > device.within.gb_per_second > device.between.gb_per_second
        assert 50 < device.tflops < 2500
        assert device.within.microseconds < device.between.microseconds


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nodes: [{device: h100, cout: 2}]", "nodes.0.cout: unknown key 'cout'; keys here are device devices count"),
        ("nodes: [{device: h101}]", "'h101' is no device; there are a100-40gb a100"),
        ("nodes: [{device: {name: x, tflops: 1}}]", "nodes.0.device.memory_gb: this key is required"),
        ("nodes: []", "nodes: needs at least 1 entries"),
        ("node: []", "node: unknown key 'node'; keys here are nodes compute_efficiency link_efficiency"),
        ("nodes: [{device: h100}]\nlink_efficiency: 2", "link_efficiency: should be less than or equal to 1"),
        ("[1]", "a cluster is a mapping of keys"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_said_by_name(text: str, told: str, tmp_path: Path) -> None:
    """Kills: a traceback, and an error that does not name the key."""
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_cluster(tmp_path / "cluster.yaml")
    assert told in str(caught.value)


def test_a_typo_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    run, cluster = run_folder(tmp_path, "{device: h100, devces: 4}")
    result = CliRunner().invoke(app, ["plan", run, "--cluster", cluster])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert "devces" in str(result.exception).splitlines()[0]
    assert result.exception.hint == "did you mean devices?"


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    """Kills: experts that are counted as if every token went through all of them."""
    run, cluster = run_folder(tmp_path, num_local_experts=8)
    result = CliRunner().invoke(app, ["plan", run, "--cluster", cluster])
    assert isinstance(result.exception, ModelError)
    assert "mixtures of experts" in str(result.exception)


def test_a_model_of_a_config_alone_is_placed(tmp_path: Path) -> None:
    """Kills: a plan that asks for weights, a tokenizer or rows."""
    run, cluster = run_folder(tmp_path)
    result = CliRunner().invoke(app, ["plan", run, "--cluster", cluster, "--json", "--top", "100"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["fitting"] == len(found["layouts"])
    assert {(one["data"], one["tensor"], one["pipeline"]) for one in found["layouts"]} >= {
        (4, 1, 1),
        (1, 4, 1),
        (1, 1, 4),
    }
    for one in found["layouts"]:
        assert one["data"] * one["tensor"] * one["pipeline"] == 4
        assert sum(stage["blocks"] for stage in one["stages"]) == 4
        assert one["micro_rows"] * sum(one["micro_batches"]) == 64
        assert one["seconds"] <= one["exposed_seconds"]
    seconds = [one["seconds"] for one in found["layouts"]]
    assert seconds == sorted(seconds)
    table = CliRunner().invoke(app, ["plan", run, "--cluster", cluster, "--top", "3"], env={"COLUMNS": "150"})
    assert table.exit_code == 0
    assert "4 devices (1 x 4 h100)" in table.output


# links


def test_collectives_take_what_the_textbook_says() -> None:
    """Kills: (N - 1) / N forgotten, an all-reduce that is one ring, a tree of N levels."""
    link = Link(1e9, 1e-5)
    assert all_gather(link, 4, 4e9) == pytest.approx(3e-5 + 3.0)
    assert reduce_scatter(link, 4, 4e9) == all_gather(link, 4, 4e9)
    assert all_reduce(link, 4, 4e9) == pytest.approx(6e-5 + 6.0)
    assert all_reduce(link, 1024, 8) == pytest.approx(20 * (1e-5 + 8e-9))  # up and down ten levels
    assert all_gather(link, 1, 1e9) == all_reduce(link, 1, 1e9) == 0


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce", "send"])
def test_a_fit_finds_the_link_that_made_the_times(kind: str) -> None:
    """Kills: columns that are swapped, a weight that is not relative."""
    made = Link(2.5e8, 3e-4)
    times = []
    for size in (2, 4):
        for nbytes in (1e3, 1e5, 1e7):
            steps, moved = coefficients(kind, size, nbytes)
            times.append((steps, moved, steps * made.seconds + moved / made.bytes_per_second))
    found = fit(times)
    assert found.seconds == pytest.approx(made.seconds)
    assert found.bytes_per_second == pytest.approx(made.bytes_per_second)


def test_a_ring_is_as_fast_as_its_slowest_link() -> None:
    """Kills: an average, and a node that leaves by the network of one device only."""
    one = {"gb_per_second": 10.0, "microseconds": 1.0}
    slow = {"gb_per_second": 1.0, "microseconds": 20.0}
    near = {"device": "h100", "devices": 4, "within": one, "between": slow}
    inside = Placement(cluster_of(near, link_efficiency=1.0), 1, 4, 1)
    assert inside.data_links == [Link(1e10, 1e-6)]
    two = cluster_of(near | {"count": 2}, link_efficiency=1.0)
    assert Placement(two, 1, 8, 1).data_links == [Link(4e9, pytest.approx(2e-5))]
    assert Placement(two, 4, 2, 1).data_links == [Link(1e9, pytest.approx(2e-5))]
    # a stage a node: data stays inside, activations leave by each device's own network
    staged = Placement(two, 1, 4, 2)
    assert staged.data_links == [Link(1e10, 1e-6)] * 2
    assert staged.stage_links == [Link(1e9, pytest.approx(2e-5))]


def test_replicas_of_unequal_nodes_are_told_apart() -> None:
    mixed = cluster_of({"device": "h100", "devices": 2}, {"device": "a100", "devices": 4})
    placed = Placement(mixed, 2, 3, 1)
    assert [(nodes[0].name, count) for nodes, count in placed.replicas] == [("h100", 1), ("a100", 2)]
    assert placed.members == [0, 1, 1]
    assert mixed.tensor_sizes() == [1, 2]


# the page


def test_the_answers_of_the_page_are_those_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a number of the page that was typed, or is of older code."""
    from test_docs import blocks, file_of, shown, typed

    monkeypatch.chdir(tmp_path)
    Path("llama-8b").mkdir()
    Path("llama-8b/config.json").write_text(blocks("cluster.md", "json")[0])
    for block in blocks("cluster.md", "yaml"):
        Path(file_of(block) or "").write_text(block)
    run = {"model": "llama-8b", "data": {"train": "rows.jsonl", "max_length": 4096}, "method": "full", "out": "o"}
    Path("sft.yaml").write_text(json.dumps(run | {"train": {"steps": 1000, "tokens_per_step": 2097152}}))
    for block in blocks("cluster.md", "console"):
        for one in typed(block):
            result = CliRunner().invoke(app, one.command.split()[1:], env={"COLUMNS": "140"})
            assert result.exit_code == 0, result.output
            there = shown(one.lines, result.output)
            assert there == len(one.lines), f"{one.lines[there]!r} is not in\n{result.output}"
