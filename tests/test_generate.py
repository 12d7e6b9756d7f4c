"""Writing: whatever is done for speed (batches, caches, shared prefixes, rows that leave) changes no token."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DECODERS, families, tiny_loaded
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.adapt.lora import LoRA
from tunesmith.core.errors import ConfigError, DataError
from tunesmith.models.families import family_of
from tunesmith.models.generate import Completion, generate, stream
from tunesmith.models.route import BASE, current_route
from tunesmith.models.sampling import Chooser

WINDOWED = ["mistral", "qwen2", "gemma2", "gemma3_text"]


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    # ids from 0: the pad token is an ordinary token of a prompt
    return [torch.randint(0, 97, (length,), generator=draw).tolist() for length in lengths]


def written_without_cache(model, prompt: list[int], stops: set[int], limit: int) -> Completion:
    """One row, everything computed again for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(limit):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stops:
                return Completion(ids[len(prompt) :], True)
            ids.append(token)
    return Completion(ids[len(prompt) :], False)


PROMPTS = prompts_of((3, 11, 1, 7, 7, 2, 9))
STOPS = set(range(0, 97, 6))  # many, so that rows end at different times


@pytest.mark.parametrize("family", families(*DECODERS))
def test_a_batch_with_a_cache_writes_what_one_row_without_writes(family):
    """Kills: positions that count padding; a mask that forgets it; columns kept for the wrong rows."""
    loaded = tiny_loaded(family)
    free = [written_without_cache(loaded.model, prompt, set(), 14).ids for prompt in PROMPTS]
    stops = {ids[2 * row] for row, ids in enumerate(free[:4])}  # so that rows end at different times
    expected = [written_without_cache(loaded.model, prompt, stops, 14) for prompt in PROMPTS]
    assert any(one.stopped for one in expected)
    settings = {"max_new_tokens": 14, "stop_ids": stops}
    assert generate(loaded, BASE, PROMPTS, batch_size=4, **settings) == expected
    assert generate(loaded, None, PROMPTS, batch_size=16, **settings) == expected


@pytest.mark.parametrize("family", families("llama", "gpt2", "gemma", "opt", "gpt_neox", "mistral"))
def test_greedy_equals_the_generate_of_transformers(family):
    """Kills: a loop that is one token off, or applies the head in another way."""
    loaded = tiny_loaded(family)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
            pad_token_id=0,
            eos_token_id=96,
        )
        mine = generate(loaded, BASE, [prompt], max_new_tokens=12, stop_ids=set())
        if 96 not in mine[0].ids:
            assert mine[0].ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", families("llama", "gpt2", "opt", "gpt_neox", "gemma", *WINDOWED))
@pytest.mark.parametrize("shared", [1, 8])
def test_a_shared_prefix_changes_nothing(family, shared):
    """Kills: positions that start at 0 behind the prefix; a window that counts the padding behind it."""
    loaded = tiny_loaded(family)
    prefix = prompts_of((shared,), seed=3)[0]
    settings = {"max_new_tokens": 10, "stop_ids": STOPS, "batch_size": 4}
    whole = generate(loaded, BASE, [prefix + prompt for prompt in PROMPTS], **settings)
    assert generate(loaded, BASE, PROMPTS, shared_prefix=prefix, **settings) == whole


def test_a_prompt_may_be_the_shared_prefix_and_nothing_else():
    """Kills: a batch row without a token of its own."""
    loaded = tiny_loaded("llama")
    prefix = prompts_of((6,))[0]
    settings = {"max_new_tokens": 5, "stop_ids": set()}
    whole = generate(loaded, BASE, [prefix, [*prefix, 4]], **settings)
    assert generate(loaded, BASE, [[], [4]], shared_prefix=prefix, **settings) == whole


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stream_gives_what_generate_gives(family):
    """Kills: a stream that shows the stop token, or ends one token early."""
    loaded = tiny_loaded(family)
    for prompt in PROMPTS:
        settings = {"max_new_tokens": 14, "stop_ids": STOPS, "temperature": 0.8, "seed": 4}
        assert list(stream(loaded, BASE, prompt, **settings)) == generate(loaded, BASE, [prompt], **settings)[0].ids


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_what_a_row_draws_does_not_depend_on_its_batch(top_p):
    """Kills: one random stream for the whole batch."""
    loaded = tiny_loaded("llama")
    settings = {"max_new_tokens": 12, "stop_ids": STOPS, "temperature": 1.3, "top_p": top_p}
    one = generate(loaded, BASE, PROMPTS, batch_size=1, seed=5, **settings)
    assert generate(loaded, BASE, PROMPTS, batch_size=3, seed=5, **settings) == one
    assert generate(loaded, BASE, PROMPTS[:2], batch_size=3, seed=5, **settings) == one[:2]
    assert generate(loaded, BASE, PROMPTS, batch_size=3, seed=6, **settings) != one


