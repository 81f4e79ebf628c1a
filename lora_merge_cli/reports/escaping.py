"""What a checkpoint's strings go through before they enter a document: any of them may be hostile."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"[`<>@|*_\[\]#\\~&$/]|www\.", re.IGNORECASE)
_WORD = re.compile(r"(\(*)(\S+?)([.,:;)]*)(?=\s|$)")
_LONE_MARKS = ("/", "&")


def visible(text: str) -> str:
    """The text on one line, with what has no glyph of its own as an escape: control characters, lone surrogates."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def code(text: str) -> str:
    """A Markdown code span: GitHub finds no HTML, no mention and no link in one. A table escapes its pipes itself."""
    text = visible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if not text.strip() or text[0] in " `" or text[-1] in " `" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def prose(text: str) -> str:
    """A sentence as Markdown, each word that could be markup as a code span."""
    return _WORD.sub(_word, visible(text))


def _word(match: re.Match[str]) -> str:
    start, word, end = match.groups()
    return f"{start}{code(word)}{end}" if _MARKUP.search(word) and word not in _LONE_MARKS else match.group()
