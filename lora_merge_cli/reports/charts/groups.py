"""What a fine-tune did to the parts of a model: a bar for each part, its parameters by treatment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from lora_merge_cli.report import GroupRecord
from lora_merge_cli.reports.charts.base import (
    LEGEND,
    PLAIN_AXIS,
    ROWS_AXIS,
    THEMES,
    Chart,
    base_layout,
    row_ticks,
    safe,
)
from lora_merge_cli.reports.words import STATUS_WORDS, byte_size, quantity

_ROW = 46
_THICKNESS = 16
_LEGEND = 60
_LEAST = 1 / 150
_LEAST_TRAINED_FIRST = ("frozen", "lora", "adapter", "trained")


def trained_parts(groups: Sequence[GroupRecord]) -> Iterator[Chart]:
    """The parameters of each part, largest part first, if there are any."""
    groups = sorted(groups, key=_treatment)
    parts: dict[str, list[GroupRecord]] = {}
    for group in groups:
        parts.setdefault(group.part, []).append(group)
    parts = dict(sorted(parts.items(), key=lambda item: -_size(item[1])))
    totals = {part: _size(found) for part, found in parts.items()}
    statuses = list(dict.fromkeys(group.status for group in groups))
    if not any(totals.values()):
        return
    # A few million parameters would not be seen beside billions.
    least = max(totals.values()) * _LEAST
    lengths = {part: sum(_length(group, least) for group in found) for part, found in parts.items()}
    traces = [_trace(status, parts, least) for status in statuses]
    rest = go.Bar(
        y=list(range(len(parts))),
        x=[max(lengths.values()) - length for length in lengths.values()],
        orientation="h",
        width=_THICKNESS / _ROW,
        showlegend=False,
        hoverinfo="skip",
    )
    colours = [f"--{status}" if status in STATUS_WORDS else "--muted" for status in statuses]
    drawn = [group for found in parts.values() for group in found]
    yield Chart(
        "parts",
        "What the fine-tune trained",
        "",
        "Parameters of each part of the model, by what became of them.",
        go.Figure([*traces, rest], _layout(totals, max(lengths.values()))),
        dict.fromkeys(THEMES, ({"marker.color": [*colours, "--well"]}, {})),
        ["leaves", "parameters", "size"],
        [
            (
                f"{group.part}: {_word(group.status)}",
                [f"{group.leaves:,}", f"{group.parameters:,}", byte_size(group.nbytes)],
            )
            for group in drawn
        ],
    )


def _trace(status: str, parts: Mapping[str, Sequence[GroupRecord]], least: float) -> go.Bar:
    found = [(row, group) for row, groups in enumerate(parts.values()) for group in groups if group.status == status]
    total = quantity(_size([group for _, group in found]))
    word = safe(_word(status))
    return go.Bar(
        y=[row for row, _ in found],
        x=[_length(group, least) for _, group in found],
        orientation="h",
        width=_THICKNESS / _ROW,
        name=f"{word} <b>{total}</b>",
        showlegend=True,
        customdata=[[group.leaves, quantity(group.parameters), byte_size(group.nbytes)] for _, group in found],
        hovertemplate=f"{word}: %{{customdata[0]}} leaves, %{{customdata[1]}} parameters, %{{customdata[2]}}<extra></extra>",
    )


def _layout(totals: Mapping[str, int], edge: float) -> dict[str, Any]:
    words = [quantity(total) for total in totals.values()]
    beside = 10 + 7 * max(map(len, words))
    place = {"x": 1, "xref": "paper", "xanchor": "right", "xshift": beside, "showarrow": False, "font": {"size": 12}}
    return base_layout(
        height=_ROW * len(totals) + _LEGEND,
        margin={"l": 4, "r": beside, "t": 0, "b": _LEGEND},
        barmode="stack",
        barcornerradius=3,
        # Some bars are too thin to point at, so a row tells of all of them.
        hovermode="y unified",
        xaxis={**PLAIN_AXIS, "range": [0, edge], "visible": False},
        yaxis={**ROWS_AXIS, **row_ticks(list(totals)), "range": [len(totals) - 0.5, -0.5], "autorange": False}
        | {"showspikes": False},
        annotations=[{**place, "y": number, "text": word} for number, word in enumerate(words)],
        legend={**LEGEND, "itemclick": False, "itemdoubleclick": False, "traceorder": "normal"},
    )


def _length(group: GroupRecord, least: float) -> float:
    return max(group.parameters, least) if group.parameters else 0


def _size(groups: Sequence[GroupRecord]) -> int:
    return sum(group.parameters for group in groups)


def _treatment(group: GroupRecord) -> int:
    return [*_LEAST_TRAINED_FIRST, group.status].index(group.status)


def _word(status: str) -> str:
    return STATUS_WORDS.get(status, status)
