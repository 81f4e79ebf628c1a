"""What a leaf starts as, for the judge: read as a source, with the arithmetic of replacements in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from lora_merge_cli.changes import LeafChange
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.formats.interface import Stored
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.records import Array, Index, KeyPath, Region, Replacement


class StartSource:
    """One leaf, as adapters' replacements leave it, before any delta.

    Args:
        inputs: What the merge read.
        change: The leaf.
    """

    def __init__(self, inputs: Inputs, change: LeafChange) -> None:
        self._inputs, self._change = inputs, change
        self._source = inputs.checkpoint.source
        self.spec = change.start
        """The leaf that `read` reads."""

    @property
    def path(self) -> Path:
        """Of the checkpoint."""
        return self._source.path

    def index(self) -> Index:
        """The one leaf."""
        return Index({self.spec.path: self.spec})

    def stored(self, path: KeyPath) -> Stored | None:  # noqa: ARG002
        """See `Source.stored`: of a leaf that nothing replaces."""
        change = self._change
        return None if change.replacements or change.before is None else self._source.stored(change.before.path)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return self._source.fingerprint()

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:  # noqa: ARG002
        """See `Source.scan`: as stored where one leaf has all values, else float64.

        Raises:
            NonFiniteInput: A replacement holds NaN or Inf.
        """
        change, whole, wanted = self._change, self._change.whole, list(regions)
        nothing: Iterator[Array | None] = itertools.repeat(None, len(wanted))
        own = brought = nothing
        if change.before is not None and change.reads_before:
            own = self._source.scan(change.before.path, wanted, pool)
        if whole is not None:
            brought = self._inputs.source(whole.adapter).scan(whole.path, wanted, pool)
        for region, before, others in zip(wanted, own, brought, strict=True):
            values = before
            if whole is not None and others is not None:
                self._refuse_not_finite(whole, others)
                values = others if values is None else _mixed(values, others, whole.weight)
            assert values is not None, "a leaf comes from the checkpoint or from an adapter"
            yield self._with_rows(region, values)

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read` and `scan`."""
        return next(self.scan(path, [region]))

    def _with_rows(self, region: Region, values: Array) -> Array:
        rows = [found for found in self._change.replacements if found.rows is not None]
        if rows:
            values = values.astype(np.float64) if is_float(values.dtype) else values.copy()
        for found in rows:
            self._put_rows(found, region, values)
        return values

    def _put_rows(self, found: Replacement, region: Region, values: Array) -> None:
        source = self._inputs.source(found.adapter)
        for number, row in enumerate(found.rows or ()):
            if region[0].start <= row < region[0].stop:
                brought = source.read(found.path, (slice(number, number + 1), *region[1:]))
                self._refuse_not_finite(found, brought)
                at = row - region[0].start
                values[at] = _mixed(values[at], brought[0], found.weight)

    def _refuse_not_finite(self, found: Replacement, values: Array) -> None:
        if is_float(values.dtype) and not np.isfinite(values).all():
            source = self._inputs.source(found.adapter)
            raise NonFiniteInput(
                "an adapter's own tensor is not finite",
                where=f"{source.path} :: {source.index().tensors[found.path].name}",
                expected="finite values",
                found="NaN or Inf",
            )


def _mixed(values: Array, brought: Array, weight: float) -> Array:
    if weight == 1:
        return brought if not is_float(brought.dtype) else brought.astype(np.float64)
    before, after = values.astype(np.float64), brought.astype(np.float64)
    return np.asarray(before + weight * (after - before))
