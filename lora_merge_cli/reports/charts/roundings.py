"""Survival with rounding to nearest beside survival with what was chosen: two points for each kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go

from lora_merge_cli.report import ModelReport
from lora_merge_cli.reports.charts.base import (
    LEGEND,
    PLAIN_AXIS,
    ROWS_AXIS,
    THEMES,
    TITLE_FONT,
    Chart,
    base_layout,
    rounded,
    row_ticks,
    safe,
)
from lora_merge_cli.reports.rounding_rows import RoundedRow, rounded_rows
from lora_merge_cli.reports.words import figure

_ROW = 25
_MOST = 30

Pair = tuple[float | None, float | None]


def before_and_after(report: ModelReport) -> Iterator[Chart]:
    """The gains, and the errors, of the kernels that rounding to nearest loses most of; nothing where all is to nearest."""
    rows = rounded_rows(report)
    if report.rounding is None or not rows:
        return
    shown = sorted(rows, key=lambda row: math.inf if row.gains[0] is None else row.gains[0])[:_MOST]
    more = f" The {len(shown)} that nearest loses most of." if len(shown) < len(rows) else ""
    method = report.rounding.method
    if any(None not in row.gains for row in shown):
        yield _chart(
            "gains",
            "Gain along the adapter's inputs",
            f"With rounding to nearest, and with {method}: 1, the line, is kept.{more}",
            shown,
            [row.gains for row in shown],
            method,
            _gain_axis([row.gains for row in shown]),
        )
    if any(None not in row.errors for row in shown):
        yield _chart(
            "errors",
            "Error along the adapter's inputs",
            f"Relative, with rounding to nearest, and with {method}: farther left is better.{more}",
            shown,
            [row.errors for row in shown],
            method,
            _error_axis([row.errors for row in shown]),
        )


def _chart(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[RoundedRow],
    pairs: Sequence[Pair],
    method: str,
    axis: dict[str, Any],
) -> Chart:
    # A logarithmic axis has no zero.
    hidden = axis.get("type") == "log"
    points = [tuple(None if hidden and not value else rounded(value) for value in pair) for pair in pairs]
    labels = [safe(row.name) for row in rows]
    drawn = go.Figure(layout=base_layout())
    drawn.add_scatter(
        x=[value for pair in points for value in (*pair, None)],
        y=[number if side < 2 else None for number in range(len(rows)) for side in range(3)],
        mode="lines",
        line={"width": 2},
        hoverinfo="skip",
        showlegend=False,
    )
    for side, (word, symbol) in enumerate((("to nearest", "circle-open"), (method, "circle"))):
        drawn.add_scatter(
            x=[pair[side] for pair in points],
            y=list(range(len(rows))),
            mode="markers",
            name=word,
            customdata=labels,
            hovertemplate=f"<b>%{{customdata}}</b><br>{word}: %{{x:.3~g}}<extra></extra>",
            marker={"size": 9, "symbol": symbol, "line": {"width": 2}},
        )
    drawn.update_layout(
        height=_ROW * len(rows) + 84,
        margin={"l": 4, "r": 12, "t": 4, "b": 80},
        xaxis={**PLAIN_AXIS, "ticks": "outside", "ticklen": 4} | axis,
        yaxis={**ROWS_AXIS, **row_ticks([row.name for row in rows])}
        | {"range": [len(rows) - 0.5, -0.5], "autorange": False},
        legend=LEGEND,
        shapes=[] if hidden else [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper"}],
    )
    colours = ["--edge", "--warn", "--accent"]
    return Chart(
        f"rounding-{name}",
        title,
        "",
        caption,
        drawn,
        dict.fromkeys(
            THEMES,
            (
                {"line.color": colours, "marker.color": colours, "marker.line.color": colours},
                {} if hidden else {"shapes[0].line.color": "--muted"},
            ),
        ),
        ["to nearest", method],
        [(row.name, [figure(value) for value in pair]) for row, pair in zip(rows, pairs, strict=True)],
    )


def _gain_axis(pairs: Sequence[Pair]) -> dict[str, Any]:
    known = [value for pair in pairs for value in pair if value is not None]
    return {
        "range": [min(0.0, *known) - 0.03, max(1.0, *known) + 0.05],
        "title": {"text": "gain", "standoff": 4, "font": TITLE_FONT},
    }


def _error_axis(pairs: Sequence[Pair]) -> dict[str, Any]:
    known = [math.log10(value) for pair in pairs for value in pair if value]
    low, high = (min(known), max(known)) if known else (-1.0, 0.0)
    ticks = [10.0**power for power in range(math.floor(low) - 1, math.ceil(high) + 2)]
    return {
        "type": "log",
        "range": [min(low, math.floor(high)) - 0.2, max(high, math.ceil(low)) + 0.2],
        "tickvals": ticks,
        "ticktext": [f"{tick:g}" for tick in ticks],
        "title": {"text": "relative error", "standoff": 4, "font": TITLE_FONT},
    }
