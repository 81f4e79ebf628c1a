"""Heatmaps: a row for each module of an expert, a column for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.colors import make_colorscale, sequential

from lora_merge_cli.records import first_names
from lora_merge_cli.report import LayerRecord, ModelReport, SiteRecord
from lora_merge_cli.reports.charts.base import (
    PLAIN_AXIS,
    ROWS_AXIS,
    THEMES,
    TITLE_FONT,
    Chart,
    base_layout,
    rounded,
    row_ticks,
    safe,
    whole_ticks,
)
from lora_merge_cli.reports.layer_rows import LayerRows, layer_rows
from lora_merge_cli.reports.words import beside, figure, survival_for

_ROW = 30
_FEW_COLUMNS = 4
_GAINS = (0.5, 0.75, 0.9, 0.97, 1.0, 1.1)
_GAIN_COLOURS = {
    "light": ("#6b1d05", "#c2410c", "#f59e0b", "#fbe3a6", "#dbe9e6", "#4f74c9"),
    "dark": ("#ffd9c2", "#ff8a4c", "#c77a12", "#5e5022", "#24403d", "#7f9dff"),
}


@dataclass(frozen=True)
class _Heat:
    """What heatmaps show of layers."""

    name: str
    title: str
    caption: str
    read: Callable[[LayerRecord], float | None]
    worst: Callable[[list[float]], float]
    format: str
    axis: dict[str, Any]
    colours: Mapping[str, Sequence[tuple[float, str]]]


def heatmaps(report: ModelReport, experts: Mapping[str, Sequence[SiteRecord]]) -> Iterator[Chart]:
    """The sizes of the deltas, then what the serving dtype keeps of them, each by expert."""
    for heat in (_size(report), _gain(report.serving_dtype)):
        for number, (expert, sites) in enumerate(experts.items()):
            if any(heat.read(layer) is not None for site in sites for layer in site.layers):
                yield _heatmap(heat, f"{heat.name}-{number}", expert, sites)


def _size(report: ModelReport) -> _Heat:
    sizes = [layer.relative_norm for site in report.sites for layer in site.layers]
    # More colours for small values: the adapters of one model differ by powers of ten.
    colours = [(position**2, colour) for position, colour in make_colorscale(sequential.Viridis)]
    return _Heat(
        name="size",
        title="Size of the deltas",
        caption=f"|delta| / |kernel| of each layer.{'' if beside(report) else ' Every expert has the same colours.'}",
        read=lambda layer: layer.relative_norm,
        worst=max,
        format=".3~g",
        axis={"cmin": 0, "cmax": max(filter(None, sizes), default=1), "colorbar": {"tickformat": "~g", "nticks": 6}},
        colours=dict.fromkeys(THEMES, colours),
    )


def _gain(dtype: str) -> _Heat:
    low, high = _GAINS[0], _GAINS[-1]

    def read(layer: LayerRecord) -> float | None:
        kept = survival_for(layer, dtype)
        return kept.gain_along_inputs if kept is not None else None

    def scale(colours: Sequence[str]) -> list[tuple[float, str]]:
        return [((gain - low) / (high - low), colour) for gain, colour in zip(_GAINS, colours, strict=True)]

    # The same in every report, so that a colour always means the same gain.
    between = [0.6, 0.7, 0.8, 0.9, 1]
    ticks = {"tickvals": [low, *between, high], "ticktext": [f"≤ {low}", *map(str, between), f"≥ {high}"]}
    return _Heat(
        name="gain",
        title=f"What {dtype} keeps of them",
        caption="Gain along the adapter's inputs: 1 is kept, less shrinks the fine-tune as a smaller scale would.",
        read=read,
        worst=min,
        format=".3f",
        axis={"cmin": low, "cmax": high, "colorbar": ticks},
        colours={theme: scale(colours) for theme, colours in _GAIN_COLOURS.items()},
    )


def _heatmap(heat: _Heat, name: str, expert: str, sites: Sequence[SiteRecord]) -> Chart:
    found = layer_rows([site for site in sites if site.layers])
    rows, seen = found.rows, found.layers
    # Layers that were not looked at are gaps: the cells beside them would be stretched over them otherwise.
    columns = list(range(seen[0], seen[-1] + 1))
    height = _ROW * len(rows)
    heatmap = go.Heatmap(
        z=[[rounded(row.value(layer, heat.read, heat.worst)) for layer in columns] for row in rows],
        x=columns,
        y=list(range(len(rows))),
        customdata=[[safe(row.label)] * len(columns) for row in rows],
        hovertemplate=f"<b>%{{customdata}}</b><br>layer %{{x}}: %{{z:{heat.format}}}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
        coloraxis="coloraxis",
        # A few wide cells are better read than compared.
        texttemplate=f"%{{z:{heat.format}}}" if len(columns) <= _FEW_COLUMNS else None,
        textfont={"size": 12, "weight": 600},
    )
    layout = base_layout(
        height=height + 84,
        margin={"l": 4, "r": 20, "t": 4, "b": 80},
        xaxis={**PLAIN_AXIS, "ticks": "", "title": {"text": "layer", "standoff": 4, "font": TITLE_FONT}}
        | whole_ticks(len(columns)),
        yaxis={**ROWS_AXIS, **row_ticks([row.label for row in rows])},
        coloraxis=heat.axis | {"colorbar": _colour_bar(height) | heat.axis["colorbar"]},
    )
    return Chart(
        name,
        heat.title,
        expert,
        " ".join((heat.caption, *_remarks(found, len(columns)))),
        go.Figure(heatmap, layout),
        {theme: ({}, {"coloraxis.colorscale": colours}) for theme, colours in heat.colours.items()},
        [str(layer) for layer in seen],
        [(row.label, [figure(row.value(layer, heat.read, heat.worst)) for layer in seen]) for row in rows],
    )


def _remarks(found: LayerRows, columns: int) -> Iterator[str]:
    if len(found.layers) < columns:
        yield f"{len(found.layers)} layers {'have adapters' if found.numbered else 'were looked at'}."
    if found.shared:
        yield "A cell is the worst of all that * stands for."
    if found.aside:
        yield f"In no layer, and in the table alone: {first_names(found.aside, 3)}."


def _colour_bar(height: int) -> dict[str, Any]:
    place = {"x": 0, "xanchor": "left", "xpad": 0, "y": -46 / height, "yanchor": "top", "ypad": 0}
    return place | {"orientation": "h", "thickness": 8, "outlinewidth": 0, "ticks": ""}
