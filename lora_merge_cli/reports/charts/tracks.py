"""Horizontal bars, each on a track with its figure beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import plotly.graph_objects as go

from lora_merge_cli.reports.charts.base import PLAIN_AXIS, ROWS_AXIS, base_layout, rounded

MOST_BARS = 60
"""More are a table's business."""
THICKNESS = 7
"""Of a bar, in pixels."""


def track_bars(values: Sequence[float], edge: float, words: Sequence[str], row: int) -> tuple[go.Bar, dict[str, Any]]:
    """A bar for each row, none beyond the edge, and a layout with the words in a column beside them."""
    bars = go.Bar(
        y=list(range(len(values))),
        x=[rounded(min(value, edge)) for value in values],
        orientation="h",
        width=THICKNESS / row,
        showlegend=False,
    )
    beside = 10 + 7 * max(map(len, words))
    layout = base_layout(
        height=row * len(values),
        margin={"l": 4, "r": beside, "t": 0, "b": 0},
        barmode="stack",
        barcornerradius=3,
        xaxis={**PLAIN_AXIS, "range": [0, edge], "visible": False},
        yaxis={**ROWS_AXIS, "range": [len(values) - 0.5, -0.5], "autorange": False},
        annotations=list(_beside(words, beside)),
    )
    return bars, layout


def on_tracks(bars: go.Bar, layout: dict[str, Any]) -> go.Figure:
    """The bars, each followed by what it leaves of its row, so that all of the row answers to a pointer."""
    edge = layout["xaxis"]["range"][1]
    rest = go.Bar(bars).update(x=[max(edge - value, 0) for value in bars.x], marker_pattern=None)
    return go.Figure([bars, rest], layout)


def _beside(words: Iterable[str], width: int) -> Iterator[dict[str, Any]]:
    for number, word in enumerate(words):
        place = {"x": 1, "xref": "paper", "xanchor": "right", "xshift": width, "y": number, "yanchor": "middle"}
        yield place | {"text": word, "showarrow": False, "font": {"size": 12}}
