"""Layers by modules as blocks of colour, for each expert: sizes of the deltas, and how much of them survives serving."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from lora_merge_cli.records import first_names
from lora_merge_cli.report import LayerRecord, ModelReport
from lora_merge_cli.reports.escaping import visible
from lora_merge_cli.reports.kinds import least
from lora_merge_cli.reports.layer_rows import LayerRow, LayerRows, layer_rows
from lora_merge_cli.reports.words import beside, figure, survival_for

_COLUMNS = 24
_LABEL = 12
_BETWEEN = 11
_MOST_ROWS = 40
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
    experts = {
        group: layer_rows([site for site in report.sites if site.group == group and site.layers])
        for group in dict.fromkeys(site.group for site in report.sites)
    }
    experts = {group: found for group, found in experts.items() if len(found.layers) > 1}
    longest = max((len(row.label) for found in experts.values() for row in found.rows), default=0)
    for group, found in experts.items():
        room = console.width - 2 * len(_columns(found.layers)) - _BETWEEN
        _print_expert(console, report, group, found, min(longest, max(room, _LABEL)))


def _print_expert(console: Console, report: ModelReport, group: str, found: LayerRows, label: int) -> None:
    rows, layers = found.rows, found.layers
    largest = max((layer.relative_norm or 0 for row in rows for of in row.layers.values() for layer in of), default=0)
    largest = largest or 1

    def gain(layer: LayerRecord) -> float | None:
        found = survival_for(layer, report.serving_dtype)
        return None if found is None else found.gain_along_inputs

    def size(layer: LayerRecord) -> float | None:
        return None if layer.relative_norm is None else layer.relative_norm / largest

    columns = _columns(layers)
    # The one part that torch's names tell of is all of the model.
    name = "" if beside(report) else f"[bold]{escape(visible(group))}[/bold], "
    console.print()
    console.print(
        f"{name}layers {layers[0]}-{layers[-1]}: |d|/|w| up to {figure(largest)}; "
        f"gain in {report.serving_dtype}, least",
        highlight=False,
    )
    for row in rows[:_MOST_ROWS]:
        name = visible(row.label)
        # Names differ at their ends.
        text = Text(f"{name if len(name) <= label else '…' + name[1 - label :]:<{label}}  ")
        text.append_text(_blocks(console, row, columns, size, max, _SIZES))
        text.append("  ")
        text.append_text(_blocks(console, row, columns, gain, min, _GAINS))
        text.append(f"  {figure(least(row.value(layer, gain, min) for layer in layers))}")
        console.print(text, no_wrap=True, overflow="crop")
    if len(rows) > _MOST_ROWS:
        console.print(f"[dim]and {len(rows) - _MOST_ROWS} more rows: --report x.html has all[/dim]")
    if found.aside:
        console.print(f"[dim]in no layer: {escape(visible(first_names(found.aside, 3)))}[/dim]")


def _columns(layers: Sequence[int]) -> list[Sequence[int]]:
    """The layers that share a block: one each while they fit."""
    each = -(-len(layers) // _COLUMNS)
    return [layers[start : start + each] for start in range(0, len(layers), each)]


def _blocks(
    console: Console,
    row: LayerRow,
    columns: Sequence[Sequence[int]],
    value_of: Callable[[LayerRecord], float | None],
    worst: Callable[[list[float]], float],
    ramp: Sequence[tuple[float, Colour]],
) -> Text:
    text = Text()
    for layers in columns:
        known = [value for value in (row.value(layer, value_of, worst) for layer in layers) if value is not None]
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
