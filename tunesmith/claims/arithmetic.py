"""Claims that follow by arithmetic: memory, data types, energy, data sizes, averages of tables."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from tunesmith.claims.claim import Claim
from tunesmith.parallel.layout import Shard

_ENERGY, _ZERO = "CS839 training: energy of five models", "CS685 fine-tuning: ZeRO table"
_COST, _DDP = "CS685 fine-tuning: cost of a 3B model", "CS224N lecture 12: data parallel"
_NEED, _TYPES = "Instruction finetuning: memory table", "Instruction finetuning: data types"
_TOKENS, _HALF = "Instruction finetuning: Chinchilla table", "CS224N lecture 12: half precision"
_SCALE, _SUNK = "CS839 training: training at scale", "CSE585 post-training: sparse upcycling"
_GLUE, _LIMA = "CSE585 post-training, LoRA: GLUE table, averages", "CSE585 post-training: LIMA"

# average input and output tokens of LIMA's training examples, by source: how many, in, out
_LIMA_SOURCES = ((200, 117, 523), (200, 119, 530), (200, 12, 1811), (150, 34, 274), (50, 236, 92), (200, 40, 334))


def _energy(gpu_hours: int) -> Callable[[], Fraction]:
    """MWh at 400 W a GPU and a power usage effectiveness of 1.1 (Touvron et al. 2023, arXiv 2302.13971, section 6)."""
    return lambda: Fraction(gpu_hours * 400, 10**6) * Fraction(11, 10)


def _carbon(gpu_hours: int) -> Callable[[], Fraction]:
    """Tonnes of CO2 equivalents at 0.385 a MWh."""
    return lambda: _energy(gpu_hours)() * Fraction(385, 1000)


def _state(parameters: int, of: str = "state_bytes") -> Callable[[], int]:
    """Bytes of a model that trains in 16 bits with float32 masters and AdamW, as the planner counts them."""

    def count() -> int:
        from tunesmith.plan.memory import TensorSpec, count_memory

        memory = count_memory([TensorSpec("model", (parameters,), 2, trainable=True)])
        return memory.master_bytes + memory.optimizer_bytes if of == "adam" else int(getattr(memory, of))

    return count


def _in_float32(parameters: int) -> Callable[[], int]:
    """Bytes of training in 32 bits: weights, gradients and AdamW as the planner counts them, and the 8 bytes a
    parameter that the table has for activations and what is temporary."""

    def count() -> int:
        from tunesmith.plan.memory import TensorSpec, count_memory

        return count_memory([TensorSpec("model", (parameters,), 4, trainable=True)]).state_bytes + 8 * parameters

    return count


def _devices(parameters: int, gigabytes: int) -> Callable[[], int]:
    """How many devices of that memory hold what training in 32 bits takes."""
    return lambda: -(-_in_float32(parameters)() // (gigabytes * 10**9))


def _months(gpu_hours: int, gpus: int) -> Callable[[], Fraction]:
    """Of 365.25 / 12 days."""
    return lambda: Fraction(gpu_hours, gpus) / (Fraction(36525, 1200) * 24)


def _zero(shard: Shard) -> Callable[[], int]:
    """Bytes a device of 64 that train 7.5 B parameters, as the planner of clusters spreads them (arXiv 1910.02054,
    figure 1): weights and gradients in 16 bits, K = 12 for float32 masters and two moments."""

    def count() -> int:
        from tunesmith.plan.pieces import State

        psi = 7_500_000_000
        whole = State(weights_bytes=2 * psi, master_bytes=4 * psi, gradients_bytes=2 * psi, optimizer_bytes=8 * psi)
        return whole.held(shard, 64).total_bytes

    return count


def _bits(dtype: str, part: str) -> Callable[[], int]:
    """Bits of the exponent or the fraction of a floating-point type, from what torch says of it."""

    def count() -> int:
        import math

        import torch

        found = torch.finfo(getattr(torch, dtype))
        fraction = round(-math.log2(found.eps))
        return fraction if part == "fraction" else found.bits - 1 - fraction

    return count


def _pi(dtype: str) -> Callable[[], float]:
    def rounded() -> float:
        import math

        import torch

        return torch.tensor(math.pi, dtype=getattr(torch, dtype)).double().item()

    return rounded


def _half(number: float) -> Callable[[], float]:
    """A number as float16 holds it."""

    def rounded() -> float:
        import torch

        return torch.tensor(number, dtype=torch.float16).double().item()

    return rounded


def _limit(dtype: str, name: str) -> Callable[[], float]:
    def found() -> float:
        import torch

        return float(getattr(torch.finfo(getattr(torch, dtype)), name))

    return found


def _not_finite() -> int:
    """Bit patterns of bfloat16 that are infinite or no number."""
    import torch

    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return int((~torch.isfinite(every)).sum())


def _mean(scores: str) -> Callable[[], Fraction]:
    numbers = [Fraction(score) for score in scores.split()]
    return lambda: sum(numbers, Fraction()) / len(numbers)


def _twenty(billions: int) -> Callable[[], int]:
    """Tokens for so many billion parameters, 20 each (Hoffmann et al. 2022, arXiv 2203.15556)."""
    return lambda: 20 * billions * 10**9


def _lima(*, part: str) -> Callable[[], int]:
    sizes = {"examples": lambda n, x, y: n, "tokens": lambda n, x, y: n * (x + y)}
    return lambda: sum(sizes[part](*source) for source in _LIMA_SOURCES)


NOTES = {
    "energy-bloom": "at the stated 400 W and PUE 1.1",
    "energy-llama-65b": "cut, not rounded",
    "memory-1b-training": "at the 24 bytes a parameter of the same table",
    "memory-175b-training": "at the 24 bytes a parameter of the same table; 7000 GB would be 40",
    "gpt3-devices": "at the 24 bytes a parameter of the same table; its own 7000 GB would take 88",
    "llama-months": "2048 GPUs at the GPU-hours of its four models; 5 months are of the whole development",
    "palm-work": "6 x 540 B parameters x 780 B tokens (Chowdhery et al. 2022)",
    "cost-3b-adam": "master weights and two moments, 12 bytes a parameter",
    "pi-fp32": "the slide shows the float nearest to 3.141592",
    "fp16-smallest": "the slide lost the minus and the base: 2^-14",
    "fp16-largest": "the slide means 2^15, the largest power of two",
    "bf16-not-finite": "infinities and NaNs, of which the slide says there are none; they are only rarer",
    "lima-tokens": "prompts and answers together",
}

_MWH, _T, _GB = "MWh", "t CO2", "bytes"

ARITHMETIC = (
    Claim("energy-opt", _ENERGY, "356", _MWH, _energy(809_472)),
    Claim("energy-bloom", _ENERGY, "475", _MWH, _energy(1_082_880)),
    Claim("energy-llama-7b", _ENERGY, "36", _MWH, _energy(82_432)),
    Claim("energy-llama-13b", _ENERGY, "59", _MWH, _energy(135_168)),
    Claim("energy-llama-33b", _ENERGY, "233", _MWH, _energy(530_432)),
    Claim("energy-llama-65b", _ENERGY, "449", _MWH, _energy(1_022_362)),
    Claim("carbon-opt", _ENERGY, "137", _T, _carbon(809_472)),
    Claim("carbon-bloom", _ENERGY, "183", _T, _carbon(1_082_880)),
    Claim("carbon-llama-7b", _ENERGY, "14", _T, _carbon(82_432)),
    Claim("carbon-llama-13b", _ENERGY, "23", _T, _carbon(135_168)),
    Claim("carbon-llama-33b", _ENERGY, "90", _T, _carbon(530_432)),
    Claim("carbon-llama-65b", _ENERGY, "173", _T, _carbon(1_022_362)),
    Claim("llama-months", _SCALE, "5", "months", _months(82_432 + 135_168 + 530_432 + 1_022_362, 2048)),
    Claim("palm-work", _SUNK, "2000", "ZFLOP", lambda: Fraction(6 * 540 * 780 * 10**18, 10**21)),
    Claim("memory-1b-weights", _NEED, "4 G", _GB, lambda: 4 * 10**9),
    Claim("memory-1b-training", _NEED, "80 G", _GB, _in_float32(10**9)),
    Claim("memory-175b-training", _NEED, "7000 G", _GB, _in_float32(175 * 10**9)),
    Claim("gpt3-devices", _NEED, "200", "A100 of 80 GB", _devices(175 * 10**9, 80)),
    Claim("fp32-exponent", _TYPES, "8", "bits", _bits("float32", "exponent")),
    Claim("fp32-fraction", _TYPES, "23", "bits", _bits("float32", "fraction")),
    Claim("fp16-exponent", _TYPES, "5", "bits", _bits("float16", "exponent")),
    Claim("fp16-fraction", _TYPES, "10", "bits", _bits("float16", "fraction")),
    Claim("bf16-exponent", _TYPES, "8", "bits", _bits("bfloat16", "exponent")),
    Claim("bf16-fraction", _TYPES, "7", "bits", _bits("bfloat16", "fraction")),
    Claim("int8-fraction", _TYPES, "7", "bits", lambda: 8 - 1),
    Claim("pi-fp32", _TYPES, "3.14159202", "", _pi("float32")),
    Claim("pi-fp16", _TYPES, "3.140625", "", _pi("float16")),
    Claim("pi-bf16", _TYPES, "3.140625", "", _pi("bfloat16")),
    Claim("fp32-spacing", _HALF, "1.1920929e-7", "", _limit("float32", "eps")),
    Claim("fp16-smallest", _HALF, "2e-14", "", _limit("float16", "tiny")),
    Claim("fp16-largest", _HALF, "2e15", "", _limit("float16", "max")),
    Claim("fp16-rounding", _HALF, "1", "", _half(1.0001)),
    Claim("bf16-not-finite", _HALF, "0", "bit patterns", _not_finite),
    Claim("ddp-memory", _DDP, "16", "bytes a parameter", _state(1)),
    Claim("ddp-traffic", _DDP, "2", "bytes a parameter", _state(1, "gradients_bytes")),
    Claim("cost-3b", _COST, "48 G", _GB, _state(3_000_000_000)),
    Claim("cost-3b-weights", _COST, "6 G", _GB, _state(3_000_000_000, "weights_bytes")),
    Claim("cost-3b-gradients", _COST, "6 G", _GB, _state(3_000_000_000, "gradients_bytes")),
    Claim("cost-3b-adam", _COST, "36 G", _GB, _state(3_000_000_000, "adam")),
    Claim("zero-0", _ZERO, "120 G", _GB, _zero("none")),
    Claim("zero-1", _ZERO, "31.4 G", _GB, _zero("zero1")),
    Claim("zero-2", _ZERO, "16.6 G", _GB, _zero("zero2")),
    Claim("zero-3", _ZERO, "1.9 G", _GB, _zero("zero3")),
    Claim("chinchilla-ratio", _TOKENS, "20", "tokens a parameter", lambda: Fraction(1_400_000_000_000, 70_000_000_000)),
    Claim("chinchilla-70b", _TOKENS, "1.4 T", "tokens", _twenty(70)),
    Claim("chinchilla-llama", _TOKENS, "1.3 T", "tokens", _twenty(65)),
    Claim("chinchilla-falcon", _TOKENS, "0.8 T", "tokens", _twenty(40)),
    Claim("chinchilla-bloomberg", _TOKENS, "1 T", "tokens", _twenty(50)),
    Claim("chinchilla-gpt3", _TOKENS, "3.5 T", "tokens", _twenty(175)),
    Claim("chinchilla-bloom", _TOKENS, "3.5 T", "tokens", _twenty(176)),
    Claim("chinchilla-opt", _TOKENS, "3.5 T", "tokens", _twenty(175)),
    Claim("glue-full", _GLUE, "86.4", "mean score", _mean("87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2")),
    Claim("glue-bitfit", _GLUE, "85.2", "mean score", _mean("84.7 93.7 92.7 62.0 91.8 84.0 81.5 90.8")),
    Claim("glue-lora", _GLUE, "87.2", "mean score", _mean("87.5 95.1 89.7 63.4 93.3 90.8 86.6 91.5")),
    Claim("lima-examples", _LIMA, "1000", "examples", _lima(part="examples")),
    Claim("lima-tokens", _LIMA, "750 k", "tokens", _lima(part="tokens")),
    Claim("lima-test", _LIMA, "300", "prompts", lambda: 70 + 230),
)  # fmt: skip
