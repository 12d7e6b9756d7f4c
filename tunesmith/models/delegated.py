"""Writing through transformers' own loop, for models whose memory is not a column of keys and values per token.

Encoder-decoders read the prompt with a mask and run in batches; recurrent decoders run row by row, because padding
would enter their state. Neither gains from a shared prefix: it is read with each prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tunesmith.core.rng import seed_for
from tunesmith.models.seq2seq import end_ids, start_id
from tunesmith.models.soft import roomy


class Delegate:
    """Writes with `model.generate`, under settings that owe nothing to the model's own generation settings."""

    def __init__(self, model: Any, *, limit: int, stops: set[int], temperature: float, top_p: float, seed: int) -> None:
        self.model, self.stops, self.seed = model, stops, seed
        self.sampled = temperature > 0
        self.encoder = bool(model.config.is_encoder_decoder)
        drawing = {"temperature": temperature, "top_p": top_p, "top_k": 0} if self.sampled else {}
        self.end = end_ids(model.config) if self.encoder else []
        self.settings = GenerationConfig(
            max_new_tokens=limit,
            do_sample=self.sampled,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=sorted(stops) or -1,
            pad_token_id=0,
            decoder_start_token_id=start_id(model),
            **drawing,
        )

    def batches(self, order: list[int], size: int) -> Iterator[list[int]]:
        """Rows that are written together: one at a time where others would matter."""
        size = size if self.encoder and not self.sampled else 1
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def write(self, prompts: list[list[int]], numbers: list[int]) -> list[list[int]]:
        """The tokens after each prompt; a stop token, where there is one, is the last."""
        # an encoder reads an end token, in training as here
        texts = [torch.tensor([*prompt, *self.end]) for prompt in prompts]
        with torch.random.fork_rng(enabled=self.sampled), roomy(self.model, None, texts) as wide:
            ids, seen = _padded(wide, self.model.device)
            if self.sampled:
                torch.manual_seed(seed_for(self.seed, "sampling", *numbers))
            found = self.model.generate(input_ids=ids, attention_mask=seen, generation_config=self.settings)
        start = 1 if self.encoder else ids.shape[1]
        return [self._until_stop(row) for row in found[:, start:].tolist()]

    def _until_stop(self, row: list[int]) -> list[int]:
        end = next((place + 1 for place, token in enumerate(row) if token in self.stops), len(row))
        return row[:end]


def _padded(prompts: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [rows, longest]; the encoder hears of padding through the mask only."""
    shape = len(prompts), max(map(len, prompts))
    ids, seen = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        seen[row, : len(prompt)] = 1
    return ids.to(device), seen.to(device)
