"""Where a run begins that is given another run as its model: at a copy of that one's adapter.

The one idea: the adapter that was received stays, frozen and under a name of its own, so that the model as the run
received it is a route over the same base. A run whose result is a whole model needs none of this: it is a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import Config, differences
from tunesmith.core.errors import ConfigError, ModelError
from tunesmith.core.files import read_json
from tunesmith.models.source import resolve
from tunesmith.run.opening import find

if TYPE_CHECKING:
    from tunesmith.adapt.adapter import Adapter
    from tunesmith.models.load import Loaded
    from tunesmith.models.route import Route
    from tunesmith.run.prepare import Prepared

RECEIVED = "received"


def check_start(config: Config, folder: Path) -> None:
    """Raises ConfigError unless the method is that of the adapter: a copy of it is what trains."""
    settings = read_json(folder / "adapter_config.json", ModelError)
    saved = settings.get("tunesmith_method") if isinstance(settings, dict) else None
    if not isinstance(saved, dict):
        raise ConfigError("not an adapter of tunesmith", where=f"model: {folder}", hint="begin with the base model")
    _check_copy(config, folder, saved, "tunesmith_predict" in settings)


def check_promise(config: Config, before: Config) -> None:
    """The same of a run that is still to come. Raises ConfigError."""
    if before.objective.predicts or not before.method.trains_all:
        told = before.method.model_dump(mode="json")
        _check_copy(config, Path(before.out), told, before.objective.predicts is not None)


def check_promised_reward(config: Config, run: str, ahead: Mapping[str, Config]) -> None:
    """Raises ConfigError unless a run that is still to come scores answers on the base that this one stands on."""
    scorer = ahead[run]
    if scorer.objective.predicts != "reward" or scorer.method.trains_all:
        told = f"{run} will be a run of objective {scorer.objective.kind}, method {scorer.method.kind}"
        hint = "objective: reward with a method that saves an adapter, such as lora, scores answers"
        raise ConfigError(told, where="objective.reward", hint=hint)
    whole = next((out for out in _line(config.model, ahead) if ahead[out].method.trains_all), None)
    bases = [resolve(find(root_of(model, ahead)).model) for model in (scorer.model, config.model)]
    if whole is not None or bases[0] != bases[1]:
        told = f"{run} scores on {scorer.model}, and this run stands on {whole or config.model}"
        raise ConfigError(told, where="objective.reward", hint="both need the same base")


def root_of(model: str, ahead: Mapping[str, Config]) -> str:
    """The model that is there, of which one that is still to come will be made."""
    line = _line(model, ahead)
    return ahead[line[-1]].model if line else model


def _line(model: str, ahead: Mapping[str, Config]) -> list[str]:
    """The runs to come that a model goes through, the last first."""
    found = []
    while model in ahead:
        found.append(model)
        model = ahead[model].model
    return found


def _check_copy(config: Config, folder: Path, saved: dict[str, Any], predicts: bool) -> None:
    if config.objective.predicts or predicts:
        told = "an adapter with a head for labels is no start, nor is one for such a head"
        raise ConfigError(told, where=f"model: {folder}", hint="begin with the base model")
    if saved.get("init") == "pissa":
        told = "pissa is saved as a change of twice its rank, of which there is no copy to train"
        raise ConfigError(told, where=f"model: {folder}", hint="begin with a run of init: default")
    asked = config.method.model_dump(mode="json")
    other = differences(saved, asked)
    if other:
        raise ConfigError(
            f"the run begins with a copy of {folder}, so its method is that one's: {'; '.join(other)}",
            where="method",
            hint="copy the section from the config.yaml of that run",
        )


def receive(prepared: Prepared, loaded: Loaded) -> Adapter | None:
    """Puts the adapter that the run begins with on the model; None where it begins with the model as it is."""
    if prepared.start is None:
        return None
    from tunesmith.adapt.store import load_adapter

    return load_adapter(loaded, prepared.start, RECEIVED)


def beside(loaded: Loaded, folder: Path, name: str) -> Adapter:
    """An adapter that stands on a model under a name of its own, frozen, and changes nothing about what trains there.

    Raises AdapterError for one of another base.
    """
    from tunesmith.adapt.store import load_adapter

    # an adapter that is put on a model decides what trains there
    trains = [(parameter, parameter.requires_grad) for parameter in loaded.model.parameters()]
    adapter = load_adapter(loaded, folder, name)
    for parameter, does in [*trains, *((parameter, False) for parameter in adapter.parameters.values())]:
        parameter.requires_grad_(does)
    return adapter


def route_of(received: Adapter | None) -> Route:
    """The model as the run received it."""
    from tunesmith.models.route import BASE

    return BASE if received is None else received.route


def attach(prepared: Prepared, loaded: Loaded, received: Adapter | None) -> Adapter:
    """The method of the run on its model: fresh, or a copy of what was received, which is frozen."""
    import torch

    method, seed = prepared.config.method, prepared.config.train.seed
    if received is None:
        return method.attach(loaded, seed=seed)
    adapter = method.attach(loaded, seed=received.seed)
    held = received.parameters
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            parameter.copy_(held[name])
    for parameter in held.values():  # only now: what is attached makes copies of others trainable
        parameter.requires_grad_(False)
    return adapter
