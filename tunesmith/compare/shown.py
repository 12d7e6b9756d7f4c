"""Markdown as what a page may show: nested elements of a fixed set, never a string of HTML.

The one idea: an answer is hostile input, so nothing of it ever passes a parser of HTML. Markdown is parsed here, raw
HTML in it being text; the page makes an element for each name and puts texts in as texts. Links and pictures are
shown with where they lead, and lead nowhere.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from tunesmith.core.visible import visible

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

Shown = Any  # a text, or [element, [what is in it]]
LONGEST = 100_000  # characters that are read as Markdown; more is shown as it is
_ELEMENTS = {
    "paragraph": "p", "bullet_list": "ul", "ordered_list": "ol", "list_item": "li", "blockquote": "blockquote",
    "hr": "hr", "hardbreak": "br", "strong": "strong", "em": "em", "s": "s", "table": "table", "thead": "thead",
    "tbody": "tbody", "tr": "tr", "th": "th", "td": "td",
}  # fmt: skip


def shown(text: str) -> list[Shown]:
    """What a Markdown text looks like."""
    if len(text) > LONGEST:
        return [["pre", [visible(text)]]]
    from markdown_it.tree import SyntaxTreeNode

    return _inside(SyntaxTreeNode(_parser().parse(text)))


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _inside(node: SyntaxTreeNode) -> list[Shown]:
    return [piece for child in node.children for piece in _pieces(child) if piece != ""]


def _pieces(node: SyntaxTreeNode) -> list[Shown]:
    """A node as pieces: one element, or what is in it where it has no element of its own."""
    kind = node.type
    if kind in ("fence", "code_block"):
        return [["pre", [["code", [visible(node.content)]]]]]
    if kind == "code_inline":
        return [["code", [visible(node.content)]]]
    if kind == "softbreak":
        return ["\n"]
    if kind == "link":
        return [*_inside(node), f" ({visible(node.attrs.get('href', ''))})"]
    if kind == "image":
        return [f"[picture: {visible(node.content)}] ({visible(node.attrs.get('src', ''))})"]
    if kind == "heading":
        return [[node.tag, _inside(node)]]
    if kind == "paragraph" and node.hidden:
        return _inside(node)
    if kind in _ELEMENTS:
        return [[_ELEMENTS[kind], _inside(node)]]
    return _inside(node) if node.children else [visible(node.content)]
