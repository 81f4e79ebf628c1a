"""Flags to the library's options."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from lora_merge_cli.dialects import DIALECTS, ScaleOptions
from lora_merge_cli.errors import UsageError
from lora_merge_cli.inputs import AdapterChoice

EVERY_GROUP = "all"

_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")

_GROUPS = tuple(dict.fromkeys(group for dialect in DIALECTS for group in dialect.groups if group))


def parse_scales(alpha: str | None, rslora: str | None) -> ScaleOptions:
    """The values of ``--lora-alpha`` and ``--rslora``.

    Args:
        alpha: ``12``, or ``paligemma=12,action_expert=2``.
        rslora: ``all``, or names of groups, also as ``paligemma=true,action_expert=false``.

    Raises:
        UsageError: A value has another form, or names no group.
    """
    return ScaleOptions(
        {} if alpha is None else _alphas(alpha),
        frozenset() if rslora is None else frozenset(_rslora_groups(rslora)),
    )


def parse_adapters(values: Sequence[str] | None) -> tuple[AdapterChoice, ...]:
    """The values of ``--adapter``: a path, or a path and its weight after an ``@`` that a number follows."""
    return tuple(map(_adapter, values or ()))


def states_weight(text: str) -> bool:
    """Whether a path is followed by a weight."""
    return _weight(text) is not None


def _adapter(text: str) -> AdapterChoice:
    weight = _weight(text)
    return AdapterChoice(Path(text)) if weight is None else AdapterChoice(Path(text.rpartition("@")[0]), weight)


def _weight(text: str) -> float | None:
    path, _, number = text.rpartition("@")
    try:
        return float(number) if path else None
    except ValueError:
        return None


def parse_size(text: str) -> int:
    """A number of bytes, as ``5GB``, ``500MB``, ``2GiB`` or ``1000``.

    Raises:
        UsageError: It is none, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    size = 0.0
    if match is not None and (match[2] or not match[3]):
        size = float(match[1]) * (1024 if match[3] else 1000) ** (" kmgt".index(match[2] or " "))
    if not 1 <= size < 2**63:
        raise UsageError("--max-shard-size is no size", expected="a number with KB, MB, GB or TB", found=text)
    return int(size)


def attach_rslora(arguments: Sequence[str]) -> list[str]:
    """Give a bare ``--rslora`` its value, so that it works with and without one.

    What follows it is its value only if it names groups: ``--rslora CKPT`` leaves CKPT alone.
    """
    part = rf"(?:{'|'.join((*_GROUPS, EVERY_GROUP))})(?:=(?:{'|'.join((*_YES, *_NO))}))?"
    value = re.compile(rf"{part}(?:,{part})*")
    attached: list[str] = []
    waiting = False
    for argument in arguments:
        if waiting and value.fullmatch(argument):
            attached[-1] = f"--rslora={argument}"
            waiting = False
            continue
        waiting = argument == "--rslora"
        attached.append(f"--rslora={EVERY_GROUP}" if waiting else argument)
    return attached


def _alphas(text: str) -> dict[str, float]:
    alphas: dict[str, float] = {}
    for part in text.split(","):
        group, separator, number = part.rpartition("=")
        group = group.strip()
        if separator and group not in _GROUPS:
            raise UsageError("--lora-alpha names no expert", expected=" or ".join(_GROUPS), found=group or part)
        if group in alphas:
            raise UsageError("--lora-alpha names an expert twice", found=text)
        try:
            value = float(number)
        except ValueError as error:
            raise UsageError(
                "--lora-alpha is no number",
                expected="12, or paligemma=12,action_expert=2",
                found=text,
            ) from error
        if not (math.isfinite(value) and value > 0):
            raise UsageError("--lora-alpha must be above zero", found=text)
        alphas[group] = value
    return alphas


def _rslora_groups(text: str) -> list[str]:
    groups = []
    for part in text.split(","):
        group, _, wanted = part.partition("=")
        if group not in (*_GROUPS, EVERY_GROUP) or wanted not in ("", *_YES, *_NO):
            raise UsageError("--rslora names no expert", expected=f"{', '.join(_GROUPS)} or nothing", found=text)
        if wanted not in _NO:
            groups.append("" if group == EVERY_GROUP else group)
    return groups
