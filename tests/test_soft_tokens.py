"""Soft tokens: prompts and embedding prefixes are what they are by hand, in every way that documents are laid out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TinyLoaded, disturb, families, one_document, tiny_batch, tiny_config, tiny_loaded, tiny_model
from torch import Tensor

from tunesmith.adapt.adapter import Adapter
from tunesmith.adapt.lora import LoRA
from tunesmith.adapt.prefix_embed import PrefixEmbed
from tunesmith.adapt.prompt import Prompt
from tunesmith.core.errors import AdapterError, ConfigError, DataError
from tunesmith.core.types import Batch
from tunesmith.models.families import family_of
from tunesmith.models.generate import generate, stream
from tunesmith.models.inserts import SoftTokens
from tunesmith.models.policy import Policy
from tunesmith.models.route import BASE, Route

BATCH = tiny_batch((7, 3, 9, 5))
SPLITS = (2, 2, 2, 2)  # tokens before the first supervised one
DECODERS = ["llama", "gemma", "gemma2", "gpt2", "gpt_neox", "phi3", "opt", "mistral", "falcon"]
ENCODERS = ["bert", "distilbert", "roberta", "deberta-v2", "mpnet"]
ROWS = (("p", "e"), (), ("e",), ("a", "p"))
MIXED = Route.of_rows(*ROWS)
PROMPTS = [list(range(3 + 5 * row, 3 + 5 * row + length)) for row, length in enumerate((4, 9, 1, 6, 6, 2))]
PROMPT_ROWS = Route.of_rows(("p",), (), ("e", "p"), ("e",), ("p",), ("a", "e"))


def three_adapters(family: str) -> tuple[TinyLoaded, dict[str, Adapter]]:
    """A model with a prompt p of 4, an embedding prefix e of 2 and 3, and a LoRA a."""
    loaded = tiny_loaded(family)
    lora = LoRA(rank=2, targets=("embed", "up"))
    adapters = {"p": Prompt(length=4), "e": PrefixEmbed(prefix=2, infix=3), "a": lora}
    found = {name: method.attach(loaded, name) for name, method in adapters.items()}  # type: ignore[attr-defined]
    for number, adapter in enumerate(found.values()):
        disturb(adapter, number, 0.4)
        for parameter in adapter.parameters.values():
            parameter.requires_grad_(True)
    return loaded, found


def soft(adapter: Adapter) -> SoftTokens:
    (found,) = [insert for _, _, insert in adapter.inserts()]
    assert isinstance(found, SoftTokens)
    return found


def by_hand(loaded: Any, adapters: dict[str, Adapter], names: tuple[str, ...], ids: Tensor, split: int) -> Any:
    """What transformers makes of one document whose embeddings were put together by hand, a state for each token."""
    embed = loaded.model.get_input_embeddings()
    with Route(tuple(name for name in names if name == "a")).enter():
        words = embed(ids)
        tokens = [soft(adapters[name]) for name in names if name != "a"]
        parts = [t["vectors"][: t.before] for t in tokens]
        parts += [words[:split], *[t["vectors"][t.before :] for t in tokens], words[split:]]
        inputs = torch.cat([part.to(words.dtype) for part in parts])[None]
        more = {"use_cache": False} if loaded.family.kind == "decoder" else {}
        output = loaded.model(inputs_embeds=inputs, **more)
    states = (output.logits if "logits" in output else output.last_hidden_state)[0]
    before, inside = sum(t.before for t in tokens), sum(t.inside for t in tokens)
    places = torch.arange(len(ids)) + before
    places[split - 1 :] += inside
    return states[places]


def whole(loaded: Any, adapters: dict[str, Adapter], rows: tuple[tuple[str, ...], ...], splits: Any) -> Tensor:
    parts = BATCH.ids.split(list(BATCH.lengths))
    return torch.cat([by_hand(loaded, adapters, *each) for each in zip(rows, parts, splits, strict=True)])


def everything(policy: Policy, batch: Batch) -> Tensor:
    """Logits of a decoder, states of an encoder."""
    if policy.family.kind == "decoder":
        return policy.logits(batch, torch.arange(len(batch.ids)))
    return policy.hidden(batch)


@pytest.mark.parametrize("family", families(*DECODERS, *ENCODERS))
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("names", [("p",), ("e",), ("p", "e"), ("e", "a", "p")])
def test_soft_tokens_are_embeddings_put_in_by_hand(family: str, packed: bool, names: tuple[str, ...]) -> None:
    """Kills: an infix one token off; gemma's factor on vectors; positions that leave soft tokens out."""
    loaded, adapters = three_adapters(family)
    policy = Policy(loaded, Route(names), packed=packed)  # type: ignore[arg-type]
    with torch.no_grad():
        found = everything(policy, BATCH)
        splits = BATCH.lengths if family in ENCODERS else SPLITS
        wanted = whole(loaded, adapters, (names,) * 4, splits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", families(*DECODERS, *ENCODERS))
@pytest.mark.parametrize("packed", [True, False])
def test_rows_with_soft_tokens_of_different_length_are_rows_alone(family: str, packed: bool) -> None:
    """Kills: room made for the longest; a prompt on its neighbour's row; rows found by lengths without room."""
    loaded, adapters = three_adapters(family)
    policy = Policy(loaded, MIXED, packed=packed)  # type: ignore[arg-type]
    with torch.no_grad():
        found = everything(policy, BATCH)
        splits = BATCH.lengths if family in ENCODERS else SPLITS
        wanted = whole(loaded, adapters, ROWS, splits)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", families(*DECODERS))
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_losses_and_gradients_are_those_by_hand(family: str, recompute: str) -> None:
    """Kills: the first supervised token predicted from the prompt and not from the infix; a vector without gradient."""
    loaded, adapters = three_adapters(family)
    losses = Policy(loaded, MIXED, recompute=recompute).token_losses(BATCH)  # type: ignore[arg-type]
    parameters = {f"{one} {name}": p for one, a in adapters.items() for name, p in a.parameters.items()}
    found = torch.autograd.grad(losses.square().sum(), list(parameters.values()))
    logits = whole(loaded, adapters, ROWS, SPLITS)[BATCH.sources]
    wanted = torch.nn.functional.cross_entropy(logits, BATCH.targets, reduction="none")
    torch.testing.assert_close(losses, wanted, rtol=0, atol=1e-5)
    expected = torch.autograd.grad(wanted.square().sum(), list(parameters.values()))
    for name, mine, theirs in zip(parameters, found, expected, strict=True):
        assert float((mine - theirs).norm()) <= 1e-5 * max(float(theirs.norm()), 1.0), name
        assert float(mine.norm()) > 0


def test_an_encoder_decoder_reads_soft_tokens_on_its_encoder_side() -> None:
    """Kills: soft tokens in the decoder; a mask that leaves them out."""
    loaded, adapters = three_adapters("t5")
    losses = Policy(loaded, MIXED).token_losses(BATCH)  # type: ignore[arg-type]
    model, found = loaded.model, []
    for row, names in enumerate(ROWS):
        part = one_document(BATCH, row)
        heard, given = torch.cat([part.ids[:2], torch.tensor([1])]), part.ids[2:]
        tokens = [soft(adapters[name]) for name in names if name != "a"]
        with Route(tuple(name for name in names if name == "a")).enter():
            words = model.get_encoder().embed_tokens(heard)
            parts = [*[t["vectors"][: t.before] for t in tokens], words, *[t["vectors"][t.before :] for t in tokens]]
            found.append(model(inputs_embeds=torch.cat(parts)[None], labels=given[None]).loss * len(given))
    assert float(losses.sum().detach()) == pytest.approx(sum(one.item() for one in found), rel=1e-5)
    losses.sum().backward()
    assert all(bool(p.grad.any()) for name in "pe" for p in adapters[name].parameters.values())  # type: ignore[union-attr]


def continued(loaded: Any, adapters: dict[str, Adapter], names: tuple[str, ...], prompt: list[int], limit: int) -> list:
    """Greedy continuation by hand, everything computed again for each token."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            logits = by_hand(loaded, adapters, names, torch.tensor(ids), len(prompt))
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", families(*DECODERS))
def test_writing_continues_documents_put_together_by_hand(family: str) -> None:
    """Kills: soft tokens in every step; positions behind an infix; a cache of a prompt without its vectors."""
    loaded, adapters = three_adapters(family)
    wanted = [continued(loaded, adapters, PROMPT_ROWS.of(row), prompt, 8) for row, prompt in enumerate(PROMPTS)]
    settings: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": set()}
    for size in (6, 4):
        found = generate(loaded, PROMPT_ROWS, PROMPTS, batch_size=size, **settings)  # type: ignore[arg-type]
        assert [one.ids for one in found] == wanted
    for row, prompt in enumerate(PROMPTS):
        assert list(stream(loaded, Route(PROMPT_ROWS.of(row)), prompt, **settings)) == wanted[row]  # type: ignore[arg-type]


@pytest.mark.parametrize("family", families("llama", "gpt2", "opt", "mistral", "t5"))
def test_rows_that_end_and_shared_prefixes_change_nothing(family: str) -> None:
    """Kills: an infix read with the shared prefix; its soft tokens counted twice or not at all; rows mixed up."""
    loaded, _ = three_adapters(family)
    shared = [7, 9, 21]
    longer = [shared + prompt for prompt in PROMPTS]
    for route in (Route(("p",)), Route(("e",)), Route(("e", "p", "a")), PROMPT_ROWS):
        free = generate(loaded, route, longer, max_new_tokens=9, stop_ids=set())  # type: ignore[arg-type]
        settings: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": {one.ids[1 + row] for row, one in enumerate(free)}}
        alone = [
            generate(loaded, Route(route.of(row)), [prompt], **settings)[0]  # type: ignore[arg-type]
            for row, prompt in enumerate(longer)
        ]
        assert any(one.stopped for one in alone)
        assert generate(loaded, route, longer, **settings) == alone  # type: ignore[arg-type]
        assert generate(loaded, route, PROMPTS, shared_prefix=shared, **settings) == alone  # type: ignore[arg-type]
        assert generate(loaded, route, PROMPTS, shared_prefix=shared, batch_size=2, **settings) == alone  # type: ignore[arg-type]


def test_without_room_soft_tokens_are_an_error_and_not_silence() -> None:
    """Kills: a model called directly that answers as the base."""
    loaded, adapters = three_adapters("llama")
    with adapters["p"].route.enter(), pytest.raises(AdapterError, match=r"p: soft tokens need room(.|\n)*Policy"):
        loaded.model(torch.arange(4)[None])
    with BASE.enter():
        loaded.model(torch.arange(4)[None])


def test_positions_are_counted_with_soft_tokens() -> None:
    """Kills: an index error from inside the model; a bound that is one too strict."""
    loaded = tiny_loaded("gpt2")
    adapter = Prompt(length=20).attach(loaded)  # type: ignore[arg-type]
    policy = Policy(loaded, adapter.route)  # type: ignore[arg-type]
    assert len(policy.hidden(tiny_batch((76, 3)))) == 79
    with pytest.raises(ConfigError, match="take 97 positions; the model has 96"):
        policy.hidden(tiny_batch((3, 77)))
    settings: dict[str, Any] = {"max_new_tokens": 7, "stop_ids": set()}
    assert len(generate(loaded, adapter.route, [[5] * 70], **settings)[0].ids) == 7  # type: ignore[arg-type]
    with pytest.raises(DataError, match="gpt2 has 96"):
        generate(loaded, adapter.route, [[5] * 71], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", families("llama", "gemma", "gpt2", "t5", "bert", "falcon"))
@pytest.mark.parametrize("method", [Prompt(length=7), Prompt(length=5, init="random"), PrefixEmbed(prefix=4, infix=3)])
def test_numbers_are_counted_without_weights(family: str, method: Prompt | PrefixEmbed) -> None:
    real = method.attach(tiny_loaded(family))  # type: ignore[arg-type]
    with torch.device("meta"):
        model = type(tiny_model(family))(tiny_config(family))
    shapes = TinyLoaded(model, real.loaded.folder, family, family_of(model.config, model), "", model.config)
    adapter = method.attach(shapes)  # type: ignore[arg-type]
    assert {n: p.shape for n, p in adapter.parameters.items()} == {n: p.shape for n, p in real.parameters.items()}
    assert all(p.is_meta for p in adapter.parameters.values())
    length = method.length if isinstance(method, Prompt) else method.prefix + method.infix
    assert sum(p.numel() for p in adapter.parameters.values()) == length * 32


@pytest.mark.parametrize("family", families("llama", "gemma"))
def test_a_prompt_starts_as_words(family: str) -> None:
    """Kills: text cut to nothing; gemma's words without their factor; a seed without effect."""
    loaded = tiny_loaded(family)
    loaded.__dict__["tokenizer"] = lambda text, add_special_tokens: {"input_ids": list(map(ord, text))}
    embed = loaded.model.get_input_embeddings()
    adapter = Prompt(length=5, init="text", text="AB!").attach(loaded)  # type: ignore[arg-type]
    (vectors,) = adapter.parameters.values()
    assert torch.equal(vectors, embed(torch.tensor([65, 66, 33, 65, 66])))
    adapter.detach()
    drawn = [next(iter(Prompt(length=5).attach(tiny_loaded(family), seed=s).parameters.values())) for s in (1, 1, 2)]  # type: ignore[arg-type]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    table = loaded.model.get_input_embeddings()(torch.arange(97))
    assert all(any(torch.equal(vector, word) for word in table) for vector in drawn[0])
    random = next(iter(Prompt(length=50, init="random").attach(loaded).parameters.values()))  # type: ignore[arg-type]
    assert 0.45 < float(random.abs().max()) <= 0.5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init": "text"}, "go together"),
        ({"text": "hello"}, "text needs init: text"),
        ({"length": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_of_a_prompt_that_have_no_effect_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Prompt(**settings)
    with pytest.raises(ValueError, match="nothing would train"):
        PrefixEmbed(prefix=0)
