"""Penn Treebank tokens as the COCO caption scorers see them: lower case, most punctuation removed.

The reference runs Stanford's PTBTokenizer (CoreNLP 3.4.1, `-preserveLines -lowerCase`) on Java; this is the same
idea written anew: at each place of the line the longest of a few patterns is the next token. It agrees with the
Java program on every E2E reference; rare abbreviations and addresses may be cut differently.
"""

from __future__ import annotations

import re
import sys

SIGNATURE = "ptb-lower-nopunct"

_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SIGNS = {"\u00a3": "#", "\u20ac": "$", "\u2026": "...", "\u2013": "--", "\u2014": "--"}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}
_FRACTIONS = {"\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}

# words that are two tokens, by the length of the first
_CUT = {
    "cannot": 3,
    "gonna": 3,
    "gotta": 3,
    "wanna": 3,
    "lemme": 3,
    "gimme": 3,
    "'tis": 2,
    "'twas": 2,
    "y'all": 2,
}

_ABBREVIATIONS = (
    r"jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|inc|cos|corp|pp|pty|"
    r"ltd|plc|bancorp|dept|bhd|assn|univ|intl|sys|mr|mrs|ms|dr|gen|lt|col|maj|sgt|capt|prof|rev|hon|gov|"
    r"sen|rep|pres|jr|sr|bros|esq|st|ave|blvd|rd|mt|ft|etc|vs|fig|est|al|vol|ed|eds|tel|ph"
)

_LETTER = r"[^\W\d_]"
_WORD = rf"(?:{_LETTER})(?:[^\W_])*(?:[.!?](?:{_LETTER})(?:[^\W_])*)*"
_CLITIC = r"'(?:[msd]|re|ve|ll)(?![^\W_])"
_PATTERNS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_WORD}",
        r"[a-z0-9][a-z0-9.,]*(?:-[a-z0-9]+)+",  # child-friendly, 20-25
        r"(?:[dol])'[a-z0-9]+(?:-[a-z0-9]+)*(?<!'s)",  # o'neil, d'you
        r"[a-z0-9]+(?:-[a-z]+){0,2}(?:/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}",  # and/or, 4/5
        r"(?<![a-z0-9])[a-z](?:\.[a-z])+\.?(?![a-z0-9])",  # u.s., e.g.
        rf"(?:{_ABBREVIATIONS})\.(?![a-z0-9])|nos?\.(?=\s*\d)",
        r"[+-]?(?:\d+(?:[.:,]\d+)*|\.\d+)(?:st|nd|rd|th|s)?(?![a-z])",
        r"\d+(?:[.:,]\d+)*",
        r"\d+[^\W\d_][^\W_]*",  # 5pm, 3d
        r"[+-]?(?:\d*(?:[.:,]\d+)+|\d+(?:[.:,]\d+)+)|[+-]\d+|#+|_+",
        rf"{_WORD}\.(?=[,;:])",
        rf"(?<![^\W_]){_LETTER}\.(?![^\W_])",  # an initial
        r"[a-z0-9_]+(?:[_][a-z0-9]+)+",
        r"(?:https?|ftp)://[^\s\"<>|(){}]+[^\s\"<>|.!?(){},;:'-]",
        r"(?:www\.(?:[^\s\"<>|.!?(){},]+\.)+[a-z]{2,4}|(?:[^\s\"`'<>|.!?(){},\-_$/@]+\.)+(?:com|net|org|edu))"
        r"(?:/[^\s\"<>|()]*[^\s\"<>|.!?(){},'-])?",
        r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
        r"@[a-z_]\w*|#[a-z]+",
        r"</?[a-z][^>\s]*>",
        r"&(?:amp|lt|gt|quot|apos);",
        r"c\+\+|ma'am|c'mon",
        r"'\d\ds",
        r"'n'?(?![a-z])",
        r"'t(?:is|was)\b",
        r"y'all\b",
        _CLITIC,
        r"\.(?: ?\.)+|--+|[!?]+|\*+|''|``|\S",
    )
]
_NEGATION = re.compile(r"([a-z]*[a-mo-z])(n't)(?![a-z0-9])", re.IGNORECASE)


def tokenize(text: str) -> list[str]:
    """Tokens of one completion or reference, in lower case; punctuation is dropped, brackets are not."""
    return [token for token in _tokens(_plain(text)) if token not in _DROPPED]


def _plain(text: str) -> str:
    text = text.replace("\n", " ").replace("\u2019", "'").replace("\u2018", "'")
    for quote in "\u201c\u201d":
        text = text.replace(quote, '"')
    return text


def _tokens(text: str) -> list[str]:
    found: list[str] = []
    place, end = 0, len(text.rstrip())
    while place < end:
        if text[place].isspace():
            place += 1
            continue
        piece = _next(text, place)
        place += len(piece)
        found += [sys.intern(part) for part in _parts(piece)]
        if place == end and piece.endswith(".") and len(piece) > 1 and piece.strip(".") and "." not in found[-1:]:
            found.append(".")  # the full stop of an abbreviation also ends the line
    return found


def _next(text: str, place: int) -> str:
    negated = _NEGATION.match(text, place)
    if negated and negated.group(1):
        return negated.group(1)
    if text[place : place + 3].lower() == "n't" and not text[place + 3 : place + 4].isalnum():
        return text[place : place + 3]
    best = ""
    for pattern in _PATTERNS:
        match = pattern.match(text, place)
        if match and match.end() - place > len(best):
            best = match.group()
    return best


def _parts(piece: str) -> list[str]:
    low = piece.lower()
    if low in _CUT:
        return [low[: _CUT[low]], low[_CUT[low] :]]
    if low in _BRACKETS:
        return [_BRACKETS[low]]
    if low[0] == "." and low.strip(". ") == "":
        return ["." if low == "." else "..."]
    if len(low) > 1 and set(low) == {"-"}:
        return ["--"] if len(low) <= 3 else [low]
    if low == '"':
        return ["''"]
    return [_SIGNS.get(low) or _ENTITIES.get(low) or _FRACTIONS.get(low) or low]
