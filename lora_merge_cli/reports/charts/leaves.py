"""The leaves of two checkpoints that differ most."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lora_merge_cli.report import DifferenceRecord, DiffReport
from lora_merge_cli.reports.charts.base import THEMES, Chart, safe
from lora_merge_cli.reports.charts.tracks import MOST_BARS, THICKNESS, on_tracks, track_bars
from lora_merge_cli.reports.words import figure

_ROW = 38
_PATH = 42


def farthest_leaves(report: DiffReport) -> Iterator[Chart]:
    """The leaves that changed most, if any did."""
    changed = [(leaf, leaf.relative_l2) for leaf in report.leaves if leaf.relative_l2]
    shown = sorted(changed, key=lambda found: -found[1])[: min(max(report.top, 1), MOST_BARS)]
    if not shown:
        return
    sizes = [size for _, size in shown]
    words = [figure(size) for size in sizes]
    bars, layout = track_bars(sizes, sizes[0], words, row=_ROW)
    bars.update(
        customdata=[[_in_lines(leaf.path), word] for (leaf, _), word in zip(shown, words, strict=True)],
        hovertemplate="<b>%{customdata[0]}</b><br>|d| / |A| %{customdata[1]}<extra></extra>",
        # Below its label, which a narrow page has no room for beside it.
        offset=0.1,
    )
    layout["yaxis"] |= {"visible": False}
    layout["margin"] |= {"l": 0, "t": 4, "b": 4}
    layout["annotations"] = [
        *({**note, "yshift": -(0.1 * _ROW + THICKNESS / 2)} for note in layout["annotations"]),
        *(_above(number, leaf) for number, (leaf, _) in enumerate(shown)),
    ]
    yield Chart(
        "farthest",
        "Most changed leaves",
        "",
        f"|d| / |A| with d = B - A; the {len(shown)} largest." if len(shown) > 1 else "|d| / |A| with d = B - A.",
        on_tracks(bars, layout),
        dict.fromkeys(THEMES, ({"marker.color": ["--accent", "--well"]}, {})),
        ["|d| / |A|", "max |d|"],
        [(leaf.path, [figure(size), figure(leaf.max_abs)]) for leaf, size in shown],
    )


def _above(number: int, leaf: DifferenceRecord) -> dict[str, Any]:
    """The label of a row above its bar."""
    return {
        "text": safe(_tail(leaf.path)),
        "hovertext": _in_lines(leaf.path),
        "font": {"size": 11, "family": "ui-monospace, Menlo, Consolas, monospace"},
        "showarrow": False,
        "align": "left",
        "borderpad": 0,
        **{"x": 0, "xref": "paper", "xanchor": "left"},
        **{"y": number, "yanchor": "bottom", "yshift": -1},
    }


def _tail(path: str) -> str:
    """The end of the path, where paths differ most, from the start of a name if that leaves enough."""
    if len(path) <= _PATH:
        return path
    tail = path[1 - _PATH :]
    names = tail.partition("/")[2]
    return f"…/{names}" if len(names) > _PATH // 2 else f"…{tail}"


def _in_lines(path: str) -> str:
    """The path for plotly, on lines that a narrow page has room for."""
    parts = re.findall(rf".{{1,{_PATH - 1}}}(?:/|$)|.{{1,{_PATH}}}", path, flags=re.DOTALL)
    return "<br>".join(map(safe, parts))
