"""How a dialogue becomes text and ids, for every family of chat templates: the laws of prompts and answers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from chat_templates import FAMILIES, Family
from tiny import tiny_tokenizer_folder

from tunesmith.core.errors import ConfigError, DataError
from tunesmith.data import jinja
from tunesmith.data.codec import Codec
from tunesmith.data.encode import Example, encode_row, prompt_ids
from tunesmith.data.rows import Dialogue, Labelled, Message, Text
from tunesmith.data.templates import Template, open_template, render

ONE = (("user", "What is the capital of France?"), ("assistant", "Paris."))
TWO = (*ONE, ("user", "And the colours of its flag?"), ("assistant", "Blue, white and red."))
THREE = (*TWO, ("user", "Thanks."), ("assistant", "You are welcome. " * 3 + "Bye."))
ROWS = (ONE, TWO, THREE)
SPECS = [*FAMILIES, "alpaca", "dolly", "plain"]


def dialogue(turns: tuple[tuple[str, str], ...], where: str = "rows.jsonl:1") -> Dialogue:
    return Dialogue(tuple(Message(role, text, role == "assistant") for role, text in turns), where)


def opened(name: str, path: Path) -> tuple[Template, Codec, Family]:
    family = FAMILIES.get(name, FAMILIES["llama3"])
    codec = family.codec(path)
    spec = name if name not in FAMILIES else "auto"
    return open_template(spec, codec), codec, family


def encoded(row: Dialogue, template: Template, codec: Codec) -> Example:
    example = encode_row(row, template, codec, 100_000)
    assert isinstance(example, Example)
    return example


def learnt_runs(example: Example) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for token, supervised in zip(example.ids, example.supervised, strict=True):
        if supervised:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("turns", ROWS, ids=("one", "two", "three"))
@pytest.mark.parametrize("name", SPECS)
def test_exactly_the_answers_and_one_end_token_each_are_learnt(name: str, turns: tuple, tmp_path: Path) -> None:
    """Kills: supervising the header, the line end after the end token, or no end token; the last turn alone."""
    template, codec, family = opened(name, tmp_path)
    end = family.end if name in FAMILIES else codec.eos_token
    runs = learnt_runs(encoded(dialogue(turns), template, codec))
    answers = [text for role, text in turns if role == "assistant"]
    assert len(runs) == len(answers)
    for number, (run, answer) in enumerate(zip(runs, answers, strict=True)):
        text = codec.decode(run, skip_special=False)
        lead = family.lead if name in FAMILIES and (name != "qwen3" or number == len(runs) - 1) else ""
        tail = family.tail if name in FAMILIES else ""
        assert text == lead + answer + tail + str(end)
        assert run.count(codec.token_id(str(end))) == 1
        assert run[-1] == codec.token_id(str(end))
        assert run[-1] in template.stop_ids


@pytest.mark.parametrize("turns", ROWS, ids=("one", "two", "three"))
@pytest.mark.parametrize("name", SPECS)
def test_a_prompt_is_exactly_how_its_training_row_starts(name: str, turns: tuple, tmp_path: Path) -> None:
    """Kills: encoding prompt and answer as one piece where their border merges; a second way to render prompts."""
    template, codec, _ = opened(name, tmp_path)
    for answer in ("Paris.", "\n\nParis", " Paris ", "  ", "s", "'s", "1"):
        row = dialogue((*turns[:-1], ("assistant", answer)))
        example = encoded(row, template, codec)
        prompt = prompt_ids(row, template, codec)
        assert example.ids[: len(prompt)] == prompt
        assert not example.supervised[len(prompt) - 1]
        assert example.supervised[len(prompt)]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("asked", "answer"), [("the qui", "ck brown fox"), ("Write:\n", "\n\nFrance")])
def test_a_border_inside_a_word_is_a_border_of_tokens(name: str, asked: str, answer: str, tmp_path: Path) -> None:
    """Kills: encoding the whole in one go; taking the rest of that for the answer where the border has no token."""
    template, codec, _ = opened(name, tmp_path)
    row = dialogue((("user", asked), ("assistant", answer)))
    example = encoded(row, template, codec)
    prompt = prompt_ids(row, template, codec)
    assert example.ids[: len(prompt)] == prompt
    assert codec.decode(learnt_runs(example)[0]).strip().endswith(answer.strip())
    assert codec.decode(example.ids, skip_special=False).endswith(render(row, template).text)


@pytest.mark.parametrize("name", SPECS)
def test_the_beginning_token_comes_once_and_first(name: str, tmp_path: Path) -> None:
    """Kills: writing bos_token wherever a template writes it; adding one to a text that has one."""
    template, codec, _ = opened(name, tmp_path)
    ids = encoded(dialogue(THREE), template, codec).ids
    if codec.bos is not None and name != "smollm2":  # there the token that starts a turn is called bos
        assert ids.count(codec.bos) <= 1
        assert codec.bos not in ids[1:]
    if name in ("llama2", "llama3", "gemma", "mistral"):
        assert ids[0] == codec.bos


@pytest.mark.parametrize("name", SPECS)
def test_no_text_of_a_user_becomes_a_control_token(name: str, tmp_path: Path) -> None:
    """Kills: encoding user text with control tokens on; looking for whole tokens only (the halves below)."""
    template, codec, _ = opened(name, tmp_path)
    calm = encoded(dialogue(TWO), template, codec).ids
    structure = [token for token in calm if token in {control.id for control in codec.controls.values()}]
    for text in codec.controls:
        for evil in (f"a {text} b", text, text * 2, f"{text[:-1]}", f"{text[1:]}", f"{text}\n", f"< {text}"):
            row = dialogue((("user", evil), ("assistant", "Paris."), ("user", f"{evil} x"), ("assistant", "Red.")))
            example = encoded(row, template, codec)
            found = [token for token in example.ids if token in {c.id for c in codec.controls.values()}]
            assert found == structure
            assert evil.strip() in codec.decode(example.ids, skip_special=False)


def test_two_messages_cannot_join_into_a_control_token(tmp_path: Path) -> None:
    """Kills: guarding whole control strings only, where a template puts two contents side by side."""
    _, codec, _ = opened("chatml", tmp_path)
    template = open_template("plain", codec)
    row = dialogue((("user", "say <|im_"), ("assistant", "end|> now")))
    ids = encoded(row, template, codec).ids
    assert ids.count(codec.token_id("<|im_end|>")) == 1
    assert codec.decode(ids) == "say <|im_end|> now"


@pytest.mark.parametrize(("before", "evil", "behind"), [("", "<|im_end", "|>"), ("<|im", "_end|>", "")])
def test_a_message_and_the_template_cannot_join_into_a_control_token(
    before: str, evil: str, behind: str, tmp_path: Path
) -> None:
    """Kills: guarding only the start of a message, or only its end."""
    user = before + "{{ m.content }}" + behind
    source = "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}{{ m.content }}{% endif %}"
    source += "{{ eos_token }}{% endfor %}"
    codec = Codec.open(tiny_tokenizer_folder(tmp_path, template=source))
    template = open_template("auto", codec)
    example = encoded(dialogue((("user", evil), ("assistant", "x"))), template, codec)
    assert example.ids.count(codec.token_id("<|im_end|>")) == 2


def test_an_answer_may_hold_structure_but_no_special_token(tmp_path: Path) -> None:
    """Kills: encoding <think> of an answer as plain text; letting <|im_end|> of an answer end it."""
    template, codec, _ = opened("qwen3", tmp_path)
    row = dialogue((ONE[0], ("assistant", "<think>\nhm <|im_end|>\n</think>\n\nParis.")))
    example = encoded(row, template, codec)
    assert example.ids.count(codec.token_id("<think>")) == 1
    assert learnt_runs(example)[0].count(codec.token_id("<|im_end|>")) == 1
    assert example.escaped == 1


def test_private_use_characters_survive(tmp_path: Path) -> None:
    """Kills: using a fixed stand-in character without replacing it where a message holds it."""
    template, codec, _ = opened("chatml", tmp_path)
    odd = "a\U00100000b\U0010fffdc\U000f0000d<|im_end|>\U000f0001\ue000"
    example = encoded(dialogue((("user", odd), ("assistant", odd))), template, codec)
    assert codec.decode(example.ids).count(odd) == 2


def test_thoughts_of_earlier_turns_are_left_out_as_the_template_leaves_them_out(tmp_path: Path) -> None:
    """Kills: taking the content of a message for what the template writes."""
    template, codec, _ = opened("qwen3", tmp_path)
    thought = "<think>\nhm\n</think>\n\n"
    turns = tuple((role, thought + text if role == "assistant" else text) for role, text in TWO)
    example = encoded(dialogue(turns), template, codec)
    runs = [codec.decode(run, skip_special=False) for run in learnt_runs(example)]
    assert runs == ["Paris.<|im_end|>", thought + "Blue, white and red.<|im_end|>"]


def test_only_marked_turns_are_learnt(tmp_path: Path) -> None:
    """Kills: supervising every assistant turn whatever the row says."""
    template, codec, _ = opened("chatml", tmp_path)
    first, second, third, fourth = dialogue(TWO).messages
    row = Dialogue((first, Message("assistant", second.content), third, fourth))
    assert [codec.decode(run) for run in learnt_runs(encoded(row, template, codec))] == ["Blue, white and red."]


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_message_is_read_even_where_the_template_takes_none(name: str, tmp_path: Path) -> None:
    """Kills: refusing or losing system messages."""
    template, codec, _ = opened(name, tmp_path)
    example = encoded(dialogue((("system", "Be brief."), *TWO)), template, codec)
    assert template.folds_system
    assert "Be brief.\n\nWhat is the capital" in codec.decode(example.ids)


def test_a_message_that_a_template_would_lose_is_an_error(tmp_path: Path) -> None:
    """Kills: taking whatever the template writes."""
    template, codec, _ = opened("zephyr", tmp_path)
    row = dialogue((*ONE, ("tool", "sunny"), ("assistant", "It is sunny.")), "rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*leaves tool messages out"):
        encode_row(row, template, codec, 512)


def test_what_a_template_refuses_names_row_and_reason(tmp_path: Path) -> None:
    """Kills: a traceback of jinja, or an error that does not say which row."""
    template, codec, _ = opened("llama2", tmp_path)
    row = dialogue((("user", "a"), ("user", "b"), ("assistant", "c")), "rows.jsonl:9")
    with pytest.raises(DataError, match=r"rows.jsonl:9: .*turns must alternate"):
        encode_row(row, template, codec, 512)


def test_a_template_that_prompts_otherwise_than_it_writes_is_an_error(tmp_path: Path) -> None:
    """Kills: training behind a prompt that is never given."""
    odd = FAMILIES["chatml"].template.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    codec = Codec.open(tiny_tokenizer_folder(tmp_path, template=odd))
    template = open_template("auto", codec)
    with pytest.raises(DataError, match="prompts for an answer otherwise than it writes one"):
        encode_row(dialogue(ONE), template, codec, 512)


def test_a_template_that_rewrites_an_answer_is_an_error(tmp_path: Path) -> None:
    """Kills: learning whatever stands between prompt and end token."""
    loud = FAMILIES["llama3"].template.replace("| trim", "| upper")
    family = replace(FAMILIES["llama3"], template=loud)
    codec = family.codec(tmp_path)
    with pytest.raises(DataError, match="turn 2 cannot be found"):
        encode_row(dialogue(ONE), open_template("auto", codec), codec, 512)


def test_a_header_that_a_template_leaves_out_of_its_prompt_belongs_to_the_prompt(tmp_path: Path) -> None:
    """Kills: learning to write the header of a template that ignores add_generation_prompt."""
    template, codec, _ = opened("tagged", tmp_path)
    assert codec.decode(prompt_ids(dialogue(ONE), template, codec), skip_special=False).endswith("assistant\n")


def test_an_instruction_and_its_context_have_their_places(tmp_path: Path) -> None:
    """Kills: losing the context, or writing it twice."""
    codec = FAMILIES["chatml"].codec(tmp_path)
    row = Dialogue((Message("user", "Sum up.", context="A long text."), Message("assistant", "Short.", True)))
    assert "### Input:\nA long text.\n\n### Response:\nShort." in render(row, open_template("alpaca", codec)).text
    assert "\nInput:\nA long text.\n\n### Response:\nShort." in render(row, open_template("dolly", codec)).text
    assert "user\nSum up.\n\nA long text.<|im_end|>" in render(row, open_template("auto", codec)).text


def test_auto_says_what_it_found(tmp_path: Path) -> None:
    """Kills: silently choosing chatml for a tokenizer that would spell its tokens out."""
    with_tokens = Codec.open(tiny_tokenizer_folder(tmp_path / "a", template=None))
    without = Codec.open(tiny_tokenizer_folder(tmp_path / "b", template=None, special=("</s>",), eos="</s>"))
    assert open_template("auto", with_tokens).name == "chatml (the model has none)"
    assert open_template("auto", without).name == "alpaca (the model has none)"
    assert open_template("auto", with_tokens, plain=True).name == "plain"
    with pytest.raises(ConfigError, match="did you mean alpaca"):
        open_template("alpacca", without)


def test_solved_cases_come_before_the_question(tmp_path: Path) -> None:
    """Kills: shots after the question, or an end token between the cases of a bare model."""
    template, codec, _ = opened("chatml", tmp_path)
    shot, asked = dialogue(ONE), dialogue((("user", "And of Italy?"), ("assistant", "Rome.")))
    few = prompt_ids(asked, template, codec, [shot])
    assert few == prompt_ids(
        dialogue((*ONE, *zip(("user", "assistant"), ("And of Italy?", ""), strict=True))), template, codec
    )
    plain = open_template("plain", codec)
    text = codec.decode(prompt_ids(asked, plain, codec, [shot]), skip_special=False)
    assert text == "What is the capital of France?Paris.\n\nAnd of Italy?"


BOMBS = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 'a' | center(10**10) }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in messages %}{% endif %}",
    "{{ raise_exception('never') }}",
)


@pytest.mark.parametrize(
    "source", [*BOMBS[::2], *(pytest.param(source, marks=pytest.mark.slow) for source in BOMBS[1::2])]
)
def test_a_hostile_template_ends_in_one_clear_error(source: str, tmp_path: Path) -> None:
    """Kills: rendering an unknown template in this process first, without limits."""
    codec = FAMILIES["chatml"].codec(tmp_path)
    path = tmp_path / "bomb.jinja"
    path.write_text(source + FAMILIES["chatml"].template)
    begun = time.process_time()
    with pytest.raises(ConfigError, match=r"bomb\.jinja: the template"):
        open_template(str(path), codec)
    assert time.process_time() - begun < 2


def test_a_template_that_turns_hostile_later_is_stopped_by_its_budget(tmp_path: Path) -> None:
    """Kills: limits in the trial only; a budget that is not counted anew for each row."""
    codec = FAMILIES["chatml"].codec(tmp_path)
    path = tmp_path / "late.jinja"
    loops = "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}"
    path.write_text(FAMILIES["chatml"].template + "{% if messages | length > 5 %}" + loops + "{% endif %}")
    template = open_template(str(path), codec)
    for _ in range(3):
        render(dialogue(TWO), template)
    with pytest.raises(ConfigError, match="steps for one conversation"):
        render(dialogue(THREE), template)


def test_the_budget_is_counted_anew_for_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: one budget for all rows."""
    monkeypatch.setattr(jinja, "STEPS", 50)
    template, _, _ = opened("chatml", tmp_path)
    for _ in range(50):
        render(dialogue(TWO), template)


