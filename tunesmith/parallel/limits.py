"""What tensor parallelism and pipelines cannot do, found before torch is loaded and said by name.

The one idea: a layout either computes what one process computes, or is refused. What is in neither table here was not
shown to be exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.core.errors import ConfigError
from tunesmith.models.families import family_of
from tunesmith.parallel.layout import LayoutSection

# families whose blocks have q, k, v, gate and up to be cut by columns, and o and down by rows
_TENSOR = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite")
# and those whose blocks are one behind the other, with nothing but an embedding before and a norm and a head after
FAMILIES = {"tensor": _TENSOR, "pipeline": (*_TENSOR, "olmo2", "cohere", "phi3")}
# methods whose parameters stand at places in the blocks, or before or behind them, each process with those of its own
METHODS = {
    "tensor": (
        *("full", "lora", "adapter", "bitfit", "ia3", "fpt", "top_layers"),
        *("linear_probe", "prompt", "prefix_embed", "prefix_layer"),
    ),
    "pipeline": ("full", "lora", "adapter", "bitfit", "ia3", "fpt", "top_layers", "prefix_layer"),
}
OBJECTIVES = ("sft", "predict")
_ALONE = "or use layout.data alone"


def refusals(config: Any) -> Iterator[tuple[str, str, str]]:
    """What of a configuration its layout cannot do: the key, what is wrong, and a hint."""
    layout, stop = config.layout, config.train.stop
    if layout.processes > 1 and config.train.cache_trunk:
        yield "train.cache_trunk", "is for one process, and the layout has several", "leave it out"
    kinds = _kinds(layout)
    if "tensor" in kinds and config.train.optimizer_state == "int8":
        told = "int8 has a scale for numbers that stand side by side, and tensor cuts between them"
        yield "train.optimizer_state", told, "take bf16, or use layout.data or layout.pipeline"
    spread = "zero3" if layout.shard == "zero3" else kinds[0] if kinds else ""
    offload = config.train.offload
    if offload == "optimizer" and (layout.shard != "none" or kinds):
        told = f"optimizer keeps whole masters apart, and {kinds[0] if kinds else layout.shard} has parts of them"
        yield "train.offload", told, f"leave it out, {_ALONE}"
    if offload == "activations" and spread:
        told = f"activations wait for a backward of their own, and {spread} makes passes itself"
        yield "train.offload", told, "leave it out, or use layout.data without zero3"
    if config.precision.base != "same" and (spread == "zero3" or "tensor" in kinds):
        told = f"{config.precision.base} holds codes, and {spread} splits numbers"
        yield "precision.base", told, "set it to same, or use layout.pipeline, or layout.data without zero3"
    judged = config.objective.predicts or config.objective.compares
    is_written = stop is not None and stop.metric not in ("loss", "perplexity") and not judged
    if is_written and spread:
        told = f"is of written text, and {spread} has no whole model to write with"
        yield "train.stop.metric", told, "take loss, or zero2"
    if config.objective.samples and spread == "zero3":
        yield "objective", f"{config.objective.kind} writes with a whole model, and zero3 has none", "take zero2"
    if getattr(config.objective, "kl_target", None) and layout.shard != "none":
        yield "objective.kl_target", f"is not there with {layout.shard}", "leave it out, or set layout.shard to none"
    if kinds:
        yield from _of_parts(config, kinds)
    if "tensor" in kinds:
        yield from _of_tensor(config)


def _of_parts(config: Any, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    method, objective = config.method, config.objective
    if config.precision.compute == "fp16":
        yield "precision.compute", f"fp16 and its loss scaling are not there with {kinds[0]}", "take bf16"
    for kind in kinds:
        if method.kind not in METHODS[kind]:
            yield "method", f"{method.kind} is not there with {kind}; {', '.join(METHODS[kind])} are", _ALONE
    if objective.kind not in OBJECTIVES:
        yield "objective", f"{objective.kind} is not there with {kinds[0]}; {' and '.join(OBJECTIVES)} are", _ALONE
    if method.kind == "prefix_layer" and method.reparameterise:
        yield "method.reparameterise", "one table for all blocks, and a process has some of each", _ALONE
    if "pipeline" in kinds and not config.data.packing:
        yield "data.packing", "a pipeline has documents end to end", "set it to true"


def _of_tensor(config: Any) -> Iterator[tuple[str, str, str]]:
    method = config.method
    if method.kind == "lora" and method.dora:
        yield "method.dora", "the lengths of rows that processes split are not there", f"leave it out, {_ALONE}"
    if method.kind == "adapter" and method.style == "parallel":
        yield "method.style", "parallel reads what every process has, within what they split", "take another style"
    if method.kind == "lora" and method.dropout:
        yield "method.dropout", "processes that split a matrix cannot draw the same zeros", "set it to 0"
    if config.train.recompute != "none":
        yield "train.recompute", "what is made again would be sent again between parts of a matrix", "set it to none"


def check_model(layout: LayoutSection, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a model that cannot be cut so, from its config.json."""
    for kind in _kinds(layout):
        name = family_of(settings).name
        if name not in FAMILIES[kind]:
            told = f"how to cut {name} is not known; it is for {', '.join(FAMILIES[kind])}"
            raise ConfigError(told, where=f"layout.{kind}", hint="layout.data works for every family")
    if layout.pipeline > 1:
        _check_blocks(layout, int(settings["num_hidden_layers"]))
    if layout.tensor > 1:
        _check_matrices(layout, settings)


def _check_matrices(layout: LayoutSection, settings: Mapping[str, Any]) -> None:
    heads = int(settings["num_attention_heads"])
    sizes = {
        "heads": heads,
        "heads of keys and values": int(settings.get("num_key_value_heads") or heads),
        "inner features of the MLP": int(settings["intermediate_size"]),
    }
    for told, size in sizes.items():
        if size % layout.tensor:
            possible = [count for count in range(2, size + 1) if not any(held % count for held in sizes.values())]
            hint = f"the model can be cut into {' or '.join(map(str, possible))}" if possible else "use layout.pipeline"
            raise ConfigError(f"{size} {told} cannot be cut into {layout.tensor}", where="layout.tensor", hint=hint)
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            raise ConfigError(f"{key}: biases behind a sum are not there", where="layout.tensor", hint="use pipeline")
    if settings.get("attention_dropout"):
        told = f"the model drops {settings['attention_dropout']} of its attention, which parts cannot do alike"
        raise ConfigError(told, where="layout.tensor", hint="use layout.pipeline")


def _check_blocks(layout: LayoutSection, blocks: int) -> None:
    if blocks < layout.stages:
        told = f"{layout.stages} parts of {blocks} blocks"
        raise ConfigError(told, where="layout.pipeline", hint=f"at most {blocks}, and half of it interleaved")


def _kinds(layout: LayoutSection) -> tuple[str, ...]:
    """What of a model the layout cuts."""
    return tuple(kind for kind in ("tensor", "pipeline") if getattr(layout, kind) > 1)