def test_equal_prompts_are_sampled_independently():
    """Kills: draws that depend on the turn alone."""
    loaded = tiny_loaded("llama")
    found = generate(loaded, BASE, [PROMPTS[0]] * 6, max_new_tokens=8, stop_ids=set(), temperature=1.0)
    assert len({tuple(one.ids) for one in found}) > 1


def test_sampled_frequencies_are_the_probabilities():
    """Kills: a temperature that multiplies; a cumulative sum that is off by one; an unsorted top_p."""
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.0]])
    rows = list(range(6000))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (2.0, 0.6)):
        chance = torch.softmax(logits[0] / temperature, -1)
        ranked = chance.sort(descending=True)
        inside = ranked.values.cumsum(0) - ranked.values < top_p
        expected = torch.zeros(4).index_put((ranked.indices[inside],), ranked.values[inside])
        drawn = Chooser(temperature, top_p, 0, 1)(logits.expand(len(rows), -1), rows, [0] * len(rows))
        seen = torch.bincount(drawn, minlength=4) / len(rows)
        assert torch.allclose(seen, expected / expected.sum(), atol=0.025)
        assert not seen[expected == 0].any()


def test_the_limit_is_exact_and_a_stop_token_is_not_shown():
    """Kills: a stop token among the ids; a limit that counts the prompt."""
    loaded = tiny_loaded("llama")
    free = generate(loaded, BASE, PROMPTS, max_new_tokens=9, stop_ids=set())
    assert all(len(one.ids) == 9 and not one.stopped for one in free)
    stop = free[0].ids[4]
    stopped = generate(loaded, BASE, PROMPTS[:1], max_new_tokens=9, stop_ids={stop})[0]
    assert stopped == Completion(free[0].ids[: free[0].ids.index(stop)], True)


def test_a_stop_token_takes_the_last_place_of_the_limit():
    """Kills: rows that may go one beyond the limit to find their stop."""
    loaded = tiny_loaded("llama")
    free = generate(loaded, BASE, PROMPTS[:1], max_new_tokens=6, stop_ids=set())[0].ids
    last = next(place for place in range(5, -1, -1) if free[place] not in free[:place])
    stop = {free[last]}
    assert generate(loaded, BASE, PROMPTS[:1], max_new_tokens=last + 1, stop_ids=stop)[0] == Completion(
        free[:last], True
    )
    assert generate(loaded, BASE, PROMPTS[:1], max_new_tokens=max(1, last), stop_ids=stop)[0].stopped is False


def test_an_encoder_decoder_writes_in_batches_what_it_writes_alone():
    """Kills: a decoder start token among the ids; an encoder that sees padding."""
    loaded = tiny_loaded("t5")
    settings = {"max_new_tokens": 10, "stop_ids": STOPS}
    alone = [generate(loaded, BASE, [prompt], **settings)[0] for prompt in PROMPTS]
    assert generate(loaded, BASE, PROMPTS, batch_size=4, **settings) == alone
    assert any(one.ids for one in alone)
    sampled = {**settings, "temperature": 1.0, "seed": 2}
    assert generate(loaded, BASE, PROMPTS, batch_size=4, **sampled) == generate(loaded, BASE, PROMPTS, **sampled)
    assert list(stream(loaded, BASE, PROMPTS[0], **settings)) == alone[0].ids


def test_a_recurrent_model_is_never_padded():
    """Kills: padding that enters a state which has no mask."""
    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=2)
    torch.manual_seed(0)
    loaded = tiny_loaded("llama")
    loaded.model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    loaded.family = family_of(config, loaded.model)
    expected = [written_without_cache(loaded.model, prompt, STOPS, 6) for prompt in PROMPTS]
    assert generate(loaded, BASE, PROMPTS, max_new_tokens=6, stop_ids=STOPS) == expected


