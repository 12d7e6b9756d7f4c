"""The documentation is true: links lead somewhere, commands and keys exist, and what it tells people to run runs."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from tunesmith.adapt.methods import METHODS
from tunesmith.cli.main import app
from tunesmith.config import DEFAULTS, Config, build_config
from tunesmith.core.yaml import read_yaml_text
from tunesmith.data.formats import FORMATS, convert, fits
from tunesmith.data.section import DataSection, Part
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.section import EvaluateSection
from tunesmith.models.bundled import MODELS
from tunesmith.models.families import FAMILIES
from tunesmith.objectives.distill import Distill
from tunesmith.objectives.objectives import OBJECTIVES
from tunesmith.parallel.layout import LayoutSection
from tunesmith.run.stages import load_stages
from tunesmith.train.section import PrecisionSection, StopSection, TrainSection

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def read(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page that are in one of these languages."""
    return [text for language, text in FENCE.findall(read(page)) if language in languages]


def file_of(block: str) -> str | None:
    """The file that a block is to be saved as: the comment in its first line."""
    named = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", block)
    return named.group(1) if named else None


def prose(text: str) -> str:
    return FENCE.sub("", text)


# links


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", prose(page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    """Kills: a page that was renamed, a heading that was reworded."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


# commands


def mentioned(text: str) -> Iterator[str]:
    """Every command line in code: after `$ ` in a block, or alone between backticks."""
    for _, block in FENCE.findall(text):
        yield from re.findall(r"^\$ .*?(\btunesmith .*)$", block, re.M)
    yield from re.findall(r"`(tunesmith [^`]+)`", prose(text))


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_command_and_option_exists(page: Path) -> None:
    """Kills: a command of the plan that is not there yet, an option that was renamed."""
    for line in mentioned(page.read_text("utf-8")):
        words = line.split("#")[0].split()
        options = {name for name in words if name.startswith("-") and name != "-"}
        if words[1].startswith("-"):
            assert options <= {"--help", "--debug"}, line
            continue
        command = COMMANDS.get(words[1])
        assert command is not None, f"{page.name}: {line}"
        known = {name for parameter in command.params for name in parameter.opts} | {"--help", "--debug"}
        assert options <= known, f"{page.name}: {line}"


def test_every_command_is_documented() -> None:
    """Kills: a command that no page mentions."""
    told = {line.split()[1] for page in PAGES for line in mentioned(page.read_text("utf-8"))}
    assert set(COMMANDS) <= told


# configuration

SECTIONS: dict[str, type[BaseModel]] = {
    "The file": Config,
    "data": DataSection,
    "data.train[]": Part,
    "train": TrainSection,
    "train.stop": StopSection,
    "precision": PrecisionSection,
    "layout": LayoutSection,
    "evaluate": EvaluateSection,
    **{f"method: {name}": METHODS.load(name) for name in METHODS.names()},
    **{f"objective: {name}": OBJECTIVES.load(name) for name in OBJECTIVES.names()},
}


