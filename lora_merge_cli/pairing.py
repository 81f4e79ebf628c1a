"""How the leaves of a fine-tune and of its base pair up, and what follows where they do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.changes import LeafChange
from lora_merge_cli.dialects import Dialect
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.records import KeyPath, TensorSpec, display

_SHAPING = ("vocab_size", "tie_word_embeddings")


@dataclass(frozen=True)
class Pairing:
    """How the leaves of a fine-tune and of its base compare."""

    both: Mapping[KeyPath, TensorSpec]
    """The base's leaf of the same shape, by the fine-tune's path."""
    odd: Mapping[KeyPath, TensorSpec | None]
    """The fine-tune's others: the base's leaf of another shape, or None."""
    only_base: tuple[TensorSpec, ...]
    """The base's others."""

    @classmethod
    def of(cls, dialect: Dialect, leaves: Iterable[LeafChange], base: Iterable[TensorSpec]) -> Pairing:
        """Match them by canonical path."""
        available = by_canonical_path(dialect, base)
        both, odd = {}, {}
        for leaf in leaves:
            spec = available.pop(dialect.canonical(leaf.path), None)
            if spec is not None and spec.shape == leaf.start.shape and _are_alike(spec.dtype, leaf.start.dtype):
                both[leaf.path] = spec
            else:
                odd[leaf.path] = spec
        return cls(both, odd, tuple(available.values()))

    def __bool__(self) -> bool:
        return bool(self.odd or self.only_base)

    @property
    def in_words(self) -> Iterator[str]:
        """Each with what is wrong."""
        for path, spec in self.odd.items():
            yield f"{display(path)} ({'not in the base' if spec is None else f'{spec.shape} {spec.dtype.name} in the base'})"
        for spec in self.only_base:
            yield f"{spec.name} (only in the base)"


def respelled(canonical: KeyPath, example: KeyPath, example_canonical: KeyPath) -> KeyPath:
    """A path as a tree spells it, by one of that tree's own: what it puts before and behind the canonical path."""
    if len(example) == len(canonical) == len(example_canonical) == 1:
        # One dotted name: what wrappers put before it.
        wrapper = str(example[0]).removesuffix(str(example_canonical[0]))
        return (f"{wrapper}{canonical[0]}",) if wrapper != example[0] else canonical
    length = len(example_canonical)
    for start in range(len(example) - length + 1):
        if example[start : start + length] == example_canonical:
            return (*example[:start], *canonical, *example[start + length :])
    return canonical


def config_of_base(inputs: Inputs) -> dict[str, Any]:
    """What a loader shapes the model's leaves by, where the base says it otherwise."""
    if inputs.base is None or inputs.checkpoint.config is None:
        return {}
    theirs, own = (dict(_shaping(config)) for config in (inputs.base.config or {}, inputs.checkpoint.config))
    return {key: value for key, value in theirs.items() if own.get(key, value) != value or key not in own}


def _shaping(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _shaping(value, f"{prefix}{key}.")
        elif key in _SHAPING:
            yield f"{prefix}{key}", value


def _are_alike(one: np.dtype[Any], other: np.dtype[Any]) -> bool:
    """Whether there are numbers between those of two dtypes, or the two are the same."""
    return one == other or (is_float(one) and is_float(other))


def by_canonical_path(dialect: Dialect, specs: Iterable[TensorSpec]) -> dict[KeyPath, TensorSpec]:
    """Leaves by their canonical paths."""
    return {dialect.canonical(spec.path): spec for spec in specs}
