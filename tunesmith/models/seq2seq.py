"""Encoder-decoders: a document is split where its first answer begins; one side reads what is before, one writes.

The one idea: the encoder gets the prompt and its end token, the decoder the start token and the answer, as T5 was
trained (Raffel et al. 2020, arXiv 1910.10683, section 2.1). Rows are padded under a mask; `delegated.py` writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tunesmith.models.cross_entropy import wide
from tunesmith.models.families import setting
from tunesmith.models.soft import roomy

if TYPE_CHECKING:
    from tunesmith.core.types import Batch
    from tunesmith.models.policy import Policy


def token_losses(policy: Policy, batch: Batch) -> Tensor:
    """Negative log-likelihood of each supervised target: float32 (float64 of a float64 model) [supervised].

    The encoder reads each document up to its first supervised token; what follows is the decoder's, and only
    supervised tokens of it count.
    """
    parts, prompts = _parts(batch), prompts_of(batch)
    end = batch.ids.new_tensor(end_ids(policy.config))
    heard = [torch.cat([part[:length], end]) for part, length in zip(parts, prompts, strict=True)]
    start = batch.ids.new_tensor([start_id(policy.model)])
    given = [torch.cat([start, part[length:-1]]) for part, length in zip(parts, prompts, strict=True)]
    with policy.route.enter(), roomy(policy.model, policy.route, heard) as texts:
        logits = policy.model(**_encoder(texts), decoder_input_ids=pad_sequence(given, True), use_cache=False).logits
    ends = torch.tensor(batch.lengths, device=batch.ids.device).cumsum(0)
    targets = batch.sources + 1
    rows = torch.searchsorted(ends, targets, right=True)
    begins = ends - torch.tensor(batch.lengths, device=ends.device) + torch.tensor(prompts, device=ends.device)
    chosen = logits[rows, targets - begins[rows]]
    return nn.functional.cross_entropy(chosen.to(wide(chosen.dtype)), batch.targets, reduction="none")


def start_states(policy: Policy, batch: Batch) -> Tensor:
    """The decoder's first state for each document, which the encoder reads whole as it is: [documents, width]."""
    start = batch.ids.new_full((len(batch.lengths), 1), start_id(policy.model))
    model: Any = policy.model
    with policy.route.enter(), roomy(model, policy.route, _parts(batch)) as texts:
        inputs = _encoder(texts)
        heard = model.get_encoder()(**inputs).last_hidden_state
        states = model.get_decoder()(
            input_ids=start,
            encoder_hidden_states=heard,
            encoder_attention_mask=inputs["attention_mask"],
            use_cache=False,
        )
    first: Tensor = states.last_hidden_state[:, 0]
    return first


def prompts_of(batch: Batch) -> tuple[int, ...]:
    """Tokens of each document before its first supervised one; all of them where nothing is supervised."""
    if batch.prompts:
        return batch.prompts
    ends = torch.tensor(batch.lengths).cumsum(0)
    targets = batch.sources.cpu() + 1
    rows = torch.searchsorted(ends, targets, right=True)
    found = ends.scatter_reduce(0, rows, targets, "amin")
    return tuple((found - (ends - torch.tensor(batch.lengths))).tolist())


def start_id(model: Any) -> int:
    """The token that a decoder begins with."""
    own = getattr(model, "generation_config", None)
    found = setting(own, "decoder_start_token_id") if own is not None else None
    if found is None:
        found = setting(model.config, "decoder_start_token_id", "pad_token_id")
    return 0 if found is None else int(found)


def end_ids(config: Any) -> list[int]:
    """The token that ends what an encoder reads; none where the config names none."""
    found = setting(config, "eos_token_id")
    found = found[0] if isinstance(found, list | tuple) and found else found
    return [found] if isinstance(found, int) else []


def _parts(batch: Batch) -> list[Tensor]:
    return list(batch.ids.split(list(batch.lengths)))


def _encoder(texts: list[Tensor]) -> dict[str, Tensor]:
    """Ids and mask, int64 [documents, longest]; padding is heard of through the mask only."""
    return {
        "input_ids": pad_sequence(texts, True),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], True),
    }
