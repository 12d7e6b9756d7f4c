"""The sizes in which families of models were published, and a rule for families of which none are listed here.

The one idea: a config is scaled by writing other sizes under its own keys, so that whatever else it says stays. Sizes
are those of the config.json that each model was published with; their parameter counts are a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.plan.shape import KEYS, ModelShape, read_shape

Sizes = tuple[int, int, int, int, int, int, bool]

# family to model to blocks, width, heads, heads of keys, width of the MLP, vocabulary, whether the head is tied
PUBLISHED: dict[str, dict[str, Sizes]] = {
    "llama": {
        "SmolLM2-135M": (30, 576, 9, 3, 1536, 49_152, True),
        "SmolLM2-360M": (32, 960, 15, 5, 2560, 49_152, True),
        "Llama-3.2-1B": (16, 2048, 32, 8, 8192, 128_256, True),
        "SmolLM2-1.7B": (24, 2048, 32, 32, 8192, 49_152, True),
        "Llama-3.2-3B": (28, 3072, 24, 8, 8192, 128_256, True),
        "Llama-2-7B": (32, 4096, 32, 32, 11_008, 32_000, False),
        "Llama-3-8B": (32, 4096, 32, 8, 14_336, 128_256, False),
        "Llama-2-13B": (40, 5120, 40, 40, 13_824, 32_000, False),
        "Llama-2-70B": (80, 8192, 64, 8, 28_672, 32_000, False),
        "Llama-3-70B": (80, 8192, 64, 8, 28_672, 128_256, False),
        "Llama-3.1-405B": (126, 16_384, 128, 8, 53_248, 128_256, False),
    },
    "qwen2": {
        "Qwen2.5-0.5B": (24, 896, 14, 2, 4864, 151_936, True),
        "Qwen2.5-1.5B": (28, 1536, 12, 2, 8960, 151_936, True),
        "Qwen2.5-3B": (36, 2048, 16, 2, 11_008, 151_936, True),
        "Qwen2.5-7B": (28, 3584, 28, 4, 18_944, 152_064, False),
        "Qwen2.5-14B": (48, 5120, 40, 8, 13_824, 152_064, False),
        "Qwen2.5-32B": (64, 5120, 40, 8, 27_648, 152_064, False),
        "Qwen2.5-72B": (80, 8192, 64, 8, 29_568, 152_064, False),
    },
    "gpt2": {
        "gpt2": (12, 768, 12, 12, 3072, 50_257, True),
        "gpt2-medium": (24, 1024, 16, 16, 4096, 50_257, True),
        "gpt2-large": (36, 1280, 20, 20, 5120, 50_257, True),
        "gpt2-xl": (48, 1600, 25, 25, 6400, 50_257, True),
    },
    "bert": {
        "MiniLM-L6": (6, 384, 12, 12, 1536, 30_522, True),
        "bert-base": (12, 768, 12, 12, 3072, 30_522, True),
        "bert-large": (24, 1024, 16, 16, 4096, 30_522, True),
    },
    "roberta": {
        "roberta-base": (12, 768, 12, 12, 3072, 50_265, True),
        "roberta-large": (24, 1024, 16, 16, 4096, 50_265, True),
    },
}
# of a family without published sizes: so many times the blocks of its config at the most
MOST_TIMES = 16
# what is said block by block, or names a token: not of a model of other sizes
_DROPPED = ("layer_types", "max_window_layers", "pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Rung:
    """A size of a family.

    Attributes:
        name: of the model that was published so, or the number of its blocks.
        shape: its sizes.
    """

    name: str
    shape: ModelShape

    @property
    def matrix_numbers(self) -> int:
        """About how many parameters it has: those of all matrices."""
        shape = self.shape
        return shape.matrix_parameters + shape.head_parameters * (1 if shape.tied else 2)


def rungs(config: Mapping[str, Any]) -> list[Rung]:
    """The sizes of a config's family, the smallest first: as published, else as many blocks as `blocks_of` gives."""
    shape = read_shape(config)
    published = PUBLISHED.get(shape.family)
    found = [Rung(name, _shaped(shape, sizes)) for name, sizes in published.items()] if published else _by_rule(shape)
    return sorted(found, key=lambda rung: rung.matrix_numbers)


def scaled(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """A config with other sizes, each under the config's own key for it."""
    found = {key: value for key, value in config.items() if key not in _DROPPED}
    for name, keys in KEYS.items():
        found[next((key for key in keys if key in config), keys[0])] = getattr(shape, name)
    return {**found, "tie_word_embeddings": shape.tied}


def _shaped(shape: ModelShape, sizes: Sizes) -> ModelShape:
    blocks, width, heads, keys, inner, vocab, tied = sizes
    return replace(
        shape, n_layers=blocks, d_model=width, n_heads=heads, n_kv_heads=keys, d_head=width // heads, d_mlp=inner,
        vocab=vocab, tied=tied,
    )  # fmt: skip


def _by_rule(shape: ModelShape) -> list[Rung]:
    """Blocks and width grow together, heads with the width, and a head stays as wide (Kaplan et al. 2020, arXiv
    2001.08361, section 3.1: how a size is spread over depth and width matters little)."""
    group = max(1, shape.n_heads // shape.n_kv_heads)
    found = {}
    for eighths in range(4, 8 * MOST_TIMES + 1):
        heads = group * max(1, round(shape.n_kv_heads * eighths / 8))
        width = shape.d_model * heads // shape.n_heads
        blocks = max(1, round(shape.n_layers * heads / shape.n_heads))
        inner = round(shape.d_mlp * heads / shape.n_heads)
        made = replace(shape, n_layers=blocks, d_model=width, n_heads=heads, n_kv_heads=heads // group, d_mlp=inner)
        found[heads] = Rung(f"{blocks} blocks of width {width}", made)
    return list(found.values())
