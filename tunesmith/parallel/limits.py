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
TENSOR = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite")
# and those whose blocks are one behind the other, with nothing but an embedding before and a norm and a head after
PIPELINE = (*TENSOR, "olmo2", "cohere", "phi3")
METHODS, OBJECTIVES = ("full", "lora"), ("sft",)


def refusals(config: Any) -> Iterator[tuple[str, str, str]]:
    """What of a configuration its layout cannot do: the key, what is wrong, and a hint."""
    layout, stop = config.layout, config.train.stop
    if layout.processes > 1 and config.train.cache_trunk:
        yield "train.cache_trunk", "is for one process, and the layout has several", "leave it out"
    if layout.processes > 1 and config.train.optimizer_state == "int8":
        told = "int8 codes are of blocks of whole tensors, and processes of a layout may hold parts of them"
        yield "train.optimizer_state", told, "take bf16"
    if config.precision.base != "same" and (layout.shard == "zero3" or _kind(layout)):
        told = f"{config.precision.base} holds codes, and {_kind(layout) or 'zero3'} splits numbers"
        yield "precision.base", told, "set it to same, or use layout.data without zero3"
    judged = config.objective.predicts or config.objective.compares
    is_written = stop is not None and stop.metric not in ("loss", "perplexity") and not judged
    if is_written and (layout.shard == "zero3" or _kind(layout)):
        told = f"is of written text, and {_kind(layout) or 'zero3'} has no whole model to write with"
        yield "train.stop.metric", told, "take loss, or zero2"
    if _kind(layout):
        yield from _of_parts(config, _kind(layout))


def _of_parts(config: Any, kind: str) -> Iterator[tuple[str, str, str]]:
    method, objective = config.method, config.objective
    if config.precision.compute == "fp16":
        yield "precision.compute", f"fp16 and its loss scaling are not there with {kind}", "take bf16"
    if method.kind not in METHODS:
        yield "method", f"{method.kind} is not there with {kind}; {' and '.join(METHODS)} are", "or layout.data alone"
    if objective.kind not in OBJECTIVES:
        yield "objective", f"{objective.kind} is not there with {kind}; sft is", "or layout.data alone"
    for key, plain in (("dora", False), ("init", "default"), ("also_train", ())):
        if method.kind == "lora" and getattr(method, key) != plain:
            yield f"method.{key}", f"is not there with {kind}", "leave it out, or use layout.data alone"
    if kind == "pipeline":
        if not config.data.packing:
            yield "data.packing", "a pipeline has documents end to end", "set it to true"
        return
    if method.kind == "lora" and method.dropout:
        yield "method.dropout", "processes that split a matrix cannot draw the same zeros", "set it to 0"
    if config.train.recompute != "none":
        yield "train.recompute", "what is made again would be sent again between parts of a matrix", "set it to none"


def check_model(layout: LayoutSection, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a model that cannot be cut so, from its config.json."""
    kind = _kind(layout)
    if not kind:
        return
    name, known = family_of(settings).name, TENSOR if layout.tensor > 1 else PIPELINE
    if name not in known:
        told = f"how to cut {name} is not known; it is for {', '.join(known)}"
        raise ConfigError(told, where=f"layout.{kind}", hint="layout.data works for every family")
    if layout.pipeline > 1:
        _check_blocks(layout, int(settings["num_hidden_layers"]))
        return
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


def _kind(layout: LayoutSection) -> str:
    return "tensor" if layout.tensor > 1 else "pipeline" if layout.pipeline > 1 else ""
