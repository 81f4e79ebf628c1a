"""What a leaf starts as, for the judge: read as a source, with the arithmetic of replacements in float64."""

from __future__ import annotations

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

    def chunk(self, path: KeyPath) -> tuple[int, ...]:  # noqa: ARG002  (there is one leaf)
        """See `Source.chunk`: of whichever input has the larger ones."""
        chunks = [source.chunk(leaf) for source, leaf in self._change.read_whole(self._inputs)]
        return max(chunks, key=lambda chunk: int(np.prod(chunk)))

    def stored(self, path: KeyPath) -> Stored | None:  # noqa: ARG002
        """See `Source.stored`: of a leaf that nothing replaces."""
        change = self._change
        return None if change.replacements or change.before is None else self._source.stored(change.before.path)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return self._source.fingerprint()

    def read(self, path: KeyPath, region: Region) -> Array:  # noqa: ARG002
        """See `Source.read`: as stored where one leaf has all values, else float64.

        Raises:
            NonFiniteInput: A replacement holds NaN or Inf.
        """
        change, whole = self._change, self._change.whole
        values: Array | None = None
        if change.before is not None and change.reads_before:
            values = self._source.read(change.before.path, region)
        if whole is not None:
            brought = self._brought(whole, region)
            values = brought if values is None else _mixed(values, brought, whole.weight)
        assert values is not None, "a leaf comes from the checkpoint or from an adapter"
        rows = [found for found in change.replacements if found.rows is not None]
        if rows:
            values = values.astype(np.float64) if is_float(values.dtype) else values.copy()
        for found in rows:
            self._put_rows(found, region, values)
        return values

    def _put_rows(self, found: Replacement, region: Region, values: Array) -> None:
        source = self._inputs.source(found.adapter)
        width = source.index().tensors[found.path].shape[0]
        brought = self._brought(found, (slice(0, width), *region[1:]))
        for number, row in enumerate(found.rows or ()):
            if region[0].start <= row < region[0].stop:
                at = row - region[0].start
                values[at] = _mixed(values[at], brought[number], found.weight)

    def _brought(self, found: Replacement, region: Region) -> Array:
        source = self._inputs.source(found.adapter)
        values = source.read(found.path, region)
        if is_float(values.dtype) and not np.isfinite(values).all():
            raise NonFiniteInput(
                "an adapter's own tensor is not finite",
                where=f"{source.path} :: {source.index().tensors[found.path].name}",
                expected="finite values",
                found="NaN or Inf",
            )
        return values


def _mixed(values: Array, brought: Array, weight: float) -> Array:
    if weight == 1:
        return brought if not is_float(brought.dtype) else brought.astype(np.float64)
    before, after = values.astype(np.float64), brought.astype(np.float64)
    return np.asarray(before + weight * (after - before))
