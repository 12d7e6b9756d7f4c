"""What to change so that a run fits into a memory: candidates, what each saves and costs, the cheapest first.

The one idea: changes have a rank. Smaller micro-batches and recomputation cost time and leave the result as it is;
fewer bits round; a lower rank, shorter rows or another method learn something else. A plan is made of every candidate,
so that nothing here is estimated. How a configuration is planned is the caller's (`run.fitting`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.amounts import in_bytes

Settings = Mapping[str, Any]
LEAST_TOKENS = 128  # of a micro-batch
TIME, ROUNDING, RESULT = range(3)


@dataclass(frozen=True)
class Change:
    """One thing to change.

    Attributes:
        settings: by key path.
        cost: TIME, ROUNDING or RESULT: what it is paid with.
        told: in words.
    """

    settings: tuple[tuple[str, Any], ...]
    cost: int
    told: str


@dataclass(frozen=True)
class Planned:
    """A candidate's plan, as far as it decides.

    Attributes:
        changes: what was changed; none is the run as it was written.
        needed_bytes: of the process at its fullest.
        seconds: of the run; None where the machine was not measured.
        flops: of the run.
    """

    changes: tuple[Change, ...]
    needed_bytes: int
    seconds: float | None
    flops: int

    @property
    def cost(self) -> int:
        return max((change.cost for change in self.changes), default=TIME)

    def as_dict(self, before: Planned) -> dict[str, Any]:
        """The candidate beside the run as it was written."""
        return {
            "settings": {key: value for change in self.changes for key, value in change.settings},
            "told": " and ".join(change.told for change in self.changes),
            "paid_with": ("time", "rounding", "result")[self.cost],
            "needed_bytes": self.needed_bytes,
            "saved_bytes": before.needed_bytes - self.needed_bytes,
            "more_time": self.slower_than(before),
        }

    def slower_than(self, before: Planned) -> float:
        """Time more than before, as a share of it; of work where the machine was not measured."""
        if self.seconds is None or before.seconds is None:
            return self.flops / max(1, before.flops) - 1
        return self.seconds / max(1e-9, before.seconds) - 1


@dataclass(frozen=True)
class Fitted:
    """What fits.

    Attributes:
        room_bytes: what there is.
        now: the run as it was written.
        options: those that fit, the cheapest first; empty where `now` fits, and where nothing does.
        least: the candidate that needs least, where nothing fits.
    """

    room_bytes: int
    now: Planned
    options: tuple[Planned, ...] = ()
    least: Planned | None = None

    @property
    def fits(self) -> bool:
        return self.now.needed_bytes <= self.room_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "room_bytes": self.room_bytes,
            "needed_bytes": self.now.needed_bytes,
            "fits": self.fits,
            "options": [option.as_dict(self.now) for option in self.options],
            "least": self.least.as_dict(self.now) if self.least else None,
        }


def fit(config: dict[str, Any], room: int, plan: Callable[[Sequence[Change]], Planned]) -> Fitted:
    """The nearest changes with which a run fits.

    Args:
        config: every setting, as in config.yaml.
        room: bytes.
        plan: of the run with some changes.
    """
    now = plan(())
    if now.needed_bytes <= room:
        return Fitted(room, now)
    sizes, again = micro_batches(config), recomputations(config)
    found = [option for more in [None, *again] if (option := _largest(sizes, more, (), room, plan))]
    others = [*shards(config), *roundings(config), *results(config)]
    found += [option for change in others if (option := plan((change,))).needed_bytes <= room]
    if found:
        return Fitted(room, now, tuple(sorted(found, key=lambda one: (one.cost, one.slower_than(now)))))
    added: tuple[Change, ...] = ()
    for change in _one_of_each(others):
        added = (*added, change)
        option = _largest(sizes, again[-1] if again else None, added, room, plan)
        if option is not None:
            return Fitted(room, now, (option,))
    return Fitted(room, now, least=plan([*sizes[-1:], *again[-1:], *added]))


def micro_batches(config: Settings) -> list[Change]:
    """Smaller micro-batches, by halves; the result of a step stays as it is."""
    train, found = config["train"], []
    name, least = ("micro_batch_rows", 1) if train["micro_batch_rows"] else ("micro_batch_tokens", LEAST_TOKENS)
    size = train[name] // 2
    while size >= least:
        found.append(Change(((f"train.{name}", size),), TIME, f"{name} {size} instead of {train[name]}"))
        size //= 2
    return found


def recomputations(config: Settings) -> list[Change]:
    """More to compute again than now, from little to all."""
    kinds = ["none", "selective", "full"]
    now = kinds.index(config["train"]["recompute"]) if config["train"]["recompute"] in kinds else 0
    return [Change((("train.recompute", kind),), TIME, f"recompute {kind}") for kind in kinds[now + 1 :]]


def shards(config: Settings) -> list[Change]:
    """More of what several processes hold split between them; the result stays as it is. What is refused there
    (`parallel.limits`) is left out."""
    layout, train, kinds = config["layout"], config["train"], ["none", "zero1", "zero2", "zero3"]
    if layout["data"] == 1 or layout["tensor"] * layout["pipeline"] > 1 or train["offload"] != "none":
        return []
    more = kinds[kinds.index(layout["shard"]) + 1 :]
    if config["precision"]["base"] != "same" or train["stop"]:
        more = [kind for kind in more if kind != "zero3"]
    return [Change((("layout.shard", kind),), TIME, f"{kind} over {layout['data']} processes") for kind in more]


def roundings(config: Settings) -> list[Change]:
    """Fewer bits for what is held: moments, and a base that does not train."""
    train, precision, found = config["train"], config["precision"], []
    for bits in {"fp32": ("bf16", "int8"), "bf16": ("int8",)}.get(train["optimizer_state"], ()):
        found.append(Change((("train.optimizer_state", bits),), ROUNDING, f"moments in {bits}"))
    if precision["base"] == "same" and config["method"]["kind"] in _FROZEN_BASE:
        found += [Change((("precision.base", base),), ROUNDING, f"the base in {base}") for base in ("int8", "nf4")]
    return found


def results(config: Settings) -> list[Change]:
    """Less to learn, or from less."""
    method, found = config["method"], []
    for key in ("rank", "size"):
        value = method.get(key)
        while isinstance(value, int) and value > 1:
            value //= 2
            found.append(Change(((f"method.{key}", value),), RESULT, f"{key} {value} instead of {method[key]}"))
    if method["kind"] == "full":
        found.append(Change((("method", {"kind": "lora"}),), RESULT, "method lora"))
    length = config["data"]["max_length"]
    if length > LEAST_TOKENS:
        found.append(
            Change((("data.max_length", length // 2),), RESULT, f"max_length {length // 2} instead of {length}")
        )
    return found


def show_fit(fitted: dict[str, Any]) -> list[str]:
    """Lines for people, of `Fitted.as_dict()`."""
    needed, room = in_bytes(fitted["needed_bytes"]), in_bytes(fitted["room_bytes"])
    if needed == room:
        needed, room = (f"{fitted[name] / 1e6:,.0f} MB" for name in ("needed_bytes", "room_bytes"))
    if fitted["fits"]:
        return [f"needs {needed}: fits into {room}"]
    lines = [f"needs {needed}: does not fit into {room}"]
    if not fitted["options"]:
        least = fitted["least"]
        return [*lines, f"nothing does: with {least['told']} it still needs {in_bytes(least['needed_bytes'])}"]
    lines.append("what fits, the cheapest first:")
    for option in fitted["options"]:
        saved, more = in_bytes(option["saved_bytes"]), 100 * option["more_time"]
        time = f"for {more:.2g} % more time" if more >= 0.5 else "for no more time"
        price = {"time": "", "rounding": ", rounded more", "result": ", learns something else"}[option["paid_with"]]
        keys = " ".join(f"{key}={_written(value)}" for key, value in option["settings"].items())
        lines.append(f"  {option['told']}: saves {saved} {time}{price}; needs {in_bytes(option['needed_bytes'])}")
        lines.append(f"    {keys}")
    return lines


_FROZEN_BASE = ("lora", "adapter", "prefix_layer", "prefix_embed", "prompt", "ia3")


def _written(value: Any) -> Any:
    return value["kind"] if isinstance(value, dict) else value


def _largest(
    sizes: Sequence[Change],
    recompute: Change | None,
    others: Sequence[Change],
    room: int,
    plan: Callable[[Sequence[Change]], Planned],
) -> Planned | None:
    """The candidate with the largest micro-batch that fits, by halving; None where the smallest does not."""
    fixed = [*others, *([recompute] if recompute else [])]
    steps: list[list[Change]] = [fixed, *([size, *fixed] for size in sizes)] if fixed else [[size] for size in sizes]
    if not steps:
        return None
    low, high, best = 0, len(steps) - 1, plan(steps[-1])
    if best.needed_bytes > room:
        return None
    while low < high:
        middle = (low + high) // 2
        option = plan(steps[middle])
        if option.needed_bytes <= room:
            best, high = option, middle
        else:
            low = middle + 1
    return best


def _one_of_each(changes: Iterable[Change]) -> list[Change]:
    """Of changes to the same settings the strongest, in the order of what they cost."""
    strongest: dict[str, Change] = {}
    for change in changes:
        strongest[change.settings[0][0].split(".")[-1]] = change
    return sorted(strongest.values(), key=lambda change: change.cost)
