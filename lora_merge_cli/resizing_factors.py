"""What a resizing has in common whatever the adapter's format: what is wanted, what was made, factors read and stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.compare import count_non_finite
from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.records import AdapterSummary, Array, KeyPath, TensorSpec, full_region
from lora_merge_cli.resize_report import ResizedRecord
from lora_merge_cli.truncation import Truncated

DTYPES = ("keep", "float32")
"""What ``--dtype`` of a resizing may be."""


@dataclass(frozen=True)
class Wanted:
    """What to make of every module's factors."""

    rank: int | None
    """The rank of every module that has a larger one."""
    energy: float | None
    """The share of each ``|delta|_F^2`` to keep: every module gets the least rank that does."""
    dtype: str
    """What the factors are stored in: one of `DTYPES`."""

    def dtype_of(self, spec: TensorSpec) -> np.dtype[Any]:
        """What a factor is stored in."""
        return spec.dtype if self.dtype == "keep" else FLOAT32

    def keeps(self, rank: int, old: int) -> bool:
        """Whether factors of rank `old` stay, where `rank` would do: ranks are never raised."""
        return rank >= old or (self.rank is not None and self.rank >= old)


@dataclass(frozen=True)
class ResizedAdapter:
    """A new adapter, in memory."""

    summary: AdapterSummary
    """What the old one is."""
    config: Mapping[str, Any]
    """The new ``adapter_config.json``; the adapter's own where no rank changes."""
    factors: Mapping[KeyPath, Array]
    """Every tensor that is not copied as it is, by the old one's path."""
    paths: Mapping[KeyPath, KeyPath]
    """The path of each tensor in the new adapter, by the old one's path."""
    pairs: tuple[TensorSpec, ...]
    """Every factor as it was."""
    records: tuple[ResizedRecord, ...]
    """What became of each module."""
    notes: tuple[str, ...] = ()
    """What a reader should know besides."""


def read_factor(checkpoint: Checkpoint, spec: TensorSpec) -> Array:
    """A whole tensor, in its stored dtype.

    Raises:
        NonFiniteInput: It holds NaN or Inf.
        CorruptCheckpoint: It cannot be read.
    """
    values = checkpoint.source.read(spec.path, full_region(spec.shape))
    bad = count_non_finite(values)
    if bad:
        raise NonFiniteInput(
            "a factor is not finite",
            where=f"{checkpoint.source.path} :: {spec.name}",
            expected="finite values",
            found=f"{bad} of {values.size} entries NaN or Inf",
        )
    return values


def stored(values: Array, spec: TensorSpec, checkpoint: Checkpoint, wanted: Wanted) -> Array:
    """New values of a factor as they are written, rounded once.

    Raises:
        Unrepresentable: One is beyond the dtype's range.
    """
    dtype = wanted.dtype_of(spec)
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values.astype(dtype))
    if count_non_finite(rounded):
        raise Unrepresentable(
            f"a factor does not fit {dtype.name}",
            where=f"{checkpoint.source.path} :: {spec.name}",
            hint="store float32 with --dtype float32" if dtype != FLOAT32 else None,
        )
    return rounded


def padded(cut: Truncated, rank: int) -> Truncated:
    """The same with zeros up to a rank."""
    more = rank - cut.rank
    return dataclasses.replace(
        cut,
        left=np.pad(cut.left, ((0, 0), (0, more))),
        right=np.pad(cut.right, ((0, more), (0, 0))),
        singular_values=np.pad(cut.singular_values, (0, more)),
    )


def product_norm(left: Array, right: Array) -> float:
    """``|left @ right|_F`` of (rows, k) and (k, columns), from the factors."""
    r_left, r_right = np.linalg.qr(left)[1], np.linalg.qr(right.T)[1]
    return float(np.linalg.norm(r_left @ r_right.T))


def distance(old: tuple[Array, Array], new: tuple[Array, Array]) -> float:
    """``|delta - new delta|_F`` of two products, from their factors; float64."""
    return product_norm(np.hstack((old[0], new[0])), np.vstack((old[1], -new[1])))
