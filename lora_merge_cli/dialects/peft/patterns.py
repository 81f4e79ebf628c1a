"""Rank and scale of each adapted module: the defaults, and the patterns that override them.

A pattern's key is a regular expression that must end where the module's name ends, and begin there or after a dot. The first key
that fits counts, in the order of the file: PEFT sorts them when it writes, so a reader can only follow that order.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping

from lora_merge_cli.dialects.peft.config import AdapterConfig
from lora_merge_cli.records import Scale


def first_fitting(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that fits a module's name; None if none does."""
    return next((key for key in patterns if _compiled(key).match(module)), None)


def rank_of(config: AdapterConfig, module: str) -> int | None:
    """The rank that the configuration gives a module; None without a configuration."""
    key = first_fitting(config.rank_pattern, module)
    return config.rank if key is None else config.rank_pattern[key]


def scale_of(config: AdapterConfig, module: str, rank: int) -> Scale:
    """What a module's low-rank product is multiplied by, and how that is known.

    Args:
        config: The adapter's configuration.
        module: The module's name in the model; with the parameter's, where a parameter was targeted.
        rank: The extent that its factors share; for stacked experts, of one expert.
    """
    key = first_fitting(config.alpha_pattern, module)
    alpha, source = (
        (config.alpha, config.alpha_source) if key is None else (config.alpha_pattern[key], f"alpha_pattern {key!r}")
    )
    if alpha is None:
        return Scale(None, "unknown: there is no adapter_config.json, pass --lora-alpha")
    rank_key = first_fitting(config.rank_pattern, module)
    sources = [source] if rank_key is None else [source, f"rank_pattern {rank_key!r}"]
    if not config.rslora:
        return Scale(alpha / rank, f"alpha {alpha:g} / rank {rank} ({', '.join(sources)})")
    sources.append(config.rslora_source)
    return Scale(alpha / math.sqrt(rank), f"alpha {alpha:g} / sqrt(rank {rank}) ({', '.join(sources)})")


def patterns_of(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The values that are not the default, each by a regular expression that fits no module of another value.

    Args:
        values: The rank or the alpha of each module, by its full name.
        default: What holds for a module that no pattern fits.
    """
    found = {}
    for name, value in values.items():
        if value == default:
            continue
        # A pattern fits every module that ends with it.
        clash = any(other.endswith(f".{name}") and rival != value for other, rival in values.items())
        found[f"{'^' if clash else ''}{re.escape(name)}"] = value
    return dict(sorted(found.items()))


@functools.lru_cache(maxsize=4096)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