def test_writing_leaves_modes_randomness_and_weights_alone():
    """Kills: a model left in evaluation mode; a draw from the global generator; dropout while writing."""
    loaded = tiny_loaded("gpt2", resid_pdrop=0.5)
    calm = generate(loaded, BASE, PROMPTS, max_new_tokens=6, stop_ids=set())
    loaded.model.train()
    loaded.model.transformer.h[0].eval()
    before = {name: module.training for name, module in loaded.model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    state = torch.get_rng_state()
    assert generate(loaded, BASE, PROMPTS, max_new_tokens=6, stop_ids=set()) == calm
    generate(loaded, BASE, PROMPTS, max_new_tokens=6, stop_ids=set(), temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())
    assert before == {name: module.training for name, module in loaded.model.named_modules()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.model.state_dict().items())
    broken_off = stream(loaded, BASE, PROMPTS[0], max_new_tokens=6, stop_ids=set())
    next(broken_off)
    broken_off.close()
    assert before == {name: module.training for name, module in loaded.model.named_modules()}


def test_progress_counts_rows_and_nothing_is_written_for_no_prompts():
    """Kills: progress in batches; a crash for an empty list."""
    seen: list[tuple[int, int]] = []
    loaded = tiny_loaded("llama")
    settings = {"max_new_tokens": 2, "stop_ids": set()}
    generate(loaded, BASE, PROMPTS, batch_size=3, progress=lambda *at: seen.append(at), **settings)
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert generate(loaded, BASE, [], **settings) == []


@pytest.mark.parametrize(
    ("family", "prompts", "settings", "error", "says"),
    [
        ("llama", [[1], []], {}, DataError, "prompt 2 has no tokens"),
        ("gpt2", [[1] * 90], {"max_new_tokens": 8}, DataError, "gpt2 has 96"),
        ("llama", [[1]], {"max_new_tokens": 0}, ConfigError, "at least 1"),
        ("llama", [[1]], {"temperature": -1.0}, ConfigError, "temperature is -1"),
        ("llama", [[1]], {"top_p": 0.0}, ConfigError, "top_p is 0"),
        ("bert", [[1]], {}, ConfigError, "bert is an encoder"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_computed(family, prompts, settings, error, says):
    """Kills: an index error from inside a model."""
    loaded = tiny_loaded(family)
    with pytest.raises(error, match=says):
        generate(loaded, BASE, prompts, **{"max_new_tokens": 4, "stop_ids": set(), **settings})


def test_the_last_place_of_a_position_table_may_be_used():
    """Kills: a bound that is one too strict; the last new token is never read back."""
    loaded = tiny_loaded("gpt2")
    found = generate(loaded, BASE, [[1] * 90], max_new_tokens=7, stop_ids=set())
    assert len(found[0].ids) == 7


def test_an_adapter_acts_while_its_route_writes_and_the_route_is_not_left_behind():
    """Kills: a route entered for the first token only, or still entered between the tokens of a stream."""
    loaded = tiny_loaded("llama")
    before = generate(loaded, BASE, PROMPTS, max_new_tokens=8, stop_ids=set())
    adapter = LoRA(rank=2, targets=("q", "v")).attach(loaded, name="new", seed=0)
    for parameter in adapter.parameters.values():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with adapter.route.enter():
        expected = [written_without_cache(loaded.model, prompt, set(), 8) for prompt in PROMPTS]
    assert generate(loaded, adapter.route, PROMPTS, max_new_tokens=8, stop_ids=set()) == expected != before
    assert generate(loaded, BASE, PROMPTS, max_new_tokens=8, stop_ids=set()) == before
    for token, wanted in zip(
        stream(loaded, adapter.route, PROMPTS[0], max_new_tokens=8, stop_ids=set()), expected[0].ids, strict=True
    ):
        assert token == wanted
        assert current_route() is None


def test_a_frozen_head_is_multiplied_as_it_lies() -> None:
    """Kills: the last state taken by a slice, for which torch copies all of a frozen bfloat16 head at every prompt."""
    loaded = tiny_loaded("olmo2", dtype=torch.bfloat16, vocab_size=1234)
    loaded.model.requires_grad_(False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        generate(loaded, BASE, [[5, 6, 7, 8]], max_new_tokens=2, stop_ids=set())
    products = {event.name for event in seen.events() if any(1234 in shape for shape in event.input_shapes if shape)}
    assert "aten::mm" in products
    assert "aten::bmm" not in products
