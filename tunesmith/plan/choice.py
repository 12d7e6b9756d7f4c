"""Which activations a run keeps: the least that is made again such that its peak fits into the memory there is.

The one idea: policies lie on one ladder, from nothing, over the MLP of more and more blocks (which frees most for the
work it costs), to whole blocks; the peak falls along it evenly, nearly, so that few traces find the first that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith.core.amounts import in_bytes
from tunesmith.core.errors import ResourceError
from tunesmith.plan.plan import Plan

if TYPE_CHECKING:
    from tunesmith.models.recompute import Recompute


@dataclass(frozen=True)
class Choice:
    """What was chosen, under the keys of plan.json.

    Attributes:
        whole, partly: blocks that run again, and those of which only the MLP does; counted from the lowest.
        blocks: those that there are to choose from.
        saved_bytes: by how much the peak is lower than with nothing made again.
        more_flops: work added, as a share of that with nothing made again.
        room_bytes: what the peak was to fit into.
        fits: whether it does.
    """

    whole: int
    partly: int
    blocks: int
    saved_bytes: int
    more_flops: float
    room_bytes: int
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cheapest(made: Callable[[Recompute], Plan], blocks: int, room: int) -> Plan:
    """The plan with the least recomputation whose peak is within `room` bytes, its choice in it; else the smallest.

    One trace where everything fits as it is, and some five where it does not.

    Args:
        made: the plan of a policy, with a traced peak.
        blocks: how many there are to choose from.
    """
    from tunesmith.models.recompute import Recompute

    known: dict[int, Plan] = {}

    def policy(rung: int) -> Recompute:
        return Recompute(0, rung) if rung <= blocks else Recompute(rung - blocks, 2 * blocks - rung)

    def peak(rung: int) -> int:
        if rung not in known:
            known[rung] = made(policy(rung))
        return known[rung].memory.peak_bytes

    rung = _first_that_fits(peak, blocks, room)
    plan, plain, chosen = known[rung], known[0], policy(rung)
    choice = Choice(
        chosen.whole,
        chosen.partly,
        blocks,
        plain.memory.peak_bytes - plan.memory.peak_bytes,
        plan.flops / max(1, plain.flops) - 1,
        room,
        plan.memory.peak_bytes <= room,
    )
    return replace(plan, recompute=choice.as_dict())


def check_fits(plan: Plan) -> None:
    """Raises ResourceError where recomputation was to be chosen and no policy lets the run fit."""
    chosen = plan.recompute
    if chosen is not None and not chosen["fits"]:
        again = " even with every block computed again" if chosen["blocks"] else ""
        needed, room = in_bytes(plan.memory.peak_bytes), in_bytes(chosen["room_bytes"])
        raise ResourceError(
            f"the run needs {needed}{again}; {room} are free for it",
            where="train.recompute: auto",
            hint="lower train.micro_batch_tokens or data.max_length, or train less (method: lora)",
        )


def choice_line(chosen: dict[str, Any]) -> str:
    """What was chosen in one line: "recompute: the MLP of 12 of 30 blocks, saves 151 MB for 9 % more work"."""
    if not (chosen["whole"] or chosen["partly"]):
        return ""
    whole, partly, blocks = chosen["whole"], chosen["partly"], chosen["blocks"]
    if whole == blocks:
        what = f"all {blocks} blocks"
    elif whole:
        what = f"{whole} of {blocks} blocks and the MLP of the others"
    else:
        what = f"the MLP of {'all' if partly == blocks else f'{partly} of'} {blocks} blocks"
    saved, more = in_bytes(chosen["saved_bytes"]), 100 * chosen["more_flops"]
    line = f"recompute: {what}, saves {saved} for {more:.2g} % more work"
    return (
        line if chosen["fits"] else f"{line}; it still does not fit into the {in_bytes(chosen['room_bytes'])} there are"
    )


def _first_that_fits(peak: Callable[[int], int], blocks: int, room: int) -> int:
    """The lowest rung of 0 to 2 x blocks whose peak is within the room, or the last; the peak falls along them."""
    if peak(0) <= room or not blocks:
        return 0
    if peak(blocks) <= room:
        low, high = 0, blocks
    elif peak(2 * blocks) <= room:
        low, high = blocks, 2 * blocks
    else:
        return 2 * blocks
    turn = 0
    while high - low > 1:
        # where a straight line meets the room, with its neighbour below looked at next; halves where that does not end
        share = (peak(low) - room) / max(1, peak(low) - peak(high)) if turn < 4 else 0.5
        rung = min(high - 1, max(low + 1, low + -int(-share * (high - low) // 1)))
        low, high = (low, rung) if peak(rung) <= room else (rung, high)
        turn += 1
    return high
