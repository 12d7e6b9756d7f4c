"""Whether more data is worth it: short runs on shares of the data, and the curve through their losses.

The one idea: a share is a weight on the parts of the mixture, whose rows a seed draws; runs are trials, so that what
was done is kept. More parameters are tried, too, once, on the largest share: twice the method's rank, size or length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith.config import Config, as_dict, build_config
from tunesmith.core.errors import ConfigError, ModelError, Stopped
from tunesmith.core.files import canonical_json, write_atomic
from tunesmith.core.progress import progress_bar
from tunesmith.plan.curve import Curve, Estimate, fit_curve
from tunesmith.run import say
from tunesmith.run.folder import RunFolder, check_writable, locked
from tunesmith.run.prepare import prepare
from tunesmith.run.stopping import stoppable
from tunesmith.run.sweep_files import drop_checkpoints
from tunesmith.run.trials import Trial, carry_out

SHARES, SEEDS = (0.01, 0.02, 0.04, 0.08), 2
MISSED = 3  # times the deviation between seeds, from which on runs do not lie on the curve
FEWEST_ROWS = 8  # of the smallest share
_SIZES = ("rank", "size", "length")


@dataclass(frozen=True)
class Attempt:
    """A run on a share of the rows.

    Attributes:
        wide: its method has twice the trained numbers.
    """

    trial: Trial
    share: float
    wide: bool = False


@dataclass(frozen=True)
class Answer:
    """What the runs say.

    Attributes:
        runs: {share, seed, wide, tokens, loss} of each.
        curve: through those of the method as it is.
        all_tokens: of the whole data, read once.
        doubled: by how much the loss of the largest share falls with twice the trained numbers; None where the method
            has no size.
    """

    runs: list[dict[str, Any]]
    curve: Curve
    all_tokens: float
    doubled: Estimate | None

    @property
    def more_data(self) -> Estimate:
        """By how much it falls with twice the rows of the largest share."""
        return self.curve.gain(float(self.curve.tokens.max()))

    @property
    def between_seeds(self) -> float:
        """Deviation of the losses of one share."""
        apart = [
            one["loss"] - other["loss"]
            for place, one in enumerate(self.runs)
            for other in self.runs[place + 1 :]
            if one["share"] == other["share"] and not (one["wide"] or other["wide"])
        ]
        return (sum(gap * gap for gap in apart) / (2 * max(1, len(apart)))) ** 0.5

    @property
    def worth(self) -> str:
        """data, parameters, or neither where the runs do not tell them apart."""
        data, size = self.more_data, self.doubled
        if size is None:
            return "data" if data.low > self.curve.noise else "neither"
        if data.low > size.high:
            return "data"
        return "parameters" if size.low > data.high else "neither"

    def as_dict(self) -> dict[str, Any]:
        """curve.json."""
        return {
            "runs": self.runs,
            "curve": self.curve.as_dict(),
            "tokens": self.all_tokens,
            "loss": asdict(self.curve.at(self.all_tokens)),
            "twice_the_data": asdict(self.curve.gain(self.all_tokens)),
            "largest_share": {
                "twice_the_data": asdict(self.more_data),
                "twice_the_parameters": self.doubled and asdict(self.doubled),
            },
            "between_seeds": self.between_seeds,
            "worth": self.worth,
        }


def find_curve(config: Config, folder: Path) -> Answer:
    """Runs what has not been run, below `folder`, and writes curve.json there.

    Raises:
        ConfigError: the run has no held-out rows, or too few rows.
        Stopped: after a signal, with everything kept; the same command goes on.
    """
    if config.objective.kind != "sft" or not config.data.eval:
        told = "a curve is of the loss of text on held-out rows"
        raise ConfigError(told, where="plan --curve", hint="set objective to sft and name data.eval")
    prepared = prepare(config)
    rows = prepared.train_statistics.kept * SHARES[0]
    if rows < FEWEST_ROWS:
        told = f"{100 * SHARES[0]:.0f} % of the data are {rows:.3g} rows; a curve needs {FEWEST_ROWS}"
        raise ConfigError(told, where="data.train", hint="with so few rows, tune on all of them")
    planned = list(attempts(config, folder))
    check_writable(folder)
    with locked(RunFolder(folder)):
        try:
            with stoppable(RunFolder(folder)):
                found = [_carried_out(one) for one in planned]
        except Stopped as stopped:
            hint = "the same command goes on"
            raise Stopped(
                "stopped; what is done is kept", where=str(folder), hint=hint, exit_code=stopped.exit_code
            ) from stopped
        answer = answered(found, float(prepared.train_statistics.tokens))
        write_atomic(folder / "curve.json", canonical_json(answer.as_dict(), indent=1) + "\n")
    return answer


def attempts(config: Config, folder: Path) -> Iterator[Attempt]:
    """The runs of every share, with each seed, and that of the largest share with twice the trained numbers."""
    for share in SHARES:
        for seed in range(config.train.seed, config.train.seed + SEEDS):
            yield Attempt(_trial(config, folder, share, seed, {}), share)
    wide = _doubled(config)
    if wide:
        yield Attempt(_trial(config, folder, SHARES[-1], config.train.seed, wide), SHARES[-1], wide=True)


def answered(runs: list[dict[str, Any]], all_tokens: float) -> Answer:
    """The answer of finished runs, {share, seed, wide, tokens, loss} each."""
    plain = [run for run in runs if not run["wide"]]
    curve = fit_curve([run["tokens"] for run in plain], [run["loss"] for run in plain])
    doubled = None
    for wide in (run for run in runs if run["wide"]):
        # beside the run of the same rows and seed; each of both strays from what is expected
        twin = next(run for run in plain if (run["share"], run["seed"]) == (wide["share"], wide["seed"]))
        gain, reach = twin["loss"] - wide["loss"], curve.spare_t * 2**0.5 * curve.noise
        doubled = Estimate(gain, gain - reach, gain + reach)
    return Answer(runs, curve, all_tokens, doubled)


def show_curve(found: dict[str, Any]) -> list[str]:
    """Lines for people, of `Answer.as_dict()`."""
    lines = ["share   seed    tokens    loss on held-out rows"]
    for run in found["runs"]:
        wide = "  twice the trained numbers" if run["wide"] else ""
        lines.append(f"{100 * run['share']:4.0f} %  {run['seed']:5}  {run['tokens']:8,}    {run['loss']:.4f}{wide}")
    curve, largest = found["curve"], found["largest_share"]
    lines += [
        f"loss = {curve['floor']['value']:.3f} + {curve['amplitude']['value']:.4g} / tokens^"
        f"{curve['exponent']['value']:.3f}; runs stray by {curve['noise']:.4f}",
        f"the floor lies between {_between(curve['floor'])}, the exponent between {_between(curve['exponent'])}",
        f"all {found['tokens']:,.0f} tokens: a loss of {_estimate(found['loss'])}; twice as many take off "
        f"{_estimate(found['twice_the_data'])}",
        f"at {100 * SHARES[-1]:.0f} %: twice the data take off {_estimate(largest['twice_the_data'])}",
    ]
    if largest["twice_the_parameters"] is not None:
        lines[-1] += f", twice the trained numbers {_estimate(largest['twice_the_parameters'])}"
    worth = {
        "data": "more data is worth more than more trained numbers",
        "parameters": "more trained numbers are worth more than more data",
        "neither": "neither is clearly worth more than the other",
    }
    lines.append(worth[found["worth"]])
    if curve["noise"] > MISSED * found["between_seeds"]:
        lines.append(
            f"warning: the runs do not lie on such a curve: seeds of a share are {found['between_seeds']:.4f} apart; "
            "the smallest may be too short to learn (more rows, or a smaller tokens_per_step)"
        )
    return lines


def _estimate(found: dict[str, float]) -> str:
    return f"{found['value']:.4f} ({_between(found, 4)})"


def _between(found: dict[str, float], digits: int = 3) -> str:
    return f"{found['low']:.{digits}f} and {found['high']:.{digits}f}"


def _trial(config: Config, folder: Path, share: float, seed: int, method: dict[str, Any]) -> Trial:
    raw = as_dict(config)
    parts = [{"path": part.path, "weight": part.weight * share} for part in config.data.train]
    name = f"share-{100 * share:02.0f}-seed-{seed}" + ("-twice" if method else "")
    raw["data"]["train"] = parts
    raw["method"] |= method
    raw["train"] |= {"epochs": 1, "steps": None, "seed": seed, "minutes": None, "tokens": None, "stop": None}
    raw["evaluate"] |= {"metrics": ["loss"], "every": 0, "shots": 0}
    return Trial(name, seed, build_config({**raw, "log": [], "out": str(folder / name)}), timed=False)


def _doubled(config: Config) -> dict[str, Any]:
    """Settings of the method with twice the trained numbers, scaled alike; none where it has no size."""
    method = config.method.model_dump()
    key = next((key for key in _SIZES if isinstance(method.get(key), int)), None)
    if key is None:
        return {}
    alpha = {"alpha": 2 * method["alpha"]} if key == "rank" and method.get("alpha") else {}
    return {key: 2 * method[key], **alpha}


def _carried_out(one: Attempt) -> dict[str, Any]:
    """What a run came to; it is run where it has not been. Raises ModelError where it cannot be."""
    trial = one.trial
    trial.check()
    facts = trial.facts
    if facts is None:
        with progress_bar(trial.name, bytes_=False) as advance:
            facts = carry_out(trial, None, lambda: advance(trial.steps_done, 0))
    if facts["status"] != "finished":
        raise ModelError(f"the run did not end: {facts['error']}", where=str(trial.folder), hint="see log.txt there")
    drop_checkpoints(trial.folder)
    loss = facts["metrics"]["loss"]["value"]
    say(f"{trial.name}: {facts['tokens']:,} tokens, loss {loss:.4f}")
    return {"share": one.share, "seed": trial.seed, "wide": one.wide, "tokens": facts["tokens"], "loss": loss}
