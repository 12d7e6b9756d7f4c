"""METEOR 1.5 (Denkowski and Lavie 2014, W14-3348) through its reference implementation, a Java program.

The program aligns words (exact, stem, synonym, paraphrase) and prints counts; the score is made from the counts
here, so that rows can be resampled without running Java again. The jar comes with the extra `tunesmith[meteor]`.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.core.errors import ConfigError, ResourceError
from tunesmith.evaluate.metrics import ptb
from tunesmith.evaluate.metrics.metric import Metric, References

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tunesmith.evaluate.metrics.metric import Floats

# the program's English parameters for ranking; weights of exact, stem, synonym and paraphrase matches
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_WEIGHTS = (1.0, 0.6, 0.8, 0.6)
_COUNTS = 23


class Meteor(Metric):
    """Row statistics are the program's: lengths, function words, matches by kind and side, chunks."""

    name = "meteor"

    @property
    def signature(self) -> str:
        return f"METEOR 1.5|tok:{ptb.SIGNATURE}|-l en -norm|task:rank|refs:max|scale:100"

    def require(self) -> None:
        _java()
        _jar()

    def statistics(self, completions: Sequence[str], references: References) -> Floats:
        import numpy as np

        lines = [
            " ||| ".join(["SCORE", *map(_plain, refs), _plain(text)])
            for text, refs in zip(completions, references, strict=True)
        ]
        rows = [[float(count) for count in line.split()] for line in _run(lines)]
        if [len(row) for row in rows] != [_COUNTS] * len(lines):
            raise ResourceError(f"METEOR answered {len(rows)} of {len(lines)} rows", where=str(_jar()))
        counts = np.asarray(rows, dtype=np.float64)
        counts[_whole(counts), 20] = 0  # the program does not count the one chunk of a perfect row
        return counts

    def value(self, sums: Floats) -> Floats:
        import numpy as np

        weights = np.asarray(_WEIGHTS)
        matches = _matches(sums)
        weighted = np.einsum("...kcs,k,c->...s", matches, weights, [_DELTA, 1 - _DELTA])
        length = _DELTA * (sums[..., 0:2] - sums[..., 2:4]) + (1 - _DELTA) * sums[..., 2:4]
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = np.moveaxis(weighted / length, -1, 0)
            mean = 1.0 / ((1 - _ALPHA) / precision + _ALPHA / recall)
            scatter = sums[..., 20] / (sums[..., 21:23].sum(-1) / 2)
        score = mean * (1 - _GAMMA * scatter**_BETA)
        return np.where(sums[..., 21] > 0, 100.0 * score, 0.0)


def _matches(counts: Floats) -> Floats:
    """[..., 4, 2, 2]: kind of match; content words, function words; of the completion, of the reference."""
    return counts[..., 4:20].reshape(*counts.shape[:-1], 4, 2, 2)


def _whole(counts: Floats) -> NDArray[np.bool_]:
    """Rows [n] whose every word is matched, in one chunk."""
    return (counts[:, 20] == 1) & (_matches(counts).sum((1, 2)) == counts[:, 0:2]).all(1)


def _plain(text: str) -> str:
    # bars divide the program's fields, so they cannot be words
    return " ".join(ptb.tokenize(text.replace("|||", "")))


def _run(lines: list[str]) -> list[str]:
    jar = _jar()
    command = [
        _java(),
        "-Dfile.encoding=UTF-8",
        "-Xmx2G",
        "-jar",
        jar.name,
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    done = subprocess.run(
        command,
        cwd=jar.parent,
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ResourceError(f"METEOR's Java program ended with {done.returncode}: {said}", where=str(jar))
    return done.stdout.splitlines()


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise ConfigError(
            "the metric meteor needs Java, and there is no java on the PATH",
            where="evaluate.metrics",
            hint="install a Java runtime (Debian: default-jre-headless), or leave meteor out",
        )
    return java


def _jar() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")  # located, not imported: only its jar is used
    for folder in (spec.submodule_search_locations or []) if spec else []:
        jar = Path(folder) / "meteor" / "meteor-1.5.jar"
        if jar.is_file():
            return jar
    raise ConfigError(
        "the metric meteor needs the METEOR 1.5 jar of the package pycocoevalcap, which is not installed",
        where="evaluate.metrics",
        hint='pip install "tunesmith[meteor]", or leave meteor out',
    )
