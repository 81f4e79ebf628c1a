"""Dialects, in detection order."""

from __future__ import annotations

from lora_merge_cli.dialects.interface import Dialect, Group, ScaleOptions, looks_like_adapter
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.records import Index

DIALECTS: tuple[Dialect, ...] = (OpenPI(),)


def detect_dialect(index: Index) -> Dialect:
    """The first dialect that knows the checkpoint; the first of all where none does."""
    return next((dialect for dialect in DIALECTS if dialect.matches(index)), DIALECTS[0])


def dialect_named(name: str) -> Dialect:
    """The registered dialect of that name."""
    return next(dialect for dialect in DIALECTS if dialect.name == name)


__all__ = [
    "DIALECTS",
    "Dialect",
    "Group",
    "ScaleOptions",
    "detect_dialect",
    "dialect_named",
    "looks_like_adapter",
]