def documented() -> dict[str, dict[str, str]]:
    """Section to key to the cell of its default."""
    found: dict[str, dict[str, str]] = {}
    for part in re.split(r"^## ", read("configuration.md"), flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        found[title] = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", body, re.M))
    return found


def test_the_documented_keys_are_those_there_are() -> None:
    """Kills: a key that is documented and unknown, or known and undocumented; a section that was forgotten."""
    assert {title: set(keys) for title, keys in documented().items()} == {
        title: {field.alias or name for name, field in section.model_fields.items()}
        for title, section in SECTIONS.items()
    }


@pytest.mark.parametrize("title", SECTIONS)
def test_the_documented_defaults_are_those_there_are(title: str) -> None:
    """Kills: a default that was changed in the code alone."""
    section = SECTIONS[title]
    required = {name for name, field in section.model_fields.items() if field.is_required() and name not in DEFAULTS}
    needed = {
        TrainSection: {"steps": 1},
        Part: {"path": "x"},
        StopSection: {"metric": "loss"},
        Distill: {"teacher": "x"},
    }
    given: dict[str, Any] = needed.get(section, {})
    built = {**section.model_validate(given).model_dump(mode="json"), "steps": None} if section is not Config else {}
    for key, cell in documented()[title].items():
        if key in required:
            assert cell == "*required*", key
        elif section is Config and isinstance(Config.model_fields[key].default, BaseModel):
            assert cell == "", key
        else:
            value = read_yaml_text(cell.strip("`"), key)
            wanted = built[key] if built else DEFAULTS.get(key, Config.model_fields[key].default)
            assert value == wanted, key


def test_the_short_configuration_of_the_page_is_one() -> None:
    for block in blocks("configuration.md", "yaml"):
        build_config(read_yaml_text(block, "configuration.md"))


@pytest.mark.parametrize("recipe", sorted((ROOT / "tunesmith" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(recipe: Path) -> None:
    """Kills: a key that was renamed and left in a recipe."""
    load_stages(recipe)


# tables


def first_cells(page: str) -> str:
    return "\n".join(re.findall(r"^\|([^|]*)\|", read(page), re.M))


def names_in(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_tables_name_what_the_code_has() -> None:
    """Kills: a metric, method, family, format or bundled model that came or went without its page."""
    assert set(METRICS.names()) <= names_in(first_cells("evaluation.md"))
    assert set(METHODS.names()) <= names_in(first_cells("methods.md"))
    assert set(FAMILIES) <= names_in(first_cells("models.md"))
    assert set(MODELS) <= names_in(first_cells("models.md"))
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", read("data.md"), re.M))
    assert {name: names_in(needs) for name, needs in rows.items()} == {
        name: set(known.needs) for name, known in FORMATS.items()
    }


def test_the_example_rows_are_of_the_formats_that_are_listed() -> None:
    """Kills: an example that its own format refuses."""
    rows = [read_yaml_text(line, "data.md") for line in blocks("data.md", "json")[0].splitlines()]
    seen = [fits(row) for row in rows]
    assert seen == list(FORMATS)
    for row, name in zip(rows, seen, strict=True):
        assert name is not None
        convert(row, name, "data.md")


def test_the_dependencies_are_those_of_the_project() -> None:
    """Kills: a dependency that nobody justified, or one that is gone."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def bare(names: list[str]) -> set[str]:
        return {re.split(r"[<>=\[ ]", name)[0] for name in names}

    core, _, extras = read("dependencies.md").partition("Extras,")
    assert set(re.findall(r"^\| `([\w.-]+)` \|", core, re.M)) == bare(project["dependencies"])
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", extras, re.M))
    assert {name: names_in(cell) for name, cell in rows.items()} == {
        name: bare(needs) for name, needs in project["optional-dependencies"].items()
    }


def test_the_folders_of_the_readme_are_there_and_all_of_them() -> None:
    """Kills: a folder in the table that does not exist, and one that is missing from it."""
    told = set(re.findall(r"^\| `(\w+)/` \|", (ROOT / "README.md").read_text("utf-8"), re.M))
    tracked = subprocess.run(["git", "ls-files", "*/*"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    there = {path.split("/")[0] for path in tracked if not path.startswith(".")}
    assert told == there or (not there and all((ROOT / name).is_dir() for name in told))


# Python


def test_the_public_names_are_listed() -> None:
    """Kills: a public name that came or went without its page."""
    import tunesmith

    told = re.search(r"`ts\.__all__`: (.*?)\.\n", read("python.md"), re.S)
    assert told is not None
    assert names_in(told.group(1)) == set(tunesmith.__all__)


@pytest.mark.parametrize("page", ["python.md", "methods.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model in place of the bundled one. Kills: a name or an argument that the page has and the code not."""
    from tiny_folders import tiny_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    row = '{"instruction": "name a colour", "output": "Red, green and blue"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 4)
    model = tiny_folder(tmp_path / "model")
    for number, block in enumerate(block for block in blocks(page, "python") if file_of(block) is None):
        code = block.replace('"smollm2-135m"', repr(str(model))).replace('"alpaca-demo"', '"rows.jsonl"')
        path = tmp_path / f"block{number}.py"
        path.write_text(code)
        runpy.run_path(str(path))


def test_a_method_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of CONTRIBUTING through the laws of every method. Kills: a seam that needs an edit elsewhere."""
    import torch
    from conformance import check_method, check_rows

    [source] = [block for block in blocks("../CONTRIBUTING.md", "python") if file_of(block) == "gain.py"]
    (tmp_path / "gain.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS.table, "gain", ("gain:Gain", "scales the outputs of chosen maps"))
    told = build_config(
        {"model": "m", "data": {"train": "x"}, "method": "gain", "train": {"steps": 1}, "out": "o"}
    ).method
    assert type(told).__name__ == "Gain"
    for family in ("llama", "gpt2", "bert"):
        check_method(METHODS.load("gain")(), family, torch.float32, tmp_path / family)
        check_rows(METHODS.load("gain")(), family, tmp_path / family)
    sys.modules.pop("gain", None)


# the tutorial


@dataclass
class Typed:
    """One command of the tutorial, what is said to appear, and whether Ctrl-C is pressed after how many lines."""

    command: str
    lines: list[str] = field(default_factory=list)
    interrupted_after: int | None = None


def typed(block: str) -> list[Typed]:
    found: list[Typed] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(Typed(line[2:]))
        elif line == "^C":
            found[-1].interrupted_after = len(found[-1].lines)
        elif line.strip() != "...":
            found[-1].lines.append(line)
    return found


def shown(lines: list[str], output: str) -> int:
    """How many of the lines appear in the output, in their order; `...` in a line stands for anything."""
    seen = iter(" ".join(line.split()) for line in output.splitlines())
    for number, line in enumerate(lines):
        pattern = re.compile(".*".join(re.escape(" ".join(part.split())) + " ?" for part in line.split("...")))
        if not any(pattern.fullmatch(text) for text in seen):
            return number
    return len(lines)


def press(one: Typed, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Runs a command; where the tutorial says so, presses Ctrl-C when the lines before it have appeared."""
    log = folder.parent / "output.txt"
    with log.open("wb") as stream:
        running = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", one.command],
            cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            # whoever starts the tests in the background makes them and their children deaf to it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        if one.interrupted_after is not None:
            before = one.lines[: one.interrupted_after]
            while running.poll() is None and shown(before, log.read_text("utf-8", "replace")) < len(before):
                time.sleep(0.05)
            os.killpg(running.pid, signal.SIGINT)
        code = running.wait()
    return code, log.read_text("utf-8", "replace")


def test_the_reading_of_the_tutorial_is_strict() -> None:
    """Kills: a reader for which everything has appeared."""
    assert shown(["a ...", "c"], "a 1\nb\nc\n") == 2
    assert shown(["c", "a ..."], "a 1\nb\nc\n") == 1
    assert shown(["a", "b"], "a 1\nb\n") == 0


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("page", ["tutorial.md", "predict.md", "compare.md", "preference.md"])
def test_the_tutorial_runs(page: str, tmp_path: Path) -> None:
    """Every command in order: its exit code, and the lines that are said not to vary."""
    folder = tmp_path / "own"
    folder.mkdir()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    for language, block in FENCE.findall(read(page)):
        name = file_of(block)
        if language != "console":
            if name:
                (folder / name).write_text(block)
            continue
        for one in typed(block):
            began = time.monotonic()
            code, output = press(one, folder, environment)
            print(f"{time.monotonic() - began:6.1f} s  {one.command}")
            assert code == (0 if one.interrupted_after is None else 130), f"{one.command}\n{output}"
            there = shown(one.lines, output)
            assert there == len(one.lines), f"{one.command}: {one.lines[there]!r} is not in\n{output}"
