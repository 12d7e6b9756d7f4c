"""Inputs that are wrong: how to make each, what is run on it, and what the program must say. No torch is needed here.

`python fault_cases.py FOLDER` runs every case, each in its folder below FOLDER, in one process, and prints one JSON
line a case with its exit code, its output and which heavy packages have been imported by then.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG: dict[str, str] = {
    "model": "model",
    "data": "{train: train.jsonl, eval: eval.jsonl, max_length: 96}",
    "method": "{kind: lora, rank: 2}",
    "train": "{steps: 4, rows_per_step: 2, save_every: 2, lr: 1e-3}",
    "precision": "{compute: fp32}",
    "evaluate": "{metrics: [loss], generate: 4}",
    "log": "[]",
    "out": "run",
}


def config(**changes: str | None) -> str:
    """The text of a configuration; None leaves a key out."""
    return "".join(f"{key}: {value}\n" for key, value in (CONFIG | changes).items() if value is not None)


def alpaca(count: int, first: int = 0) -> list[str]:
    return [
        json.dumps({"instruction": f"Say number {at}.", "output": f"number {at} it is"})
        for at in range(first, first + count)
    ]


@dataclass(frozen=True)
class Case:
    """One wrong input.

    Attributes:
        make: changes a folder that holds a model, rows and c.yaml.
        words: what the message has to contain: the place (file and row, or key) and how to mend it.
        code: of the exit.
        command: what is run in the folder.
    """

    make: Callable[[Path], object]
    words: tuple[str, ...]
    code: int = 2
    command: str = "tune c.yaml"


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def yaml(*words: str, code: int = 2, **changes: str | None) -> Case:
    return Case(put("c.yaml", config(**changes)), ("c.yaml", *words), code)


def plain(*words: str, code: int = 2, **changes: str | None) -> Case:
    """What is found after the file was read is named by its key alone."""
    return Case(put("c.yaml", config(**changes)), words, code)


def data(train: str) -> str:
    return f"{{train: {train}, eval: eval.jsonl}}"


def raw_yaml(text: str | bytes, *words: str) -> Case:
    return Case(put("c.yaml", text), ("c.yaml", *words))


def rows(*lines: str | bytes, words: tuple[str, ...], code: int = 3) -> Case:
    """A training file with two good rows before the given lines."""
    good = [line.encode() for line in alpaca(2)]
    raw = b"\n".join([*good, *(line.encode() if isinstance(line, str) else line for line in lines)]) + b"\n"
    return Case(put("train.jsonl", raw), words, code)


def file(content: str | bytes, *words: str, name: str = "train.jsonl", code: int = 3) -> Case:
    return Case(put(name, content), words, code)


def train(settings: str, *words: str) -> Case:
    return yaml("train", *words, train=settings)


def talk(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


def row(**keys: Any) -> str:
    return json.dumps(keys)


def command(line: str, *words: str, code: int = 2) -> Case:
    return Case(lambda folder: None, words, code, line)


def model(change: Callable[[Path], object], *words: str) -> Case:
    return Case(lambda folder: change(folder / "model"), words, 4)


def cut_off(path: Path, share: float) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def to_adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')


def two(*made: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [make(folder) for make in made]


S = "steps: 4, rows_per_step: 2"
SETTINGS: dict[str, Case] = {
    "unknown key": yaml("'metod'", "did you mean method?", metod="lora"),
    "unknown inner key": train("{steps: 4, learning_rate: 1.0}", "train.learning_rate", "keys here are", "lr"),
    "misspelt inner key": train("{step: 4}", "train.step", "did you mean steps?"),
    "missing key": yaml("out", "required", out=None),
    "no data": yaml("data", "required", data=None),
    "no rows named": plain("data.train", "name a file", data="{eval: eval.jsonl}"),
    "null section": yaml("data", "section of keys", data="null"),
    "several problems": yaml("train.lr", "method.rank", train="{steps: 4, lr: x}", method="{kind: lora, rank: 0}"),
    "lr is a word": train(f"{{{S}, lr: abc}}", "train.lr", "number", "'abc'"),
    "lr is true": train(f"{{{S}, lr: true}}", "train.lr", "number", "True"),
    "lr is a list": train(f"{{{S}, lr: [1]}}", "train.lr", "number", "[1]"),
    "lr is empty text": train(f'{{{S}, lr: ""}}', "train.lr", "number", "''"),
    "lr is negative": train(f"{{{S}, lr: -1e-4}}", "train.lr", "greater than or equal to 0", "-0.0001"),
    "lr is NaN": train(f"{{{S}, lr: .nan}}", "train.lr", "finite"),
    "lr is infinite": train(f"{{{S}, lr: .inf}}", "train.lr", "finite"),
    "weight decay of 1": train(f"{{{S}, weight_decay: 1.0}}", "train.weight_decay", "less than 1"),
    "negative clip": train(f"{{{S}, clip: -1}}", "train.clip", "greater than or equal to 0"),
    "warm-up above 1": train(f"{{{S}, warmup: 1.5}}", "train.warmup", "less than or equal to 1"),
    "steps and epochs": train("{steps: 4, epochs: 1, rows_per_step: 2}", "exactly one of steps and epochs", "both"),
    "neither steps nor epochs": train("{rows_per_step: 2}", "exactly one of steps and epochs", "neither"),
    "lr is null": train(f"{{{S}, lr: null}}", "train.lr", "number", "None"),
    "no steps": train("{steps: 0}", "train.steps", "greater than or equal to 1"),
    "half a step": train("{steps: 1.5}", "train.steps", "integer", "1.5"),
    "negative epochs": train("{epochs: -1}", "train.epochs", "greater than or equal to 1"),
    "tokens and rows": train("{steps: 4, rows_per_step: 2, tokens_per_step: 9}", "either tokens", "or rows"),
    "micro above step": train("{steps: 4, rows_per_step: 2, micro_batch_rows: 3}", "micro_batch_rows is 3", "2"),
    "unknown schedule": train(f"{{{S}, schedule: cosin}}", "train.schedule", "'cosine'"),
    "unknown optimizer": train(f"{{{S}, optimizer: sgd}}", "train.optimizer", "'adamw'"),
    "stop without evaluations": train(f"{{{S}, stop: {{metric: loss}}}}", "train.stop", "evaluate.every"),
    "rank of 0": yaml("method.rank", "greater than or equal to 1", "got 0", method="{kind: lora, rank: 0}"),
    "negative rank": yaml("method.rank", "greater than or equal to 1", "-1", method="{kind: lora, rank: -1}"),
    "half a rank": yaml("method.rank", "integer", "1.5", method="{kind: lora, rank: 1.5}"),
    "dropout is NaN": yaml("method.dropout", "finite", method="{kind: lora, dropout: .nan}"),
    "dropout of 1": yaml("method.dropout", "less than 1", method="{kind: lora, dropout: 1.0}"),
    "targets that match nothing": plain("method.targets", "'qq'", "roles are q", method="{kind: lora, targets: [qq]}"),
    "targets by an old name": plain("method.targets", "did you mean q?", method="{kind: lora, targets: [query]}"),
    "no targets": yaml("method.targets", "at least 1", method="{kind: lora, targets: []}"),
    "a regex that is none": plain("method.targets", "'q_(proj'", method="{kind: lora, targets: ['q_(proj']}"),
    "targets that are numbers": yaml("method.targets.0", "text", method="{kind: lora, targets: [1]}"),
    "unknown method": yaml("method.kind", "'loar'", "did you mean lora?", method="loar"),
    "method without kind": yaml("method", "kind", "lora", method="{rank: 2}"),
    "method is a number": yaml("method", "kind", "lora", method="3"),
    "a key of another method": yaml("method.rank", "unknown key", method="{kind: full, rank: 2}"),
    "unknown objective": yaml("objective.kind", "'sff'", "sft", objective="sff"),
    "unknown metric": yaml("evaluate.metrics", "blue", "bleu", evaluate="{metrics: [blue]}"),
    "unknown template": plain("data.template", "did you mean alpaca?", data=data("train.jsonl, template: alpca")),
    "unknown format": yaml("data.format", "alpca", "alpaca", data=data("train.jsonl, format: alpca")),
    "unknown precision": yaml("precision.compute", "'bf16'", precision="{compute: fp8}"),
    "a setting without effect": yaml("precision.master", "leave it out", precision="{compute: fp32, master: false}"),
    "metrics without rows": yaml("evaluate.metrics", "set data.eval", data="{train: train.jsonl}"),
    "weight of 0": yaml("data.train", "weight", "greater than 0", data="{train: [{path: train.jsonl, weight: 0}]}"),
    "a layout of two": yaml("layout", layout="{data: 2}"),
    "no is a word": yaml("data.packing", "true or false", "'no'", data="{train: train.jsonl, packing: no}"),
    "out is a number": yaml("out", "text", "quotes", out="3"),
    "unknown log": yaml("log", "'tensorboard'", log="[tensorbord]"),
}  # fmt: skip

YAML: dict[str, Case] = {
    "key twice": raw_yaml(config() + "out: other\n", ":9", "duplicate key", "out"),
    "inner key twice": raw_yaml(config(train="{steps: 4, steps: 5}"), ":4", "duplicate key", "steps"),
    "tab": raw_yaml("model: x\n\tdata: y\n", ":2", "tab", "spaces"),
    "open quote": raw_yaml('model: "x\n', ":2", "quoted", "begins in line 1"),
    "python tag": raw_yaml("model: !!python/object/apply:os.system [true]\n", ":1", "tag", "plain values"),
    "alias": raw_yaml("model: &a x\nout: *a\n", ":1", "aliases", "write the value out"),
    "alias bomb": raw_yaml("a: &a [x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b]\n", ":1", "aliases"),
    "deep nesting": raw_yaml("model: " + "[" * 5000 + "]" * 5000 + "\n", ":1", "nested too deeply"),
    "NUL": raw_yaml("model: x\0\n", ":1", "special characters are not allowed"),
    "huge": raw_yaml("# a long comment\n" * 60_000, "1020000 bytes are too many"),
    "empty": raw_yaml("", "mapping", "tunesmith init"),
    "a list": raw_yaml("- model\n", "mapping", "tunesmith init"),
    "two documents": raw_yaml(config() + "---\n" + config(), ":9", "second document", "---"),
    "UTF-16": raw_yaml(config().encode("utf-16"), "UTF-8"),
    "no config": command("check none", "none", "no such file", "tunesmith init"),
    "a misspelt config": command("check cc.yaml", "cc.yaml", "no such file", "did you mean c.yaml?"),
    "a folder": command("check model", "model", "folder", "YAML file"),
    "a dash": command("check -", "-", "no such file"),
    "a pipe": Case(lambda folder: os.mkfifo(folder / "p.yaml"), ("p.yaml", "not a regular file"), 2, "check p.yaml"),
}

USAGE: dict[str, Case] = {
    "unknown command": command("tun c.yaml", "tun", "tune"),
    "unknown option": command("tune c.yaml --resum", "--resum", "--resume"),
    "no config named": command("check", "CONFIG", "--help"),
    "override without value": command("check c.yaml train.lr", "train.lr", "key.path=value"),
    "override of an unknown key": command("check c.yaml train.lrr=1", "train.lrr", "did you mean lr?"),
    "override that is no value": command("check c.yaml train.lr=", "train.lr", "number"),
    "override that is no YAML": command("check c.yaml train.lr=[1", "train.lr"),
    "unknown recipe": command("init alpacca", "alpacca", "alpaca"),
    "a recipe that is there": Case(put("alpaca.yaml", ""), ("alpaca.yaml", "exists", "rename"), 2, "init alpaca"),
    "a number that is none": command("check c.yaml --rows x", "--rows", "integer"),
    "resume with nothing": command("tune c.yaml --resume", "run", "leave out --resume", code=4),
    "export of no run": command("export nothing out", "nothing", code=4),
    "export to nowhere": command("export run out --to onnx", "--to", "merged"),
    "export over a folder": command("export model eval.jsonl", "eval.jsonl", "exists"),
    "evaluate an unknown metric": command("evaluate model --data eval.jsonl --metrics blue", "--metrics", "bleu"),
    "evaluate nothing": command("evaluate nothing --data eval.jsonl", "nothing", "bundled are", code=4),
    "evaluate no rows": command("evaluate model --data evil.jsonl", "evil.jsonl", "eval.jsonl", code=3),
    "evaluate by nothing": command("evaluate model --data eval.jsonl --metrics ''", "--metrics", "loss,bleu"),
    "examples without effect": command("evaluate model --data eval.jsonl --shots 2", "--shots", "exact_match"),
    "an answer over a file": command("evaluate model --data eval.jsonl --out eval.jsonl", "in the way", code=5),
    "questions that are not there": command("generate model --data evil.jsonl", "evil.jsonl", "eval.jsonl", code=3),
    "evaluate without rows": command("evaluate model", "--data"),
    "generate without prompt": command("generate model", "--prompt", "--data"),
    "chat with nothing": command("chat nothing", "nothing", "bundled are", code=4),
}

DATA: dict[str, Case] = {
    "empty file": file("", "train.jsonl", "no rows", "empty"),
    "blank lines": file("\n\n \n", "train.jsonl", "no rows"),
    "UTF-16": file("\n".join(alpaca(3)).encode("utf-16"), "train.jsonl", "UTF-16", "UTF-8"),
    "Latin-1": rows(b'{"instruction": "a", "output": "caf\xe9"}', words=("train.jsonl:3", "UTF-8", "skip_bad_rows")),
    "truncated JSON": rows(alpaca(1)[0][:-9], words=("train.jsonl:3", "ends too early", "skip_bad_rows")),
    "no JSON": rows("instruction, output", words=("train.jsonl:3", "not JSON", "skip_bad_rows")),
    "missing key": rows('{"instruction": "a"}', words=("train.jsonl:3", "'output'", "rename the key")),
    "number for text": rows('{"instruction": "a", "output": 3}', words=("train.jsonl:3", "'output'", "text is needed")),
    "null for text": rows('{"instruction": "a", "output": null}', words=("train.jsonl:3", "'output'", "null")),
    "mixed formats": rows(talk(("user", "a"), ("assistant", "b")), words=("train.jsonl", "alpaca", "messages", "3")),
    "NaN": rows('{"instruction": "a", "output": NaN}', words=("train.jsonl:3", "NaN is not JSON")),
    "key twice": rows('{"instruction": "a", "output": "b", "output": "c"}', words=("train.jsonl:3", "twice")),
    "a list for a row": rows('["a", "b"]', words=("train.jsonl:3", "a list", "object with keys")),
    "a number for a row": rows("3", words=("train.jsonl:3", "a number", "object with keys")),
    "null for a row": rows("null", words=("train.jsonl:3", "null", "object with keys")),
    "5000 digits": rows('{"instruction": "a", "output": ' + "7" * 5000 + "}", words=("train.jsonl:3", "digits")),
    "deep nesting": rows('{"instruction": ' + "[" * 100_000 + "}", words=("train.jsonl:3", "nested")),
    "half a surrogate": rows('{"instruction": "\\ud800", "output": "b"}', words=("train.jsonl:3", "surrogate")),
    "blank answer": rows('{"instruction": "a", "output": "  \\n"}', words=("train.jsonl:3", "'output'", "empty")),
    "many bad rows": rows(
        *['{"instruction": "a", "output": 1}'] * 50, words=("train.jsonl:3:", "train.jsonl:22:", "... and 30 more")
    ),
    "unknown role": file(talk(("usr", "a"), ("assistant", "b")), "train.jsonl:1", "'usr'", "did you mean user?"),
    "user last": file(talk(("user", "a"), ("assistant", "b"), ("user", "c")), "train.jsonl:1", "last turn"),
    "unknown keys": file(row(frage="a", antwort="b"), "train.jsonl", "frage", "antwort", "data.format"),
    "a key that drives the terminal": file(row(**{"\x1b[31mfrage": "a"}), "train.jsonl:1", "\\x1b[31mfrage"),
    "rows for judges": file(row(prompt="a", chosen="b", rejected="c"), "train.jsonl", "chosen"),
    "CSV by name JSONL": file("instruction,output\na,b\n", "train.jsonl", "CSV", ".csv"),
    "HTML by name JSONL": file("<!DOCTYPE html><html>not found</html>", "train.jsonl", "HTML"),
    "half a gzip": file(gzip.compress("\n".join(alpaca(300)).encode())[:-40], "train.jsonl", "gzip"),
    "parquet by name JSONL": file(b"PAR1" + bytes(90), "train.jsonl", "arquet", ".parquet"),
    "missing path": Case(
        put("c.yaml", config(data=data("trian.jsonl"))), ("trian.jsonl", "did you mean train.jsonl?"), 3
    ),
    "missing eval": Case(put("c.yaml", config(data="{train: train.jsonl, eval: no.jsonl}")), ("no.jsonl",), 3),
    "a folder": Case(put("c.yaml", config(data=data("model"))), ("model", "folder", "name"), 3),
    "a pipe": Case(
        two(lambda folder: os.mkfifo(folder / "p.jsonl"), put("c.yaml", config(data=data("p.jsonl")))),
        ("p.jsonl", "pipe"), 3,
    ),
    "a device": Case(put("c.yaml", config(data=data("/dev/zero"))), ("/dev/zero",), 3),
    "a glob that matches nothing": Case(put("c.yaml", config(data=data("'x*.jsonl'"))), ("x*.jsonl", "matches"), 3),
    "a subset of none": Case(put("c.yaml", config(data=data("'train.jsonl#0'"))), ("train.jsonl#0",), 3),
    "all rows too long": Case(
        put("c.yaml", config(data=data("train.jsonl, max_length: 2"))),
        ("0 trainable rows of 24", "data.max_length"), 3,
    ),
    "CSV with a short line": Case(
        two(put("t.csv", "instruction,output\na,b\nc\n"), put("c.yaml", config(data=data("t.csv")))),
        ("t.csv:3", "1 cells", "2"), 3,
    ),
    "half a parquet": Case(
        two(put("t.parquet", b"PAR1" + bytes(9)), put("c.yaml", config(data=data("t.parquet")))),
        ("t.parquet",), 3,
    ),
    "a JSON list that ends": Case(
        two(put("t.json", '[{"instruction": "a", "output": "b"},\n'), put("c.yaml", config(data=data("t.json")))),
        ("t.json:", "too early"), 3,
    ),
    "a template that is none": Case(
        two(put("t.jinja", "{% for x %}"), put("c.yaml", config(data=data("train.jsonl, template: t.jinja")))),
        ("t.jinja", "1"), 2,
    ),
}  # fmt: skip

MODEL: dict[str, Case] = {
    "no such model": plain("'smollm2-135'", "did you mean smollm2-135m?", code=4, model="smollm2-135"),
    "no config.json": model(lambda f: (f / "config.json").unlink(), "model", "config.json is missing", "folder"),
    "no tokenizer": model(lambda f: (f / "tokenizer.json").unlink(), "model", "tokenizer.json is missing", "fetch it"),
    "no weights": model(lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing", "fetch"),
    "pickled weights": model(
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin", "save_pretrained"
    ),
    "truncated weights": model(lambda f: cut_off(f / "model.safetensors", 0.7), "model.safetensors", "cut off"),
    "corrupt header": model(put("model.safetensors", b"\x20" + bytes(7) + b"{" * 32), "model.safetensors", "header"),
    "HTML for weights": model(put("model.safetensors", "<html>" * 99), "model.safetensors", "safetensors"),
    "config is no JSON": model(put("config.json", "{"), "config.json", "not valid JSON"),
    "config without type": model(put("config.json", "{}"), "config.json", "model_type"),
    "tokenizer is no JSON": model(put("tokenizer.json", "<html>"), "tokenizer.json", "not valid JSON"),
    "tokenizer of nothing": model(put("tokenizer.json", "{}"), "tokenizer.json", "vocabulary"),
    "vocabulary mismatch": model(
        lambda f: edit_json(f / "config.json", vocab_size=100), "tokenizer.json", "100 rows", "with the weights"
    ),
    "an adapter for a model": model(to_adapter, "some/base", "no such folder"),
    "a weights file": plain("model.safetensors", "folder", code=4, model="model/model.safetensors"),
    "an encoder that should write": Case(
        lambda f: edit_json(f / "model/config.json", model_type="bert"),
        ("c.yaml: objective", "sft learns to write text, and bert is an encoder", "predict"), 2,
    ),
    "rows beyond the positions": Case(
        two(
            lambda f: edit_json(f / "model/config.json", model_type="gpt2", n_positions=30),
            lambda f: edit_json(f / "model/config.json", max_position_embeddings=30),
        ),
        ("c.yaml: data.train", "38 tokens", "30 positions", "data.max_length"), 2,
    ),
    "soft tokens beyond the positions": Case(
        two(
            put("c.yaml", config(method="{kind: prompt, length: 20}")),
            lambda f: edit_json(f / "model/config.json", model_type="gpt2", n_positions=57),
            lambda f: edit_json(f / "model/config.json", max_position_embeddings=57),
        ),
        ("data.train", "38 tokens", "57 positions, of which the method takes 20", "at most 37"), 2,
    ),
    "a prompt of text without text": yaml("method", "init: text", method="{kind: prompt, init: text}"),
    "an endless template": model(
        put("chat_template.jinja", "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"),
        "template", "data.template",
    ),
    "a template that escapes": model(
        put("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "unsafe", "data.template"
    ),
}  # fmt: skip

OUT: dict[str, Case] = {
    "a file in the way": Case(put("run", ""), ("run", "a file is in the way", "out:"), 5),
    "a file above it": Case(put("c.yaml", config(out="eval.jsonl/run")), ("eval.jsonl", "a file is in the way"), 5),
    "a pseudo file system": Case(put("c.yaml", config(out="/proc/nothing/run")), ("/proc", "out:"), 5),
    "a path that is too long": Case(put("c.yaml", config(out="x" * 300)), ("too long",), 5),
}

CASES: dict[str, Case] = {
    f"{group}: {name}": case
    for group, cases in {
        "settings": SETTINGS, "yaml": YAML, "usage": USAGE, "data": DATA, "model": MODEL, "out": OUT,
    }.items()
    for name, case in cases.items()
}  # fmt: skip


def run_here(line: str) -> dict[str, Any]:
    """Runs the program in this process: its exit code, what it wrote, and the heavy packages that are imported."""
    from tunesmith.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
    heavy = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy}


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder with its size."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


if __name__ == "__main__":
    for number, (case_name, given) in enumerate(CASES.items()):
        os.chdir(Path(sys.argv[1]) / str(number))
        before = tree(Path())
        answer = run_here(given.command)
        left = sorted(set(tree(Path()).items()) ^ set(before.items()))
        print(json.dumps({"name": case_name, **answer, "left": left}), flush=True)
