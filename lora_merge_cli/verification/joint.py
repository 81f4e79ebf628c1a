"""The joint fine-tune as its judge sees it: made of the same files, by formulas of its own, NumPy and float64, leaf by leaf.

What a leaf is made of follows `joining.method` and the papers that the methods are from. Nothing is held whole: what needs a whole
leaf is found in passes of their own, see `joint_whole`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np

from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import UnsupportedCheckpoint, WrongBase
from lora_merge_cli.formats.interface import Source, Stored
from lora_merge_cli.joining.method import Joining
from lora_merge_cli.records import Array, Index, KeyPath, Region, TensorSpec, display, region_shape
from lora_merge_cli.side_by_side import flat_pieces, side_by_side
from lora_merge_cli.verification.doubts import Doubts
from lora_merge_cli.verification.joint_entries import Making, made
from lora_merge_cli.verification.joint_whole import Tensor, Whole
from lora_merge_cli.verification.judged_fused import JudgedFused

_Any = TypeVar("_Any")

Canonical: TypeAlias = Callable[[KeyPath], KeyPath]
"""A leaf's path without what differs between the spellings of one model."""

_WIDE = np.dtype(np.float64)


class JointSource:
    """The joint fine-tune. Its leaves are those of the first fine-tune, and float64 where all versions have numbers to join.

    Args:
        base: What all fine-tunes started from.
        tuned: The fine-tunes; those with adapters as `JudgedFused`.
        joining: What to make of them.
        canonical: Matches the leaves of different files; whole paths do where two of one file would be one.

    Raises:
        WrongBase: A fine-tune lacks a leaf of another, or has it in another shape.
    """

    def __init__(self, base: Source, tuned: Sequence[Source], joining: Joining, canonical: Canonical) -> None:
        self._sources = base, *tuned
        self._joining = joining
        tensors = [source.index().tensors for source in self._sources]
        if any(len(set(map(canonical, found))) < len(found) for found in tensors):
            self._named: list[Mapping[KeyPath, TensorSpec]] = list(tensors)
        else:
            self._named = [{canonical(path): spec for path, spec in found.items()} for found in tensors]
        self._refuse_others()
        self._names = {spec.path: name for name, spec in self._named[1].items()}
        self._shared = self._shared_by_all(canonical)
        self._makings: dict[KeyPath, Making] = {}
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The first fine-tune's."""
        return self._sources[1].path

    def index(self) -> Index:
        """The first fine-tune's leaves, those that are joined as float64."""
        return self._index

    @functools.cached_property
    def _index(self) -> Index:
        first = self._sources[1].index()
        specs = {
            path: dataclasses.replace(spec, dtype=_WIDE) if self._whole(path) else spec
            for path, spec in first.tensors.items()
        }
        return Index(specs, first.constants, self._shared)

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:
        """See `Source.scan`, and `possible`."""
        whole = self._whole(path)
        if whole is None:
            yield from self._sources[1].scan(self._agreed(path, pool).path, regions, pool)
            return
        # Nobody reads a joined leaf so but in parts: what is judged comes from `possible`.
        for region in regions:
            yield self.read(path, region)

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`."""
        whole = self._whole(path)
        if whole is None:
            return self._sources[1].read(self._agreed(path, None).path, region)
        making = self._making(path, whole, None)
        numbers = [making.start] if making.is_plain else making.tensors
        values = {n: whole.tensors[n].leaf for n in numbers}
        wide = {
            n: source.read(spec.path, region).reshape(-1).astype(np.float64) for n, (source, spec) in values.items()
        }
        errors = {
            n: source.read(whole.tensors[n].leaf[1].path, region).reshape(-1)
            for n in numbers
            if (source := whole.tensors[n].errors) is not None
        }
        found, _ = made(making, wide, errors, _places(whole, region), wide=whole.is_wide)
        return found.reshape(region_shape(region))

    def possible(
        self, path: KeyPath, rows: Sequence[int] | None = None, pool: Executor | None = None
    ) -> Iterator[tuple[Array, Doubts | None]]:
        """Runs of entries of a leaf, cut as `side_by_side` cuts it, with what a right computation in float32 may make of each.

        Args:
            path: The leaf.
            rows: The indices of the first axis that are wanted; all if None.
            pool: Where parts of a leaf may be decoded at the same time.

        Returns:
            Values, as stored or float64, and their doubts; None for values that are not computed.

        Raises:
            CorruptCheckpoint: A leaf cannot be read.
            NonFiniteInput: A leaf that is joined holds NaN or Inf.
            UnsupportedCheckpoint: A leaf that cannot be joined differs between the fine-tunes.
        """
        whole = self._whole(path)
        if whole is None:
            with _closed(side_by_side([(self._sources[1], self._agreed(path, pool))], rows, pool)) as blocks:
                yield from ((values, None) for _, (values,) in blocks)
            return
        making = self._making(path, whole, pool)
        if making.is_plain and whole.tensors[making.start].errors is None:
            with _closed(side_by_side([whole.tensors[making.start].leaf], rows, pool)) as blocks:
                yield from ((values, None) for _, (values,) in blocks)
            return
        with _closed(whole.runs(making.tensors, rows, pool)) as runs:
            for region, (values, errors) in runs:
                found, doubts = made(making, values, errors, _places(whole, region), wide=whole.is_wide)
                yield found.reshape(region_shape(region)), doubts

    def stored(self, path: KeyPath) -> Stored | None:
        """The first fine-tune's bytes of a leaf that is not joined."""
        return self._sources[1].stored(path) if self._whole(path) is None else None

    def fingerprint(self) -> str:
        """A digest of all inputs' digests and of how they are joined."""
        said = [repr(self._joining), *(source.fingerprint() for source in self._sources)]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()

    def _whole(self, path: KeyPath) -> Whole | None:
        """The versions of a leaf that is joined; None for one that is not: the base lacks it, or it is no array of numbers."""
        name = self._names[self._shared.get(path, path)]
        specs = [named.get(name) for named in self._named]
        tensors = []
        for source, spec in zip(self._sources, specs, strict=True):
            if spec is None or spec.kind != "array" or not is_float(spec.dtype) or not spec.size:
                return None
            computed = isinstance(source, JudgedFused) and spec.path in source.computed
            errors = source.errors if isinstance(source, JudgedFused) and computed else None
            tensors.append(Tensor((source, spec), errors))
        if tensors[0].leaf[1].shape != tensors[1].leaf[1].shape:
            return None
        return Whole(tuple(tensors), display(name), self._joining)

    def _making(self, path: KeyPath, whole: Whole, pool: Executor | None) -> Making:
        key = self._shared.get(path, path)
        with self._lock:
            if key not in self._makings:
                self._makings[key] = whole.making(pool)
            return self._makings[key]

    def _agreed(self, path: KeyPath, pool: Executor | None) -> TensorSpec:
        """The first fine-tune's leaf, which every other one has too.

        Raises:
            UnsupportedCheckpoint: One has other values.
        """
        name = self._names[self._shared.get(path, path)]
        leaves = [(source, named[name]) for source, named in zip(self._sources[1:], self._named[1:], strict=True)]
        with _closed(side_by_side(leaves, pool=pool)) as blocks:
            for _, block in blocks:
                for first, *others in flat_pieces(*block):
                    for (source, spec), values in zip(leaves[1:], others, strict=True):
                        if values.dtype != first.dtype or not equals_rounded(values, first):
                            raise UnsupportedCheckpoint(
                                "a tensor that cannot be joined differs between the fine-tunes",
                                where=f"{source.path} :: {spec.name}",
                                expected=f"the values in {self.path}",
                                found="others",
                            )
        return leaves[0][1]

    def _refuse_others(self) -> None:
        _, first, *others = self._named
        for source, named in zip(self._sources[2:], others, strict=True):
            for name in first.keys() | named.keys():
                one, other = first.get(name), named.get(name)
                if one is None or other is None or one.shape != other.shape or one.kind != other.kind:
                    raise WrongBase(
                        "the fine-tunes are not of one base",
                        where=f"{source.path} :: {display(name)}",
                        expected="missing" if one is None else one.shape,
                        found="missing" if other is None else other.shape,
                    )

    def _shared_by_all(self, canonical: Canonical) -> Mapping[KeyPath, KeyPath]:
        """The first fine-tune's leaves of two paths that all others, and the base if it has them, keep as one too."""
        pairs = [
            {(canonical(later), canonical(first)) for later, first in source.index().shared.items()}
            for source in self._sources
        ]
        in_base = set(map(canonical, self._sources[0].index().tensors))
        return {
            later: first
            for later, first in self._sources[1].index().shared.items()
            if all((canonical(later), canonical(first)) in found for found in pairs[2:])
            and ((canonical(later), canonical(first)) in pairs[0] or canonical(later) not in in_base)
        }


@contextlib.contextmanager
def _closed(blocks: Iterator[_Any]) -> Iterator[Iterator[_Any]]:
    """The blocks; their threads would outlive a reader that stops early."""
    try:
        yield blocks
    finally:
        if isinstance(blocks, Generator):
            blocks.close()


def _places(whole: Whole, region: Region) -> Array:
    """Where in the leaf, in row-major order, each entry of a region lies; one axis."""
    shape = whole.tensors[0].leaf[1].shape
    found = np.zeros((), np.int64)
    for part, extent in zip(region, shape, strict=True):
        found = found[..., None] * extent + np.arange(part.start, part.stop)
    return np.asarray(found.reshape(-1))
