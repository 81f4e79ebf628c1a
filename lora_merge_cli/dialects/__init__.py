"""Dialects, in detection order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

from lora_merge_cli.dialects.interface import (
    AdapterDialect,
    Dialect,
    Group,
    ScaleOptions,
    Subject,
    Tree,
    looks_like_adapter,
)
from lora_merge_cli.dialects.nnx import Nnx
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.errors import UnmatchedAdapter, UsageError
from lora_merge_cli.records import display, first_names

_D = TypeVar("_D", bound=Dialect)

DIALECTS: tuple[Dialect, ...] = (OpenPI(), Nnx(), Plain())
"""Whose adapters are inside the checkpoint, or who have none."""


@functools.cache
def adapter_dialects() -> tuple[AdapterDialect, ...]:
    """Whose adapters are beside it, in detection order; imported once a checkpoint's own dialect is none of the above."""
    from lora_merge_cli.dialects.detached import Detached
    from lora_merge_cli.dialects.minimind import MiniMind
    from lora_merge_cli.dialects.peft import Peft

    return (Peft(), MiniMind(), Detached())


def detect_dialect(tree: Tree, name: str | None = None) -> Dialect:
    """The dialect of a checkpoint with its adapters inside, or with none; the first of all where none knows it.

    Args:
        tree: The checkpoint.
        name: What the user says it is; None to detect it.

    Raises:
        UsageError: The name is no dialect's, or several dialects know the checkpoint.
    """
    return _chosen(DIALECTS, tree, name) or DIALECTS[0]


def detect_adapter_dialect(tree: Tree, name: str | None = None) -> AdapterDialect:
    """The dialect of an adapter that lies beside its base.

    Args:
        tree: The adapter.
        name: What the user says it is; None to detect it.

    Raises:
        UsageError: The name is no dialect's, or several dialects know the adapter.
        UnmatchedAdapter: None knows it.
    """
    found = _chosen(adapter_dialects(), tree, name)
    if found is None:
        raise UnmatchedAdapter(
            "not an adapter that any dialect knows",
            where=tree.where,
            expected=f"keys as {' or '.join(dialect.name for dialect in adapter_dialects())} write them",
            found=first_names(map(display, tree.index.tensors), 3),
            hint="give the adapter after --adapter, and the model that it was trained on before it",
        )
    return found.of(tree)


def _chosen(candidates: Sequence[_D], tree: Tree, name: str | None) -> _D | None:
    if name is not None:
        named = [dialect for dialect in candidates if dialect.name == name]
        if not named:
            raise UsageError(
                f"--dialect {name} is not for adapters that lie where these do",
                expected=", ".join(dialect.name for dialect in candidates if dialect is not DIALECTS[-1]),
            )
        return named[0]
    fitting = [dialect for dialect in candidates if dialect.matches(tree)]
    if len(fitting) > 1:
        raise UsageError(
            "several dialects fit",
            where=tree.where,
            found=", ".join(dialect.name for dialect in fitting),
            hint="name the right one with --dialect",
        )
    return fitting[0] if fitting else None


def dialect_named(name: str) -> Dialect:
    """The registered dialect of that name."""
    own = (dialect for dialect in DIALECTS if dialect.name == name)
    return next(own, None) or next(dialect for dialect in adapter_dialects() if dialect.name == name)


__all__ = [
    "DIALECTS",
    "AdapterDialect",
    "Dialect",
    "Group",
    "ScaleOptions",
    "Subject",
    "Tree",
    "adapter_dialects",
    "detect_adapter_dialect",
    "detect_dialect",
    "dialect_named",
    "looks_like_adapter",
]
