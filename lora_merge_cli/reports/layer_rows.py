"""Which layer each figure is of, for heatmaps: a row for each module, a column for each layer.

JAX stacks the layers of a module in one kernel, and a site has them all. Torch keeps a kernel for each layer, and the sites
that differ in its number alone are one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_merge_cli.report import LayerRecord, SiteRecord
from lora_merge_cli.reports.kinds import layer_of, layer_pattern, pattern, short_patterns

_MOST_ROWS = 24
"""More are made fewer: experts, say, then share a row."""


@dataclass(frozen=True)
class LayerRow:
    """A row of a heatmap."""

    label: str
    """The site's, or what the labels of its sites have in common."""
    layers: dict[int, list[LayerRecord]] = field(default_factory=dict)
    """What was measured of each layer, by its number."""

    def value(
        self,
        layer: int,
        read: Callable[[LayerRecord], float | None],
        worst: Callable[[list[float]], float],
    ) -> float | None:
        """The worst of a layer's figures; None where there are none."""
        known = [value for value in map(read, self.layers.get(layer, ())) if value is not None]
        return worst(known) if known else None


@dataclass(frozen=True)
class LayerRows:
    """The rows of one part of a model."""

    rows: list[LayerRow]
    """All of them."""
    aside: tuple[str, ...] = ()
    """The labels of the sites that are in no layer, and in no row."""
    numbered: bool = False
    """Whether the layers are those of the sites' names: one that is not here has no adapter."""
    shared: bool = False
    """Whether sites of several names share a cell."""

    @property
    def layers(self) -> list[int]:
        """Every layer of which something was measured."""
        return sorted({layer for row in self.rows for layer in row.layers})


def layer_rows(sites: Sequence[SiteRecord]) -> LayerRows:
    """The rows of one part of a model.

    Args:
        sites: Those that were measured.
    """
    numbered = [site for site in sites if len(site.layers) == 1 and layer_of(site.label) is not None]
    if len({layer_of(site.label) for site in numbered}) < 2:
        return LayerRows([LayerRow(site.label, {layer.layer: [layer] for layer in site.layers}) for site in sites])
    shared = len({layer_pattern(site.label) for site in numbered}) > _MOST_ROWS
    name_of = pattern if shared else layer_pattern
    short = short_patterns(name_of(site.label) for site in numbered)
    rows: dict[str, LayerRow] = {}
    aside: dict[str, None] = {}
    for site in sites:
        if len(site.layers) > 1:
            row = rows.setdefault(site.target, LayerRow(site.label))
            for layer in site.layers:
                row.layers.setdefault(layer.layer, []).append(layer)
            continue
        number = layer_of(site.label)
        if number is None:
            aside[site.label] = None
            continue
        name = name_of(site.label)
        row = rows.setdefault(name, LayerRow(short[name]))
        row.layers.setdefault(number, []).extend(site.layers)
    return LayerRows(list(rows.values()), tuple(aside), True, shared)
