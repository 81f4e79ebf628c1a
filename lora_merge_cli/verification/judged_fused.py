"""A fine-tune with adapters as its judge sees it: kernels with their deltas, and their errors. NumPy, float64."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli.dtypes import FLOAT32, is_float, ulp
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.fine_tunes import of_fine_tune
from lora_merge_cli.formats.interface import Source, Stored
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.records import Array, Index, KeyPath, Region, TensorSpec, full_region, region_shape, relative
from lora_merge_cli.side_by_side import Leaf
from lora_merge_cli.verification.adapted import Adapted
from lora_merge_cli.verification.expectation import ExpectedLeaf, expect
from lora_merge_cli.verification.methods import changed, is_by_row
from lora_merge_cli.verification.row_judge import as_matrix
from lora_merge_cli.verification.series import Series
from lora_merge_cli.verification.site_factors import SiteFactors, adapted_site, batch_pieces
from lora_merge_cli.verification.start import StartSource

_EPSILON = 2.0**-24
_TINY = 2.0**-126
_WIDE = np.dtype(np.float64)

_Merged = Callable[[Region], tuple[Array, Array]]
"""The values of a kernel in a region, and their errors."""


class JudgedFused:
    """A checkpoint with adapters inside, or a base with some beside it, every adapter merged.

    Kernels under adapters are ``W + delta`` in float64 (see `series.Series`), leaves that an adapter brings are float32, and all
    others are as they are stored.

    Args:
        inputs: What is merged.
        options: How; its dtypes do not count.

    Raises:
        Refused: The merge would be wrong or pointless.
    """

    def __init__(self, inputs: Inputs, options: MergeOptions) -> None:
        plain = of_fine_tune(inputs, options)
        self._inputs, self._multiplier = inputs, options.multiplier
        self._leaves = {leaf.change.path: leaf for leaf in expect(inputs, plain, {}).leaves.values()}
        self._factors = SiteFactors(inputs)
        self._merged = functools.lru_cache(2)(self._prepared)
        self._lock = threading.Lock()
        self.declared: Mapping[KeyPath, np.dtype[Any]] = {
            path: leaf.dtype for path, leaf in self._leaves.items() if leaf.dtype is not None
        }
        """What a merge would store each leaf in by default."""
        self.warnings: tuple[str, ...] = ()
        """None: those of the merge say it."""
        self.computed = frozenset(path for path, leaf in self._leaves.items() if leaf.sites)
        """The kernels under adapters, which a merge computes in float32."""
        self.errors: Source = _Errors(self)
        """How far a right float32 merge may be from them, entry by entry."""

    @property
    def path(self) -> Path:
        """See `Source.path`."""
        return self._inputs.checkpoint.source.path

    @functools.cached_property
    def _index(self) -> Index:
        before = self._inputs.checkpoint.source.index()
        specs = {path: _spec(path, leaf) for path, leaf in self._leaves.items()}
        whole = {path for path, leaf in self._leaves.items() if not leaf.change.changes}
        shared = {later: first for later, first in before.shared.items() if {later, first} <= whole}
        return Index(specs, before.constants, shared)

    def index(self) -> Index:
        """See `Source.index`."""
        return self._index

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:
        """See `Source.scan`.

        Raises:
            NonFiniteInput: A factor, or a kernel under an adapter, holds NaN or Inf.
        """
        leaf = self._leaves[path]
        if leaf.sites:
            for region in regions:
                yield self.merged(path, region)[0]
            return
        start, brought = StartSource(self._inputs, leaf.change), leaf.change.changes and is_float(leaf.source.dtype)
        for values in start.scan(start.spec.path, regions, pool):
            yield values.astype(FLOAT32) if brought else values

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`."""
        return next(self.scan(path, [region]))

    def stored(self, path: KeyPath) -> Stored | None:
        """See `Source.stored`."""
        leaf = self._leaves[path]
        return None if leaf.change.changes else StartSource(self._inputs, leaf.change).stored(path)

    def fingerprint(self) -> str:
        """That of the checkpoint."""
        return self._inputs.checkpoint.source.fingerprint()

    def merged(self, path: KeyPath, region: Region) -> tuple[Array, Array]:
        """Values of a kernel under an adapter, and how far a float32 merge may be from them; both float64."""
        with self._lock:
            found = self._merged(path)
        return found(region)

    def _prepared(self, path: KeyPath) -> _Merged:
        leaf = self._leaves[path]
        start = StartSource(self._inputs, leaf.change)
        kernel: Leaf = start, start.spec
        if leaf.base is not None and self._inputs.base is not None:
            kernel = self._inputs.base.source, leaf.base
        parts: list[_ByRow | Adapted] = []
        for site in leaf.sites:
            factors, _ = self._factors.of(site)
            if is_by_row(site.operation):
                weight = site.weight * self._multiplier
                parts.append(_ByRow(weight, functools.partial(changed, site, factors)))
            else:
                parts.append(adapted_site(site, factors, kernel, self._multiplier))
        low_rank = [part for part in parts if isinstance(part, Adapted)]
        if len(low_rank) == len(parts):
            return functools.partial(_low_rank, kernel, Series.of(low_rank), leaf)
        values, errors = _by_row(kernel, parts, leaf)
        return lambda region: (values[region], errors[region])


