"""The files that serving needs beside the parameters: OpenPI's normalisation statistics, and whether they are sane."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NORM_STATS = "norm_stats.json"

_ALL_SERIES = ("mean", "std", "q01", "q99")


@dataclass(frozen=True)
class AssetCheck:
    """What was found."""

    files: tuple[str, ...]
    """All files, relative to the assets folder."""
    asset_ids: tuple[str, ...]
    """The folders with normalisation statistics."""
    problems: tuple[str, ...]
    """What would go wrong when serving."""


def check_assets(assets: Path | None, *, quantiles: bool = False) -> AssetCheck:
    """Look at an ``assets`` folder: are normalisation statistics present, finite, and is q01 below q99 everywhere?

    Args:
        assets: The folder; None if there is none.
        quantiles: Whether the model's servers need q01 and q99.
    """
    if assets is None:
        return AssetCheck((), (), ("no assets folder: a server needs its normalisation statistics",))
    files = tuple(
        sorted(
            Path(folder, name).relative_to(assets).as_posix() for folder, _, names in _walk(assets) for name in names
        )
    )
    found = [name for name in files if Path(name).name == NORM_STATS]
    problems = [] if found else [f"no {NORM_STATS} below {assets}: a server needs it"]
    problems += [f"{assets / name}: a link that leads nowhere" for name in files if not (assets / name).exists()]
    for name in found:
        problems += [f"{assets / name}: {problem}" for problem in _norm_stats_problems(assets / name, quantiles)]
    ids = tuple(Path(name).parent.as_posix() for name in found)
    return AssetCheck(files, ids, tuple(problems))


def _walk(assets: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Every folder once, through links too; a link to a folder that was seen leads nowhere new."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(assets, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if os.path.realpath(Path(folder, name)) not in seen]
        seen.update(os.path.realpath(Path(folder, name)) for name in folders)
        yield folder, folders, names


def _norm_stats_problems(file: Path, quantiles: bool) -> Iterator[str]:
    try:
        stats = json.loads(file.read_text())["norm_stats"]
        entries = list(stats.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        yield f"not normalisation statistics ({error!r})"
        return
    if not entries:
        yield "empty"
    for name, entry in entries:
        if isinstance(entry, dict):
            yield from _entry_problems(name, entry, quantiles)
        else:
            yield f"{name} is no object"


def _entry_problems(name: str, entry: dict[str, Any], quantiles: bool) -> Iterator[str]:
    needed = _ALL_SERIES if quantiles else _ALL_SERIES[:2]
    series = {key: _numbers(entry[key]) for key in _ALL_SERIES if entry.get(key) is not None}
    yield from (f"{name}.{key} is missing" for key in needed if key not in series)
    for key, values in series.items():
        if not values:
            yield f"{name}.{key} is empty"
        elif not all(map(math.isfinite, values)):
            yield f"{name}.{key} is not finite, or no list of numbers"
    if len({len(values) for values in series.values()}) > 1:
        yield f"{', '.join(f'{name}.{key}' for key in series)} differ in length"
    if any(value < 0 for value in series.get("std", ())):
        yield f"{name}.std is negative"
    pairs = list(zip(series.get("q01", ()), series.get("q99", ()), strict=False))
    bad = sum(low >= high for low, high in pairs)
    if bad:
        yield f"{name}.q01 is not below {name}.q99 in {bad} of {len(pairs)} entries"


def _numbers(values: Any) -> list[float]:
    """The values, with NaN for anything that is no number."""
    if not isinstance(values, list):
        return [math.nan]
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
