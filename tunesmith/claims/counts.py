"""Claims about how many parameters a method trains, and what storing them takes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial

from tunesmith.claims.claim import Claim
from tunesmith.claims.subjects import size, trains, trains_of_map

_POST = "CSE585 post-training, LoRA"
_GLUE, _E2E, _GPT3 = f"{_POST}: GLUE table", f"{_POST}: E2E NLG table", f"{_POST}: GPT-3 table"
_GRID, _STORE = f"{_POST}: budget of 18 M", f"{_POST}: what deployment takes"
_TUNING = "Instruction finetuning"
_EXAMPLE, _PROMPT = f"{_TUNING}: LoRA example", f"{_TUNING}: prompt tuning"

_P = "parameters"
_gpt3, _t5, _deberta = partial(trains, "gpt3"), partial(trains, "t5-xxl"), partial(trains, "deberta-xxl")
_medium, _large = partial(trains, "gpt2-medium"), partial(trains, "gpt2-large")
_roberta, _roberta_large = partial(trains, "roberta-base"), partial(trains, "roberta-large")


def full_bytes() -> int:
    """A checkpoint of GPT-3 in 16 bits."""
    return 2 * size("gpt3")


def adapter_bytes() -> int:
    """A checkpoint of its LoRA of rank 4 on q and v in 16 bits."""
    return 2 * _gpt3("lora", rank=4)()


def _least_training_bytes() -> int:
    from tunesmith.plan.memory import TensorSpec, count_memory

    weights = TensorSpec("gpt3", (size("gpt3"),), 2, trainable=True)
    return count_memory([weights], master=False, optimizer_state="bf16").state_bytes


def _lora_training_bytes() -> int:
    from tunesmith.plan.memory import TensorSpec, count_memory

    small = _gpt3("lora", rank=4)()
    tensors = [TensorSpec("base", (size("gpt3"),), 2), TensorSpec("lora", (small,), 4, trainable=True)]
    return count_memory(tensors).state_bytes


def _saved_percent() -> Fraction:
    return 100 * (1 - Fraction(trains_of_map(512, 64, rank=8), 512 * 64))


def _prompt_orders() -> float:
    import math

    return math.log10(size("t5-xxl") / _t5("prompt", length=5)())


def _cell(rank: int, *targets: str) -> Callable[[], int]:
    return _gpt3("lora", rank=rank, targets=list(targets))


_CELLS = ("q", "k", "v", "o", "qk", "qv", "qkvo")
NOTES = {
    **dict.fromkeys((f"grid-{roles}" for roles in _CELLS), "18 x 2^20, all seven alike"),
    "gpt3-full": "the stated shape has 0.4 % fewer parameters",
    "gpt3-bitfit": "every bias of the stated shape",
    "gpt3-prefix-embed": "256 + 8 vectors of 12,288",
    "gpt3-prefix-layer": "8 + 8 vectors a block, as 8 keys and 8 values",
    "gpt3-checkpoint": "16 bits a parameter",
    "gpt3-lora-checkpoint": "rank 4 on q and v in 16 bits; 36.0 x 2^20 bytes",
    "gpt3-full-memory": "weights, gradients and both moments of Adam, all in 16 bits",
    "gpt3-lora-memory": "frozen weights in 16 bits, factors and Adam in 32",
    "roberta-base-full": "with the pooler, without a task head",
    "roberta-base-adapter-d-s16": "size 16 in every block",
    "roberta-base-adapter-d-s48": "size 48 in every block",
    "roberta-large-adapter-p-s60": "size 60, as would 61",
    "roberta-large-adapter-h-s60": "size 60, as would 61",
    "gpt2-medium-prefix-layer": "7 keys and values a block, which comes nearest",
    "gpt2-large-prefix-layer": "8 keys and values a block, which comes nearest",
    "roberta-large-adapter-p": "size 16",
    "roberta-large-adapter-h": "size 8",
    "gpt2-medium-full": "the stated shape has 0.1 M fewer",
    "gpt2-medium-adapter-l-r6": "size 6, with a layer norm in each",
    "gpt2-medium-adapter-l-r224": "size 224, with a layer norm in each",
    "gpt2-medium-adapter-h": "size 112, which comes nearest",
    "gpt2-medium-lora": "rank 4 on q and v, as stated",
    "gpt2-large-adapter-l-r8": "size 8, which gives it",
    "gpt2-large-adapter-l-r248": "size 248, which gives it",
    "gpt2-large-lora": "rank 4 on q and v, as stated",
    "lora-512x64": "4,096 + 512 instead of 32,768",
    "t5-xxl-prompt": "5 vectors of 4,096",
}

COUNTS = (
    Claim("gpt3-full", _GPT3, "175,255.8 M", _P, _gpt3("full")),
    Claim("gpt3-lora-r1", _GPT3, "4.7 M", _P, _gpt3("lora", rank=1)),
    Claim("gpt3-lora-r8", _GPT3, "37.7 M", _P, _gpt3("lora", rank=8)),
    Claim("gpt3-bitfit", _GPT3, "14.2 M", _P, _gpt3("bitfit")),
    Claim("gpt3-prefix-embed", _GPT3, "3.2 M", _P, _gpt3("prefix_embed", prefix=256, infix=8)),
    Claim("gpt3-prefix-layer", _GPT3, "20.2 M", _P, _gpt3("prefix_layer", length=8)),
    Claim("gpt3-adapter-h-r1", _GPT3, "7.1 M", _P, _gpt3("adapter", style="houlsby", size=1)),
    Claim("gpt3-adapter-h-r8", _GPT3, "40.1 M", _P, _gpt3("adapter", style="houlsby", size=8)),
    Claim("grid-q", _GRID, "18 M", _P, _cell(8, "q")),
    Claim("grid-k", _GRID, "18 M", _P, _cell(8, "k")),
    Claim("grid-v", _GRID, "18 M", _P, _cell(8, "v")),
    Claim("grid-o", _GRID, "18 M", _P, _cell(8, "o")),
    Claim("grid-qk", _GRID, "18 M", _P, _cell(4, "q", "k")),
    Claim("grid-qv", _GRID, "18 M", _P, _cell(4, "q", "v")),
    Claim("grid-qkvo", _GRID, "18 M", _P, _cell(2, "q", "k", "v", "o")),
    Claim("gpt3-checkpoint", _STORE, "350 G", "bytes", full_bytes),
    Claim("gpt3-lora-checkpoint", _STORE, "35 M", "bytes", adapter_bytes),
    Claim("gpt3-checkpoint-ratio", _STORE, "10000", "times smaller", lambda: Fraction(full_bytes(), adapter_bytes())),
    Claim("gpt3-full-memory", _STORE, "1.2 T", "bytes", _least_training_bytes),
    Claim("gpt3-lora-memory", _STORE, "350 G", "bytes", _lora_training_bytes),
    Claim("roberta-base-full", _GLUE, "125.0 M", _P, _roberta("full")),
    Claim("roberta-base-bitfit", _GLUE, "0.1 M", _P, _roberta("bitfit")),
    Claim("roberta-base-lora", _GLUE, "0.3 M", _P, _roberta("lora", rank=8)),
    Claim("roberta-large-full", _GLUE, "355 M", _P, _roberta_large("full")),
    Claim("roberta-large-lora", _GLUE, "0.8 M", _P, _roberta_large("lora", rank=8)),
    Claim("roberta-base-adapter-d-s16", _GLUE, "0.3 M", _P, _roberta("adapter", style="pfeiffer", size=16)),
    Claim("roberta-base-adapter-d-s48", _GLUE, "0.9 M", _P, _roberta("adapter", style="pfeiffer", size=48)),
    Claim("roberta-large-adapter-p-s60", _GLUE, "3.0 M", _P, _roberta_large("adapter", style="pfeiffer", size=60)),
    Claim("roberta-large-adapter-h-s60", _GLUE, "6.0 M", _P, _roberta_large("adapter", style="houlsby", size=60)),
    Claim("roberta-large-adapter-p", _GLUE, "0.8 M", _P, _roberta_large("adapter", style="pfeiffer", size=16)),
    Claim("roberta-large-adapter-h", _GLUE, "0.8 M", _P, _roberta_large("adapter", style="houlsby", size=8)),
    Claim("deberta-xxl-full", _GLUE, "1500 M", _P, _deberta("full")),
    Claim("deberta-xxl-lora", _GLUE, "4.7 M", _P, _deberta("lora", rank=16)),
    Claim("gpt2-medium-full", _E2E, "354.92 M", _P, _medium("full")),
    Claim("gpt2-medium-adapter-l-r6", _E2E, "0.37 M", _P, _medium("adapter", style="lin", size=6)),
    Claim("gpt2-medium-adapter-l-r224", _E2E, "11.09 M", _P, _medium("adapter", style="lin", size=224)),
    Claim("gpt2-medium-adapter-h", _E2E, "11.09 M", _P, _medium("adapter", style="houlsby", size=112)),
    Claim("gpt2-medium-top2", _E2E, "25.19 M", _P, _medium("top_layers", layers=2)),
    Claim("gpt2-medium-prefix-layer", _E2E, "0.35 M", _P, _medium("prefix_layer", length=7)),
    Claim("gpt2-medium-lora", _E2E, "0.35 M", _P, _medium("lora", rank=4)),
    Claim("gpt2-large-full", _E2E, "774.03 M", _P, _large("full")),
    Claim("gpt2-large-adapter-l-r8", _E2E, "0.88 M", _P, _large("adapter", style="lin", size=8)),
    Claim("gpt2-large-adapter-l-r248", _E2E, "23.00 M", _P, _large("adapter", style="lin", size=248)),
    Claim("gpt2-large-prefix-layer", _E2E, "0.77 M", _P, _large("prefix_layer", length=8)),
    Claim("gpt2-large-lora", _E2E, "0.77 M", _P, _large("lora", rank=4)),
    Claim("lora-512x64", _EXAMPLE, "4,608", _P, lambda: trains_of_map(512, 64, rank=8)),
    Claim("lora-512x64-saved", _EXAMPLE, "86", "% fewer", _saved_percent),
    Claim("t5-xxl-full", _PROMPT, "11 B", _P, _t5("full")),
    Claim("t5-xxl-prompt", _PROMPT, "20,480", _P, _t5("prompt", length=5)),
    Claim("t5-xxl-prompt-ratio", _PROMPT, "5.7", "orders of magnitude", _prompt_orders),
)  # fmt: skip
