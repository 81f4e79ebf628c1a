"""The files that serving needs beside the parameters: OpenPI's normalisation statistics, and whether they are sane."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NORM_STATS = "norm_stats.json"


@dataclass(frozen=True)
class AssetCheck:
    """What was found."""

    files: tuple[str, ...]
    """All files, relative to the assets folder."""
    asset_ids: tuple[str, ...]
    """The folders with normalisation statistics."""
    problems: tuple[str, ...]
    """What would go wrong when serving."""


def check_assets(assets: Path | None) -> AssetCheck:
    """Look at an ``assets`` folder: are normalisation statistics present, finite, and is q01 below q99 everywhere?"""
    if assets is None:
        return AssetCheck((), (), ("no assets folder: a server needs its normalisation statistics",))
    files = tuple(sorted(f.relative_to(assets).as_posix() for f in assets.rglob("*") if f.is_file()))
    found = [name for name in files if Path(name).name == NORM_STATS]
    problems = [] if found else [f"no {NORM_STATS} below {assets}: a server needs it"]
    for name in found:
        problems += [f"{assets / name}: {problem}" for problem in _norm_stats_problems(assets / name)]
    ids = tuple(Path(name).parent.as_posix() for name in found)
    return AssetCheck(files, ids, tuple(problems))


def _norm_stats_problems(file: Path) -> Iterator[str]:
    try:
        stats = json.loads(file.read_text())["norm_stats"]
        entries = list(stats.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"not normalisation statistics ({error!r})"
        return
    if not entries:
        yield "empty"
    for name, entry in entries:
        if not isinstance(entry, dict):
            yield f"{name} is no object"
            continue
        yield from _entry_problems(name, entry)


def _entry_problems(name: str, entry: dict[str, Any]) -> Iterator[str]:
    for key in ("mean", "std"):
        if entry.get(key) is None:
            yield f"{name}.{key} is missing"
    series = {key: _numbers(entry.get(key)) for key in ("mean", "std", "q01", "q99")}
    for key, values in series.items():
        if values is not None and not all(map(math.isfinite, values)):
            yield f"{name}.{key} is not finite, or no list of numbers"
    std, low, high = series["std"], series["q01"], series["q99"]
    if std is not None and any(value < 0 for value in std):
        yield f"{name}.std is negative"
    if low is not None and high is not None:
        if len(low) != len(high):
            yield f"{name}.q01 and {name}.q99 differ in length"
        elif any(a >= b for a, b in zip(low, high, strict=True)):
            bad = sum(a >= b for a, b in zip(low, high, strict=True))
            yield f"{name}.q01 is not below {name}.q99 in {bad} of {len(low)} entries"


def _numbers(values: Any) -> list[float] | None:
    """The values, with NaN for anything that is no number; None where there are none."""
    if values is None:
        return None
    if not isinstance(values, list):
        return [math.nan]
    return [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else math.nan for v in values]
