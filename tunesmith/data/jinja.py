"""Chat templates as programs that nobody has to trust: a sandbox, a budget of steps, and a first run elsewhere.

The one idea: a template is compiled and rendered once in a process that is killed when it takes too long or too
much memory; only then is it used here, with its loops and calls counted. What it renders is `templates`' affair.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from tunesmith.core.errors import ConfigError

STEPS = 1_000_000  # loop turns and calls of one render; a dialogue of a thousand turns needs some ten thousand
_CPU_SECONDS = 1.0
_WALL_SECONDS = 20.0  # a stop for a hung machine; processor time is what limits
_MEMORY_BYTES = 1 << 30
_LONGEST = 10_000_000  # characters
# A prompt must not change from day to day: the date that Llama 3.1's template falls back to.
_TODAY = datetime(2024, 7, 26)


class Refused(Exception):
    """The template called `raise_exception`: it does not take this conversation."""


class Program:
    """A compiled template.

    Raises ConfigError when it does not compile, or when it is not `trusted` and the first run, on `samples` in a
    process of its own, fails in all of them or exceeds its limits.
    """

    def __init__(self, source: str, where: str, samples: list[dict[str, Any]], trusted: bool = False) -> None:
        self.where = where
        if not trusted:
            _try_elsewhere(source, where, samples)
        try:
            self._environment = _Environment()
            tree = self._environment.parse(source)
            self.reads_context = _reads(tree, "context")
            self._template = self._environment.program(tree)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the template does not compile: {_line(error)}", where=where) from error

    def render(self, names: Mapping[str, Any]) -> str:
        """The text. Raises Refused, and ConfigError when the template fails or does not end."""
        self._environment.begin()
        try:
            return self._template.render(names)
        except Refused:
            raise
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            raise ConfigError(f"the template fails: {_line(error)}", where=self.where) from error
        except (RecursionError, MemoryError) as error:
            raise ConfigError("the template does not end", where=self.where) from error


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, with loops, calls and products counted."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters["counted"] = self._counted
        self.globals.update(raise_exception=_raise_exception, strftime_now=_TODAY.strftime)
        self._left = threading.local()

    def program(self, tree: nodes.Template) -> jinja2.Template:
        """The compiled tree, every loop over a counted iterable."""
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
        code = self.compile(tree)
        return self.template_class.from_code(self, code, self.make_globals(None))

    def begin(self) -> None:
        self._left.steps = STEPS

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._spend()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, str | list | tuple) else abs(side) for side in (left, right)]
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "*" and sizes[0] * sizes[1] > _LONGEST and not numbers:
            raise SecurityError("a product that long is not allowed in a template")
        if operator == "**" and sizes[1] > 64:
            raise SecurityError("a power that high is not allowed in a template")
        return super().call_binop(context, operator, left, right)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._spend()
            yield item

    def _spend(self) -> None:
        left = getattr(self._left, "steps", STEPS)
        if left <= 0:
            raise SecurityError(f"more than {STEPS} steps for one conversation")
        self._left.steps = left - 1


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for other programs; here it is its body and nothing else."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: object) -> NoReturn:
    raise Refused(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
    # jinja's own filter writes < as an escape, which no model was trained on
    allowed = {key: settings[key] for key in ("separators", "sort_keys") if key in settings}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)


def _reads(tree: nodes.Template, name: str) -> bool:
    if any(node.attr == name for node in tree.find_all(nodes.Getattr)):
        return True
    keys = (node.arg for node in tree.find_all(nodes.Getitem))
    return any(isinstance(key, nodes.Const) and key.value == name for key in keys)


def _line(error: BaseException) -> str:
    place = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return place + (str(error).splitlines() or [type(error).__name__])[0][:300]


_tried: set[tuple[str, str]] = set()


def _try_elsewhere(source: str, where: str, samples: list[dict[str, Any]]) -> None:
    job = json.dumps({"source": source, "samples": samples})
    if (where, job) in _tried:
        return
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-P", "-c", "from tunesmith.data.jinja import _try_here; _try_here()"]
    try:
        done = subprocess.run(
            command,
            input=job.encode(),
            capture_output=True,
            timeout=_WALL_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError("the template does not end", where=where) from error
    if done.returncode < 0:
        limit = f"{_CPU_SECONDS:g} s of computing or {_MEMORY_BYTES >> 20} MB for a short conversation"
        raise ConfigError(f"the template takes more than {limit}", where=where)
    if done.returncode:
        tail = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise ConfigError(f"the template could not be tried: {' '.join(tail)}", where=where)
    problem = json.loads(done.stdout)
    if problem:
        raise ConfigError(problem, where=where)
    _tried.add((where, job))


def _try_here() -> None:
    """The other process: limits itself, renders every sample, prints the problem or an empty string as JSON."""
    import resource
    import signal

    job = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)  # its signal kills, even in the middle of a C call
    try:
        program = Program(job["source"], "", [], trusted=True)
        problems = [_problem(program, sample) for sample in job["samples"]]
    except ConfigError as error:
        problems = [error.message]
    sys.stdout.write(json.dumps(problems[0] if all(problems) else ""))


def _problem(program: Program, sample: dict[str, Any]) -> str:
    try:
        program.render(sample)
    except Refused as error:
        return f"the template refuses every conversation: {error}"
    except ConfigError as error:
        return error.message
    return ""
