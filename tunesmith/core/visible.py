"""Texts that a page can hold: what would vanish, break the file or turn the reading order is shown instead."""

from __future__ import annotations

from typing import Any

_SHOWN: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_SHOWN |= {127: 0x2421}
# control characters, turns of the reading order, spaces without width, and the tags that hide whole sentences;
# the joiners U+200C and U+200D stay, because scripts and emoji need them
_HIDDEN = ((0x80, 0xA0), (0x200B, 0x200C), (0x202A, 0x202F), (0x2060, 0x206A), (0xFEFF, 0xFF00), (0xE0000, 0xE0080))
_SHOWN |= {code: f"[U+{code:04X}]" for start, end in _HIDDEN for code in range(start, end)}


def visible(text: Any) -> str:
    """The text with control characters as pictures, hidden ones by number, halves of surrogate pairs replaced."""
    plain = text if isinstance(text, str) else "" if text is None else str(text)
    return plain.translate(_SHOWN).encode("utf-8", "replace").decode("utf-8")
