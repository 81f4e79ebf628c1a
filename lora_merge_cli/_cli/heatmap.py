"""Layers by modules as blocks of colour, for each expert: sizes of the deltas, and how much of them survives serving."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from lora_merge_cli.report import LayerRecord, ModelReport, SiteRecord
from lora_merge_cli.reports.words import figure, survival_for

_COLUMNS = 24
_SHADES = " ░▒▓█"

Colour = tuple[int, int, int]

_SIZES: Sequence[tuple[float, Colour]] = (
    (0.0, (68, 1, 84)),
    (0.25, (59, 82, 139)),
    (0.5, (33, 145, 140)),
    (0.75, (94, 201, 98)),
    (1.0, (253, 231, 37)),
)
"""Viridis: dark is small."""
_GAINS: Sequence[tuple[float, Colour]] = (
    (0.0, (165, 0, 38)),
    (0.5, (215, 48, 39)),
    (0.9, (253, 174, 97)),
    (0.98, (171, 217, 233)),
    (1.0, (69, 117, 180)),
)
"""Red is lost, blue is kept."""


def print_heatmaps(console: Console, report: ModelReport) -> None:
    """Both maps of every expert, side by side; nothing where nothing was measured."""
    sites = [site for site in report.sites if len(site.layers) > 1]
    label = max((len(site.label) for site in sites), default=0)
    for group in dict.fromkeys(site.group for site in sites):
        rows = [site for site in sites if site.group == group]
        largest = max((layer.relative_norm or 0.0 for site in rows for layer in site.layers), default=0.0) or 1.0
        lines = [_row(console, site, report.serving_dtype, largest) for site in rows]
        width = max(len(_columns(site)) for site in rows)
        first, last = rows[0].layers[0].layer, rows[0].layers[-1].layer
        console.print()
        console.print(
            f"[bold]{group}[/bold], layers {first}-{last}: |d|/|w| up to {figure(largest)}; "
            f"gain in {report.serving_dtype}, least",
            highlight=False,
        )
        for site, (sizes, gains, least) in zip(rows, lines, strict=True):
            text = Text(f"{site.label:<{label}}  ")
            text.append_text(sizes)
            text.append(" " * (width - len(sizes)) + "  ")
            text.append_text(gains)
            text.append(" " * (width - len(gains)) + f"  {figure(least)}")
            console.print(text, no_wrap=True, overflow="crop")


def _row(console: Console, site: SiteRecord, serving: str, largest: float) -> tuple[Text, Text, float | None]:
    def gain(layer: LayerRecord) -> float | None:
        found = survival_for(layer, serving)
        return None if found is None else found.gain_along_inputs

    def size(layer: LayerRecord) -> float | None:
        return None if layer.relative_norm is None else layer.relative_norm / largest

    known = [value for value in map(gain, site.layers) if value is not None]
    columns = _columns(site)
    return (
        _blocks(console, columns, size, max, _SIZES),
        _blocks(console, columns, gain, min, _GAINS),
        min(known, default=None),
    )


def _columns(site: SiteRecord) -> list[Sequence[LayerRecord]]:
    """The layers that share a block: one each while they fit."""
    each = -(-len(site.layers) // _COLUMNS)
    return [site.layers[start : start + each] for start in range(0, len(site.layers), each)]


def _blocks(
    console: Console,
    columns: Sequence[Sequence[LayerRecord]],
    value_of: Callable[[LayerRecord], float | None],
    worst: Callable[[list[float]], float],
    ramp: Sequence[tuple[float, Colour]],
) -> Text:
    text = Text()
    for layers in columns:
        known = [value for value in map(value_of, layers) if value is not None]
        if not known:
            text.append("·")
            continue
        value = min(1.0, max(0.0, worst(known)))
        if console.color_system is None:
            text.append(_SHADES[round(value * (len(_SHADES) - 1))])
        else:
            red, green, blue = _colour(value, ramp)
            text.append("█", f"rgb({red},{green},{blue})")
    return text


def _colour(value: float, ramp: Sequence[tuple[float, Colour]]) -> Colour:
    for (low, below), (high, above) in itertools.pairwise(ramp):
        if value <= high:
            share = (value - low) / (high - low)
            red, green, blue = (round(b + share * (a - b)) for b, a in zip(below, above, strict=True))
            return red, green, blue
    return ramp[-1][1]