@dataclass(frozen=True)
class _ByRow:
    """An adapter whose change of an output depends on that output's row."""

    weight: float
    changed: Callable[[Array], Array]


class _Errors:
    """The errors of a `JudgedFused`, as a source of leaves of the same paths."""

    def __init__(self, fused: JudgedFused) -> None:
        self._fused = fused
        self.index = fused.index
        self.fingerprint = fused.fingerprint

    @property
    def path(self) -> Path:
        return self._fused.path

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:  # noqa: ARG002
        for region in regions:
            yield self.read(path, region)

    def read(self, path: KeyPath, region: Region) -> Array:
        return self._fused.merged(path, region)[1]

    def stored(self, path: KeyPath) -> Stored | None:  # noqa: ARG002
        return None


def _spec(path: KeyPath, leaf: ExpectedLeaf) -> TensorSpec:
    start = leaf.source
    if leaf.sites:
        return TensorSpec(path, start.shape, _WIDE)
    brought = leaf.change.changes and is_float(start.dtype)
    return TensorSpec(path, start.shape, FLOAT32 if brought else start.dtype, start.kind)


def _low_rank(kernel: Leaf, series: Series, leaf: ExpectedLeaf, region: Region) -> tuple[Array, Array]:
    """``W + gain * W + a @ b``, with the bound of `site_judge.SiteJudge` for a float32 computation of it."""
    equation = leaf.sites[0].parameters.equation
    w = _finite(kernel, kernel[0].read(kernel[1].path, region))
    values, errors = np.empty_like(w), np.empty_like(w)
    steps = series.steps + 4
    order = equation.batch + equation.inputs + equation.outputs
    for piece in batch_pieces(equation, region):
        parts = dict(zip(equation.target, piece, strict=True))
        batch = tuple(parts[dim].start for dim in equation.batch)
        rows = (*batch, *(parts[dim] for dim in equation.inputs))
        columns = (*batch, slice(None), *(parts[dim] for dim in equation.outputs))
        a = series.a[rows].reshape(-1, series.a.shape[-1])
        b, b_size = (part[columns].reshape(a.shape[1], -1) for part in (series.b, series.b_size))
        delta = a @ b
        size = np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b_size, axis=0))
        inside = relative(piece, region)
        here = np.transpose(w[inside], [equation.target.index(dim) for dim in order])
        flat = here.reshape(delta.shape)
        if series.gain is not None and series.gain_size is not None:
            at = (*batch, *(parts[dim] for dim in equation.outputs))
            delta += series.gain[at].reshape(-1) * flat
            size += series.gain_size[at].reshape(-1) * np.abs(flat)
            size *= 1 + series.gain_error / (steps * _EPSILON)
        merged = flat + delta
        error = steps * (_EPSILON * (size + np.abs(flat)) + _TINY) + 0.5 * ulp(merged, FLOAT32)
        back = [order.index(dim) for dim in equation.target]
        values[inside] = np.transpose(merged.reshape(here.shape), back)
        errors[inside] = np.transpose(error.reshape(here.shape), back)
    return values, errors


def _by_row(kernel: Leaf, parts: list[_ByRow | Adapted], leaf: ExpectedLeaf) -> tuple[Array, Array]:
    """The whole kernel, adapter after adapter, with the bound of `row_judge.RowJudge`."""
    equation = leaf.sites[0].parameters.equation
    stored = _finite(kernel, kernel[0].read(kernel[1].path, full_region(kernel[1].shape)))
    w = as_matrix(equation, stored)
    x, size, ranks = w, np.abs(w).max(axis=1, keepdims=True, initial=0.0), 0
    for part in sorted(parts, key=lambda part: isinstance(part, _ByRow)):
        if isinstance(part, Adapted):
            left, right = part.left().reshape(-1, part.rank), part.right().reshape(part.rank, -1)
            extra = part.rescaling
            x = x + (left @ right).T + (0.0 if extra is None else extra.reshape(-1, 1) * x)
            magnitudes = part.right(magnitudes=True).reshape(part.rank, -1)
            size = size + magnitudes.T @ np.abs(left).max(axis=0)[:, None]
            ranks += part.steps
        else:
            x = x + part.weight * (part.changed(w) - w)
        size = np.maximum(size, np.abs(x).max(axis=1, keepdims=True, initial=0.0))
    error = (64 + math.sqrt(w.shape[1]) + ranks) * _EPSILON * size + 0.5 * ulp(x, FLOAT32)
    order = equation.outputs + equation.inputs
    extents = dict(zip(equation.target, region_shape(full_region(stored.shape)), strict=True))
    shape, back = [extents[dim] for dim in order], [order.index(dim) for dim in equation.target]
    values, errors = (np.transpose(each.reshape(shape), back) for each in (x, error))
    return values, errors


def _finite(kernel: Leaf, values: Array) -> Array:
    wide: Array = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise NonFiniteInput(
            "a kernel under an adapter is not finite",
            where=f"{kernel[0].path} :: {kernel[1].name}",
            expected="finite values",
        )
    return wide