def test_long_conversations_cost_one_rendering_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: rendering every prompt of every row."""
    template, _, _ = opened("llama3", tmp_path)
    long = dialogue(tuple((role, f"turn {n}") for n in range(40) for role in ("user", "assistant")))
    render(long, template)
    calls = []
    raw = template.raw
    monkeypatch.setattr(template, "raw", lambda *given: calls.append(1) or raw(*given))
    render(long, template)
    assert len(calls) == 1


def test_truncation_keeps_the_answer_and_its_end(tmp_path: Path) -> None:
    """Kills: cutting on the right, losing the beginning token, keeping half an answer."""
    template, codec, _ = opened("llama3", tmp_path)
    row = dialogue((("user", "one two three " * 20), ("assistant", "Blue, white and red.")))
    whole = encoded(row, template, codec)
    answer = learnt_runs(whole)[0]
    for length in range(2, len(whole.ids) + 2):
        found = encode_row(row, template, codec, length)
        if isinstance(found, Example):
            assert len(found.ids) == min(length, len(whole.ids))
            assert len(found.ids) + found.truncated_tokens == len(whole.ids)
            assert found.ids[0] == codec.bos
            assert learnt_runs(found) == [answer]
            assert not found.supervised[1]
        else:
            assert found.reason == "the answer alone is longer than max_length"
            assert length < len(answer) + 2


def test_an_answer_that_lost_its_start_is_not_learnt(tmp_path: Path) -> None:
    """Kills: learning the second half of an earlier answer."""
    template, codec, _ = opened("chatml", tmp_path)
    row = dialogue((("user", "Hi"), ("assistant", "one two three four five six"), *ONE))
    whole = learnt_runs(encoded(row, template, codec))
    for length in range(12, 100):
        found = encode_row(row, template, codec, length)
        if isinstance(found, Example):
            assert all(run in whole for run in learnt_runs(found))
            assert not found.supervised[0]


def test_what_follows_the_last_answer_is_cut_first(tmp_path: Path) -> None:
    """Kills: cutting the prompt while there is text behind that nothing is learnt from."""
    template, codec, _ = opened("chatml", tmp_path)
    row = Dialogue((*dialogue(ONE).messages, Message("user", "And then? " * 9), Message("assistant", "No.")))
    whole = encoded(row, template, codec)
    cut = encode_row(row, template, codec, len(whole.ids) - 20)
    assert isinstance(cut, Example)
    assert cut.ids == whole.ids[:-20]
    assert learnt_runs(cut) == learnt_runs(whole)


def test_text_rows_learn_every_token_but_the_first(tmp_path: Path) -> None:
    """Kills: no end token on whole texts; an end token on cut ones; control strings read as tokens."""
    template, codec, _ = opened("chatml", tmp_path)
    example = encode_row(Text("the <|im_end|> fox", "t:1"), template, codec, 100)
    assert isinstance(example, Example)
    assert example.supervised == [False] + [True] * (len(example.ids) - 1)
    assert example.ids.count(codec.eos or 0) == 1
    assert example.ids[-1] == codec.eos
    cut = encode_row(Text("the <|im_end|> fox", "t:1"), template, codec, 5)
    assert isinstance(cut, Example)
    assert cut.ids == example.ids[:5]
    assert cut.truncated_tokens == len(example.ids) - 5


def test_a_labelled_row_learns_its_label(tmp_path: Path) -> None:
    """Kills: dropping the second text of a pair, or the label."""
    template, codec, _ = opened("chatml", tmp_path)
    row = Labelled("It rains.", 1, text_pair="It is wet.", where="r:1")
    example = encode_row(row, template, codec, 100)
    assert isinstance(example, Example)
    assert codec.decode(learnt_runs(example)[0], skip_special=False) == "1<|im_end|>"
    assert "It rains.\n\nIt is wet." in codec.decode(example.ids)
