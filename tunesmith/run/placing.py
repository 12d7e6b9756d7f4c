"""A run on a cluster that is only described: the real model and method on the meta device, placed in every way.

Needs no weights and no rows: a folder with config.json is enough, and a step is as many rows of `data.max_length` as
`train` has room for. What is counted is in `plan.pieces`, what is ranked in `plan.ranking`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tunesmith.config import Config, worded
from tunesmith.core.errors import ConfigError, ModelError, Problems
from tunesmith.core.files import read_json
from tunesmith.core.yaml import read_yaml
from tunesmith.models.source import resolve
from tunesmith.plan.cluster import Cluster, ClusterSection
from tunesmith.plan.loads import Work

if TYPE_CHECKING:
    from tunesmith.models.load import Dtype
    from tunesmith.plan.pieces import Pieces
    from tunesmith.plan.ranking import Ranking

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_cluster(path: Path | str) -> Cluster:
    """The cluster in a YAML file, or in words: 8xh100, 2x8xa100. Raises ConfigError listing all problems."""
    raw = _in_words(str(path)) or read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError("a cluster is a mapping of keys: nodes, and what is assumed", where=str(path))
    problems = Problems()
    try:
        return Cluster(ClusterSection.model_validate(raw))
    except ValidationError as error:
        for problem in worded(error, ClusterSection, str(path)):
            problems.add(problem)
    problems.raise_if_any()
    raise AssertionError("a refused section has problems")


def rank_layouts(config: Config, cluster: Cluster) -> Ranking:
    """Every layout of a run on a cluster. Raises ConfigError or ModelError for what cannot be placed."""
    from tunesmith.plan.ranking import rank

    if config.precision.compute == "fp32":
        raise ConfigError("peaks of devices are of bf16", where="precision.compute", hint="leave it out")
    return rank(cluster, pieces_of_run(config), work_of(config))


def _in_words(text: str) -> dict[str, Any] | None:
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x([a-z][a-z0-9-]*)", text)
    if found is None:
        return None
    return {"nodes": [{"device": found[3], "devices": int(found[2]), "count": int(found[1] or 1)}]}


def placed(config: Config, cluster: Cluster, top: int) -> dict[str, Any]:
    """The ranking as plain numbers, with what the whole run comes to where its steps are known."""
    from tunesmith.plan.bill import bill

    found = rank_layouts(config, cluster).as_dict(top)
    steps, layouts = config.train.steps, found["layouts"]
    if steps is not None and layouts:
        found["bill"] = bill(cluster, steps, layouts[0]["seconds"], layouts[0]["mfu"]).as_dict()
    return found


def work_of(config: Config) -> Work:
    """Rows of a step, each as long as any may be."""
    train, length = config.train, config.data.max_length
    if train.rows_per_step is not None:
        return Work(train.rows_per_step, length)
    tokens = train.tokens_per_step or length
    return Work(max(1, tokens // length), min(length, tokens))


def check_placed(config: Config) -> None:
    """Raises ConfigError for what a config alone does not tell the size of."""
    if config.objective.kind == "distill":
        hint = "`tunesmith plan` of this file counts it, on one process"
        raise ConfigError("a teacher is not placed", where="objective", hint=hint)


def pieces_of_run(config: Config, dtype: Dtype = "bf16") -> Pieces:
    """The model with its method attached, counted part by part; its weights in this dtype."""
    from tunesmith.models.load import meta
    from tunesmith.models.targets import block_paths
    from tunesmith.plan.memory import tensor_specs
    from tunesmith.plan.pieces import pieces_of
    from tunesmith.plan.shape import read_shape

    check_placed(config)
    folder = resolve(config.model)
    settings = read_json(folder / "config.json", ModelError)
    experts = next((key for key in _EXPERTS if settings.get(key)), None)
    if experts:
        raise ModelError(f"{experts} {settings[experts]}: mixtures of experts are not placed", where=str(folder))
    config.objective.check(settings)
    config.method.check(settings)
    loaded = meta(str(folder), dtype=dtype, base=config.precision.base)
    blocks = block_paths(loaded.model, loaded.family)
    if loaded.family.kind == "seq2seq" or not blocks:
        raise ModelError(f"{loaded.family.name}: only models of one row of blocks are placed", where=str(folder))
    if config.objective.predicts:
        raise ConfigError("heads for labels are not placed; their data says how large they are", where="objective")
    base = {name for name, _ in loaded.model.named_parameters()}
    adapter = config.method.attach(loaded, seed=config.train.seed)
    return pieces_of(
        tensor_specs(loaded.model, list(adapter.parameters.values())),
        read_shape(folder),
        blocks=blocks,
        base=base,
        context=config.data.max_length,
        head=loaded.family.kind == "decoder",
        master=config.precision.master,
    )
