"""The blocks that a Markdown report is made of. None of them ends with a newline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_MANY_ROWS = 12


def bullets(items: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {item}" for item in items)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. A pipe ends a cell even inside a code span, so each one is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def details(summary: str, *blocks: str) -> str:
    """Blocks that a reader has to open.

    Args:
        summary: What they are; no string of a checkpoint, since it is HTML.
        blocks: What is folded away.
    """
    # The blank lines are what makes GitHub read Markdown inside HTML.
    return "\n\n".join((f"<details><summary>{summary}</summary>", *blocks, "</details>"))


def folded_table(nouns: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, to be opened if it is long."""
    text = table(header, rows)
    return details(f"{len(rows)} {nouns}", text) if len(rows) > _MANY_ROWS else text
