"""A claim: a number as somebody published it, and the function that derives it.

The one idea: a published number is the text that was printed, so that its own digits say how exact it claims to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

# what stands behind a published number, as in "4.7 M"
PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}

Number = int | float | Fraction


@dataclass(frozen=True)
class Claim:
    """One number of a lecture.

    Attributes:
        id: its name in commands.
        source: the lecture and the table or figure.
        stated: as printed: digits, and a prefix (k M B G T) where there is one.
        unit: what is counted.
        derive: the number that follows; an exact int for counts, a Fraction where digits of a quotient matter.
    """

    id: str
    source: str
    stated: str
    unit: str
    derive: Callable[[], Number]


@dataclass(frozen=True)
class Derived:
    """A claim with its number.

    Attributes:
        value: what follows.
        note: why the two differ, or what was assumed.
    """

    claim: Claim
    value: Number
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the derived number gives the published digits, rounded or cut."""
        stated, step = published(self.claim.stated)
        exact = Fraction(self.value)
        return abs(exact - stated) <= step / 2 or stated <= exact < stated + step

    def as_dict(self) -> dict[str, Any]:
        """The row of `tunesmith claims --json`; whole numbers are ints."""
        return {
            "id": self.claim.id,
            "source": self.claim.source,
            "stated": _plain(published(self.claim.stated)[0]),
            "published": self.claim.stated,
            "derived": _plain(self.value),
            "unit": self.claim.unit,
            "agrees": self.agrees,
            "note": self.note,
            "command": f"tunesmith claims {self.claim.id}",
        }


def published(text: str) -> tuple[Fraction, Fraction]:
    """The value of a printed number and the size of its last digit; zeros that end a whole number do not count."""
    digits, _, prefix = text.partition(" ")
    scale = PREFIXES[prefix]
    number = Decimal(digits.replace(",", ""))
    # a whole number that ends in zeros may have been rounded to any of them; one with all its digits was not
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    if exponent == 0 and number and "," not in digits:
        plain = digits.lstrip("-")
        exponent = len(plain) - len(plain.rstrip("0"))
    return Fraction(number) * scale, Fraction(10) ** exponent * scale


def shown(claim: Claim, value: Number) -> str:
    """A derived number as text: counts of parameters exactly, others in the prefix of the published one."""
    digits, _, prefix = claim.stated.partition(" ")
    if isinstance(value, int) and (claim.unit == "parameters" or not prefix):
        return f"{value:,}"
    scaled = float(Fraction(value) / PREFIXES[prefix])
    places = max(5, sum(char.isdigit() for char in digits))  # never fewer than were published
    return f"{scaled:,.{places}g} {prefix}".strip()


def _plain(value: Number) -> int | float:
    whole = isinstance(value, int) or Fraction(value).denominator == 1
    return int(value) if whole else float(value)
