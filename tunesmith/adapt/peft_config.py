"""Settings in peft's words: read, refused in our words where they are not bridged, and written as JSON has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import peft
from peft.utils import PeftType

from tunesmith.adapt.peft_bridge import Peft
from tunesmith.core.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from tunesmith.adapt.method import Method
    from tunesmith.models.load import Loaded

NAME = "default"  # of the adapter within peft; our own name never reaches it
TASKS = {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
# what would train or change more than the tuner's own layers do
_REFUSED = (
    "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
    "runtime_offload_base_weight", "prompt_tuning_init_state_dict_path",
)  # fmt: skip
# a row has no task of its own here
_ONE_TASK = ("n_tasks", "num_tasks")
_OF_THE_STORE = ("base_model_name_or_path", "inference_mode")
# settings that the file has for other reasons
_OTHERS = {
    "peft_type", "task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "peft_version", "revision"
}  # fmt: skip


def made(kind: str, config: Mapping[str, Any], loaded: Loaded, **more: Any) -> Any:
    """peft's configuration object. Raises ConfigError for settings that peft refuses, or that are not bridged."""
    refused = [key for key in _REFUSED if config.get(key)]
    if config.get("bias", "none") not in (False, True, "none"):
        refused.append("bias")  # it trains the base's own
    if refused:
        raise ConfigError(f"{refused[0]} is not bridged", where="method.config")
    if any(config.get(key, 1) != 1 for key in _ONE_TASK):
        raise ConfigError(f"{kind} has one task here", where="method.config", hint="an adapter for each task")
    given = _complete(kind, {"task_type": TASKS.get(loaded.family.kind), **config, **more})
    with as_config_error(kind):
        return peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**given)


def method_of(settings: Mapping[str, Any], own: Method | None) -> Peft:
    """The method of a stored adapter: `own`, where tunesmith wrote it."""
    kind = str(settings["peft_type"])
    return own if isinstance(own, Peft) and own.type == kind else Peft(type=kind, config=stored(settings))


def stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file is the configuration of the tuner."""
    known = set(peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(settings["peft_type"])].__dataclass_fields__)
    return {key: settings[key] for key in known - _OTHERS if settings.get(key) is not None}


def seed_of(settings: Mapping[str, Any], where: str) -> int:
    """What a stored adapter was drawn from. Raises AdapterError."""
    seed = settings.get("tunesmith_seed", 0)
    if not isinstance(seed, int):
        raise AdapterError("tunesmith_seed is no number", where=where)
    return seed


def as_json(settings: Any) -> dict[str, Any]:
    """A configuration object as a file has it, without what `store.py` says itself."""
    return {key: _plain(value) for key, value in settings.to_dict().items() if key not in _OF_THE_STORE}


@contextmanager
def as_config_error(kind: str) -> Iterator[None]:
    """What peft raises about settings is of many kinds, some without a word; around calls of peft alone."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError) as error:
        told = " ".join(str(error).split()) or f"{kind} cannot be made of these settings ({type(error).__name__})"
        raise ConfigError(f"peft: {told}", where="method.config") from error


def _complete(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """With what peft asks for and the run knows better."""
    if kind == "ADALORA" and not config.get("total_step"):
        spans = [config.get(key, 0) for key in ("tinit", "tfinal")]
        config["total_step"] = 1 + sum(span for span in spans if isinstance(span, int))
    return config


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
