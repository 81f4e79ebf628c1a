"""What all charts share: what one consists of, its looks, and how names get into it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from lora_merge_cli.reports.escaping import visible

THEMES = ("light", "dark")
"""The colour schemes that a chart has colours for."""
PLAIN_AXIS: Mapping[str, Any] = {"showgrid": False, "zeroline": False, "fixedrange": True}
"""An axis that is no more than its labels."""
ROWS_AXIS: Mapping[str, Any] = {
    **PLAIN_AXIS,
    "autorange": "reversed",
    "automargin": "left",
    # Ticks that nobody sees keep the labels away from what they name.
    "ticks": "outside",
    "ticklen": 7,
    "tickcolor": "rgba(0,0,0,0)",
}
"""A vertical axis of rows, the first at the top."""
LEGEND: Mapping[str, Any] = {
    "orientation": "h",
    "x": 0,
    "xref": "container",
    "y": 0,
    "yref": "container",
    "yanchor": "bottom",
    "bgcolor": "rgba(0,0,0,0)",
}
"""A legend below the plot."""
LINE_COLOURS: Mapping[str, Sequence[str]] = {
    "light": ("#3b5bdb", "#d9700b", "#0f8a6c", "#b0307f", "#2a9fd0", "#8a6d00", "#7048c8", "#5c6773"),
    "dark": ("#8ea2ff", "#f5a04b", "#3fc9a0", "#ee7dbd", "#6cc7f0", "#d9bd4a", "#b59bff", "#a3adb8"),
}
"""Of the lines of one plot, by theme."""
LINE_SYMBOLS: Sequence[str] = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "star", "pentagon")
"""Of their points, which tell lines apart without their colour."""
TITLE_FONT: Mapping[str, Any] = {"size": 11}
"""Of an axis."""

_FAMILY = "system-ui, sans-serif"
_LABEL = 26


@dataclass(frozen=True)
class Chart:
    """A figure, and the table that says the same without a script."""

    name: str
    """The id of its element."""
    title: str
    """What it shows."""
    group: str
    """The part of the model that it shows it of; empty for all of it."""
    caption: str
    """How to read it."""
    figure: go.Figure
    """What plotly draws, without the colours of a theme."""
    themes: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
    """What ``Plotly.update`` gets for the traces and for the layout, by theme; ``--name`` is that property of the page's style."""
    columns: Sequence[str]
    """The table's header, after the label's."""
    rows: Sequence[tuple[str, Sequence[str]]]
    """Labels and their figures."""

    @property
    def height(self) -> int:
        """In pixels, whatever the width."""
        return int(self.figure.layout.height)

    @property
    def document(self) -> dict[str, Any]:
        """What the report's script reads."""
        drawn = json.loads(self.figure.to_json())
        return {"name": self.name, "data": drawn["data"], "layout": drawn["layout"], "themes": self.themes}


def base_layout(**rest: Any) -> dict[str, Any]:
    """A layout that stands on any background, with more settings or others."""
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "dragmode": False,
        "font": {"size": 11, "family": _FAMILY},
        "hoverlabel": {"align": "left", "font": {"size": 12, "family": _FAMILY}},
    } | rest


def whole_ticks(count: int) -> dict[str, Any]:
    """The ticks of an axis of that many whole numbers."""
    step = next((step for step in (1, 2, 5, 10, 20, 50) if count <= 12 * step), 100)
    return {"tickmode": "linear", "tick0": 0, "dtick": step, "tickformat": "d"}


def row_ticks(labels: Sequence[str]) -> dict[str, Any]:
    """The labels of rows 0, 1, and so on; rows of one name stay apart."""
    return {"tickvals": list(range(len(labels))), "ticktext": [short(label) for label in labels]}


def rounded(value: float | None) -> float | None:
    """What is left of a figure that is only looked at."""
    return None if value is None else float(f"{value:.4g}")


def safe(text: str) -> str:
    """The text for plotly, which reads some markup."""
    # It knows no entity for a quote, and needs none where no attribute is open.
    return html.escape(visible(text), quote=False)


def short(label: str) -> str:
    """The label, escaped, with its middle left out if an axis has no room for it."""
    if len(label) > _LABEL:
        label = f"{label[: _LABEL // 2 - 1]}…{label[-_LABEL // 2 :]}"
    return safe(label)
