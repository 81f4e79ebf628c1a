"""What an interpolation does over alpha: how far each part goes from the base, and how much of its change survives."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from lora_merge_cli.report import PartRecord, PointRecord, SweepReport
from lora_merge_cli.reports.charts.base import (
    LEGEND,
    LINE_COLOURS,
    LINE_SYMBOLS,
    PLAIN_AXIS,
    THEMES,
    TITLE_FONT,
    Chart,
    base_layout,
    rounded,
    safe,
)
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.parts import part_names, part_of, share_of_base
from lora_merge_cli.reports.words import figure

_HEIGHT = 380
_MOST_TICKS = 11
_HOVER = 42
_ABOVE_AXIS = 0.03
_LEAST = "least of the adapters"
_VISIBLE = 0.01
"""As a share of the axis: three pixels."""
_LEAST_SPAN = 0.02
"""Of the axis of gains: less would make rounding look like a loss."""


@dataclass(frozen=True)
class _Line:
    """One line over alpha."""

    name: str
    """In the legend."""
    label: str
    """What tells it from all others."""
    values: tuple[float | None, ...]
    """One for each alpha; None where there is none."""
    look: int | None
    """Which colour and symbol; None for the colour of text."""
    dashed: bool = False
    """Whether it goes with the plain line of its name."""


def over_alpha(report: SweepReport) -> Iterator[Chart]:
    """Two charts; none of what nothing was measured of."""
    names = part_names(report.points)
    distances = [line for line in _distances(report.points, names) if _known([line])]
    if distances:
        yield _distance_chart(report, distances)
    gains = [line for line in (*_gains(report, names), *_least_gains(report)) if _known([line])]
    if gains:
        yield _survival_chart(report, gains)


def _distances(points: Sequence[PointRecord], names: Sequence[str]) -> Iterator[_Line]:
    pairs = [
        (
            _Line(name, name, _values(points, name, lambda part: share_of_base(part.distance, part)), look),
            _Line(
                name,
                f"{name}, wanted",
                _values(points, name, lambda part: share_of_base(part.wanted, part)),
                look,
                True,
            ),
        )
        for look, name in enumerate(names)
    ]
    least = _VISIBLE * max(_known([line for pair in pairs for line in pair]), default=0)
    for stored, wanted in pairs:
        yield stored
        if any(abs(a - b) > least for a, b in zip(_known([stored]), _known([wanted]), strict=True)):
            yield wanted


def _gains(report: SweepReport, names: Sequence[str]) -> Iterator[_Line]:
    for look, name in enumerate(names):
        stored = _values(report.points, name, lambda part: part.gain_stored)
        served = _values(report.points, name, lambda part: part.gain_served)
        yield _Line(name, f"{name}, stored", stored, look)
        yield _Line(name, f"{name}, served", served, look, dashed=True)


def _least_gains(report: SweepReport) -> Iterator[_Line]:
    yield _Line(_LEAST, f"{_LEAST}, stored", tuple(point.least_gain_stored for point in report.points), None)
    yield _Line(_LEAST, f"{_LEAST}, served", tuple(point.least_gain_served for point in report.points), None, True)


def _values(
    points: Sequence[PointRecord], name: str, read: Callable[[PartRecord], float | None]
) -> tuple[float | None, ...]:
    parts = (part_of(point, name) for point in points)
    return tuple(None if part is None else read(part) for part in parts)


def _known(lines: Sequence[_Line]) -> list[float]:
    return [value for line in lines for value in line.values if value is not None]


def _distance_chart(report: SweepReport, lines: Sequence[_Line]) -> Chart:
    highest = max(_known(lines)) or 1
    caption = "|W_alpha - W_base| / |W_base| of each part, as stored: each on the scale of its own base."
    if any(line.dashed for line in lines):
        caption += " Dashed is what was wanted before rounding, where that looks different."
    return _chart(
        report,
        lines,
        _Words("distance", "Distance from the base", caption, "share of |W_base|"),
        (-0.03 * highest, 1.06 * highest),
    )


def _survival_chart(report: SweepReport, lines: Sequence[_Line]) -> Chart:
    low, high = min(*_known(lines), 1), max(*_known(lines), 1)
    pad = max(0.06 * (high - low), _LEAST_SPAN / 2)
    caption = "Gain of each part's change: 1, the line, is kept. Solid is as stored, dashed as servers cast it to "
    caption += f"{report.serving_dtype}."
    if any(line.look is None for line in lines):
        caption += f" The {_LEAST} is along the adapters' inputs."
    chart = _chart(
        report, lines, _Words("survival", "Survival of the change", caption, "gain"), (low - pad, high + pad)
    )
    chart.figure.add_shape(type="line", x0=0, x1=1, xref="paper", y0=1, y1=1, line={"width": 1}, layer="below")
    painted = {"shapes[0].line.color": "--muted"}
    themes = {theme: (traces, layout | painted) for theme, (traces, layout) in chart.themes.items()}
    return dataclasses.replace(chart, themes=themes)


@dataclass(frozen=True)
class _Words:
    """What a chart is called and says."""

    name: str
    title: str
    caption: str
    axis: str


def _chart(report: SweepReport, lines: Sequence[_Line], words: _Words, bounds: tuple[float, float]) -> Chart:
    alphas = [point.alpha for point in report.points]
    failed = [point for point in report.points if point.status == "failed"]
    drawn = go.Figure(layout=base_layout())
    for line in lines:
        drawn.add_scatter(**_trace(line, alphas))
    if failed:
        drawn.add_scatter(**_failures(failed, bounds[0] + _ABOVE_AXIS * (bounds[1] - bounds[0])))
    drawn.update_layout(
        height=_HEIGHT,
        margin={"l": 4, "r": 12, "t": 8, "b": 4},
        xaxis={**PLAIN_AXIS, "automargin": True, "title": {"text": "alpha", "standoff": 6, "font": TITLE_FONT}}
        | _alpha_ticks(alphas),
        yaxis={"automargin": True, "fixedrange": True, "zeroline": False, "ticksuffix": " ", "tickformat": "~g"}
        | {"range": list(bounds), "title": {"text": words.axis, "standoff": 6, "font": TITLE_FONT}},
        legend=LEGEND,
    )
    colours = {theme: [*(_colour(line, theme) for line in lines), *["--fail"] * bool(failed)] for theme in THEMES}
    return Chart(
        words.name,
        words.title,
        "",
        words.caption + (" A cross is an output that failed." if failed else ""),
        drawn,
        {theme: ({"line.color": chosen, "marker.color": chosen}, {}) for theme, chosen in colours.items()},
        [line.label for line in lines],
        [
            (_label(point), [figure(line.values[number]) for line in lines])
            for number, point in enumerate(report.points)
        ],
    )


def _trace(line: _Line, alphas: Sequence[float]) -> dict[str, Any]:
    symbol = "circle-open" if line.look is None else LINE_SYMBOLS[line.look % len(LINE_SYMBOLS)]
    return {
        "x": alphas,
        "y": [rounded(value) for value in line.values],
        "mode": "lines+markers",
        "name": safe(line.name),
        "legendgroup": safe(line.name),
        "showlegend": not line.dashed,
        "customdata": [safe(line.label)] * len(alphas),
        "hovertemplate": "<b>%{customdata}</b><br>alpha %{x}: %{y:.4~g}<extra></extra>",
        "line": {"width": 1.5, "dash": "dash" if line.dashed else "solid"},
        "marker": {"size": 4 if line.dashed else 6, "symbol": symbol},
    }


def _failures(failed: Sequence[PointRecord], height: float) -> dict[str, Any]:
    """Crosses above the axis of alphas, since there is no figure."""
    reasons = [textwrap.wrap(visible(point.error or "no reason is known"), _HOVER) for point in failed]
    return {
        "x": [point.alpha for point in failed],
        "y": [height] * len(failed),
        "mode": "markers",
        "name": "failed",
        "showlegend": True,
        "customdata": ["<br>".join(map(safe, lines)) for lines in reasons],
        "hovertemplate": "<b>alpha %{x} failed</b><br>%{customdata}<extra></extra>",
        "marker": {"size": 10, "symbol": "x"},
    }


def _alpha_ticks(alphas: Sequence[float]) -> dict[str, Any]:
    """A tick for each alpha if there is room for them, and an axis on which no point is cut."""
    span = alphas[-1] - alphas[0]
    margin = 0.04 * span or 0.5
    spread = {"range": [alphas[0] - margin, alphas[-1] + margin]}
    if any(after - before < span / _MOST_TICKS for before, after in itertools.pairwise(alphas)):
        return spread | {"nticks": _MOST_TICKS}
    return spread | {"tickvals": list(alphas), "ticktext": [f"{alpha:g}" for alpha in alphas]}


def _colour(line: _Line, theme: str) -> str:
    return "--text" if line.look is None else LINE_COLOURS[theme][line.look % len(LINE_COLOURS[theme])]


def _label(point: PointRecord) -> str:
    return f"{point.alpha:g}{' (failed)' if point.status == 'failed' else ''}"
