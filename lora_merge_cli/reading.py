"""Reading what a leaf starts as: the checkpoint's values, an adapter's instead of them, or both at a weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np

from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import NonFiniteInput, UnsupportedCheckpoint
from lora_merge_cli.formats.interface import Source
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.plan import Step
from lora_merge_cli.records import (
    Array,
    KeyPath,
    Region,
    Replacement,
    TensorSpec,
    display,
    region_shape,
)
from lora_merge_cli.side_by_side import side_by_side


def scan_start(inputs: Inputs, step: Step, regions: Sequence[Region], pool: Executor | None = None) -> Iterator[Array]:
    """The values of a leaf before any site is applied, region by region, in `step.source`'s dtype; see `Source.scan`.

    Raises:
        CorruptCheckpoint: An input cannot be read.
        NonFiniteInput: An adapter's replacement holds NaN or Inf.
    """
    nothing: Iterator[Array | None] = itertools.repeat(None, len(regions))
    whole = next((found for found in step.replacements if found.rows is None), None)
    before = brought = nothing
    if step.before is not None and (whole is None or whole.weight != 1):
        before = inputs.checkpoint.source.scan(step.before.path, regions, pool)
    if whole is not None:
        brought = inputs.source(whole.adapter).scan(whole.path, regions, pool)
    for region, own, others in zip(regions, before, brought, strict=True):
        values = own if own is None or not step.replacements else own.astype(step.source.dtype)
        if whole is not None and others is not None:
            _refuse_not_finite(inputs, whole, others)
            values = others if values is None else _blend(values, others, whole.weight)
        assert values is not None, "a leaf comes from the checkpoint or from an adapter"
        for found in step.replacements:
            if found.rows is not None:
                _replace_rows(inputs, found, region, values)
        yield values


def _replace_rows(inputs: Inputs, found: Replacement, region: Region, values: Array) -> None:
    rows = np.asarray(found.rows)
    first, *rest = region
    inside = np.flatnonzero((rows >= first.start) & (rows < first.stop))
    if not len(inside):
        return
    span = slice(int(inside[0]), int(inside[-1]) + 1)
    brought = inputs.source(found.adapter).read(found.path, (span, *rest))[inside - inside[0]]
    _refuse_not_finite(inputs, found, brought)
    at = rows[inside] - first.start
    values[at] = brought if found.weight == 1 else _blend(values[at], brought, found.weight)


def _blend(values: Array, brought: Array, weight: float) -> Array:
    """``(1 - weight) * values + weight * brought``, in the dtype of `values`."""
    unit = values.dtype.type
    return np.asarray(unit(1 - weight) * values + unit(weight) * brought.astype(values.dtype), values.dtype)


def _refuse_not_finite(inputs: Inputs, found: Replacement, values: Array) -> None:
    if not is_float(values.dtype):
        return
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        source = inputs.source(found.adapter)
        raise NonFiniteInput(
            "an adapter's own tensor is not finite",
            where=f"{source.path} :: {source.index().tensors[found.path].name}",
            expected="finite values",
            found=f"{bad} of {values.size} entries NaN or Inf",
        )


def nbytes(region: Region, spec: TensorSpec) -> int:
    """The size of a region of a leaf when decoded."""
    return int(np.prod(region_shape(region))) * spec.dtype.itemsize


def refuse_unequal(source: Source, one: KeyPath, other: KeyPath) -> None:
    """Refuse two leaves of one checkpoint that its configuration ties, and that differ.

    Raises:
        UnsupportedCheckpoint: They do, in a bit or in shape.
    """
    tensors = source.index().tensors
    leaves = [(source, tensors[path]) for path in (one, other)]
    if tensors[one].shape != tensors[other].shape or not all(
        equals_rounded(first, second) for _, (first, second) in side_by_side(leaves)
    ):
        raise UnsupportedCheckpoint(
            "two tensors that the configuration ties, and that differ",
            where=f"{source.path} :: {display(one)} and {display(other)}",
            hint="save the model again, or set tie_word_embeddings in its config.json to what is true",
        )
