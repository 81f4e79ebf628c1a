"""What two dense checkpoints differ by, kernel by kernel, as truncated factors that wait on disk until all ranks are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli.compare import count_non_finite, equals_rounded
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable
from lora_merge_cli.formats.interface import Blocks, Source
from lora_merge_cli.operations import cut
from lora_merge_cli.records import Array, Region, TensorSpec, full_region, grid, slab
from lora_merge_cli.side_by_side import side_by_side
from lora_merge_cli.staging import filesystem
from lora_merge_cli.truncation import Truncated, truncate

_BLOCK_ENTRIES = 2**22
_HELD_ENTRIES = 2**26
"""A matrix of up to as many entries is read once, and held; a larger one is read again for each pass."""


@dataclass(frozen=True)
class Sides:
    """One leaf of a fine-tune and of its base."""

    tuned: TensorSpec
    base: TensorSpec


def is_moved(tuned: Source, base: Source, sides: Sides, pool: ThreadPoolExecutor) -> bool:
    """Whether a leaf is not the base's, rounded to its dtype, bit for bit.

    Raises:
        CorruptCheckpoint: One of the two cannot be read.
    """
    leaves = [(tuned, sides.tuned), (base, sides.base)]
    return not all(equals_rounded(one, other) for _, (one, other) in side_by_side(leaves, pool=pool))


class LeafDelta:
    """``T - B`` of one kernel, in float32: a stack of matrices, one for each index of the batch dims.

    Args:
        tuned: Where T is.
        base: Where B is.
        sides: The leaf on both sides, of one shape.
        equation: What its dims are.
        pool: Where parts of a leaf may be decoded at the same time.
    """

    def __init__(self, tuned: Source, base: Source, sides: Sides, equation: Equation, pool: ThreadPoolExecutor) -> None:
        self._tuned, self._base, self._sides, self._pool = tuned, base, sides, pool
        self.equation = equation
        self.cut = cut(equation, sides.tuned.shape)
        """Its matrices."""
        shape = sides.tuned.shape
        lead = len(equation.batch)
        rows = slab(shape[lead:], max(self.cut.columns, _BLOCK_ENTRIES))
        self._matrices = [
            list(grid((*corner, *full_region(shape[lead:])), ((1,) * lead + rows)))
            for corner in grid(full_region(shape[:lead]), (1,) * lead)
        ]

    def truncated(self, rank: int | None, energy: float | None, device: Any) -> Iterator[Truncated]:
        """The truncated decomposition of each matrix, in order; see `truncation.truncate`.

        Raises:
            CorruptCheckpoint: One of the two cannot be read.
            NonFiniteInput: T or B holds NaN or Inf.
            Unrepresentable: An entry of T - B is beyond float32.
        """
        rows, columns = self.cut.rows, self.cut.columns
        held = rows * columns <= _HELD_ENTRIES
        passing = self._rows(list(itertools.chain(*self._matrices))) if held else iter(())
        for regions in self._matrices:
            if held:
                matrix = list(itertools.islice(passing, len(regions)))
                yield truncate(lambda: _numbered(iter(matrix)), rows, columns, rank=rank, energy=energy, device=device)  # noqa: B023
            else:
                yield truncate(
                    lambda: _numbered(self._rows(regions)),  # noqa: B023  (called before the loop goes on)
                    rows,
                    columns,
                    rank=rank,
                    energy=energy,
                    device=device,
                )

    def _rows(self, regions: Sequence[Region]) -> Iterator[Array]:
        tuned = self._tuned.scan(self._sides.tuned.path, regions, self._pool)
        base = self._base.scan(self._sides.base.path, regions, self._pool)
        for ours, theirs in zip(tuned, base, strict=True):
            self._refuse_non_finite(self._tuned, self._sides.tuned, ours)
            self._refuse_non_finite(self._base, self._sides.base, theirs)
            wide = np.float64 if np.float64 in (ours.dtype, theirs.dtype) else np.float32
            with np.errstate(over="ignore"):
                delta = (ours.astype(wide) - theirs.astype(wide)).astype(np.float32)
            self._refuse_overflow(delta)
            yield delta.reshape(-1, self.cut.columns)

    def _refuse_non_finite(self, source: Source, spec: TensorSpec, values: Array) -> None:
        bad = count_non_finite(values)
        if bad:
            raise NonFiniteInput(
                "a kernel to take a difference of is not finite",
                where=f"{source.path} :: {spec.name}",
                expected="finite values",
                found=f"{bad} entries NaN or Inf",
            )

    def _refuse_overflow(self, delta: Array) -> None:
        beyond = count_non_finite(delta)
        if beyond:
            raise Unrepresentable(
                "a difference that is not finite in float32",
                where=f"{self._tuned.path} :: {self._sides.tuned.name}",
                expected="factors of float32",
                found=f"{beyond} entries beyond it",
                hint="see that TUNED and BASE belong together, or leave it out with --exclude",
            )


def _numbered(rows: Iterator[Array]) -> Iterator[tuple[int, Array]]:
    first = 0
    for block in rows:
        yield first, block
        first += len(block)


@dataclass(frozen=True)
class Factored:
    """The factors of one kernel, on disk."""

    equation: Equation
    """From the factors' dims to the kernel's."""
    rank: int
    """The largest of its matrices; the others have columns and rows of zeros instead."""
    energy_kept: float
    """The share of ``|delta|^2`` that they have."""
    relative_error: float
    """``|delta - a b| / |delta|``."""
    norm: float
    """``|delta|``."""
    sizes: Mapping[str, int]
    """The extent of each dim."""
    outputs_first: bool
    """Whether rows of the matrices are outputs."""
    folder: Path
    """Where the factors of its matrices are."""

    def shape(self, role: str) -> tuple[int, ...]:
        """The extents of ``lora_a`` or ``lora_b``."""
        return tuple(self.sizes[dim] for dim in self._dims(role))

    def blocks(self, role: str) -> Blocks:
        """The values of ``lora_a`` or ``lora_b``, float32, a matrix at a time."""
        dims, batch = self._dims(role), self.equation.batch
        left = (role == "lora_b") == self.outputs_first
        own = self.equation.outputs if role == "lora_b" else self.equation.inputs
        made = f"{own}{self.equation.rank}" if left else f"{self.equation.rank}{own}"
        rest = dims[len(batch) :]
        corners = grid(full_region([self.sizes[dim] for dim in batch]), (1,) * len(batch))
        for number, corner in enumerate(corners):
            matrix = np.load(self.folder / f"{number}-{'left' if left else 'right'}.npy")
            missing = self.rank - matrix.shape[1 if left else 0]
            padded = np.pad(matrix, ((0, 0), (0, missing)) if left else ((0, missing), (0, 0)))
            values = padded.reshape([self.sizes[dim] for dim in made]).transpose([made.index(dim) for dim in rest])
            values = np.ascontiguousarray(values)
            yield (*corner, *full_region(values.shape)), values.reshape((1,) * len(batch) + values.shape)

    def _dims(self, role: str) -> str:
        dims = self.equation.a if role == "lora_a" else self.equation.b
        assert dims.startswith(self.equation.batch), "batch dims lead"
        return dims


def factor_leaf(delta: LeafDelta, folder: Path, rank: int | None, energy: float | None, device: Any) -> Factored:
    """Decompose a kernel's delta, and keep its factors in an empty folder.

    Raises:
        CorruptCheckpoint: One of the two checkpoints cannot be read.
        NonFiniteInput: One of the two holds NaN or Inf there.
        Unrepresentable: An entry of the delta is beyond float32.
        DiskFull, NotPermitted, ResourceError: The operating system refuses.
    """
    highest, total_sq, kept_sq, error_sq = 1, 0.0, 0.0, 0.0
    with filesystem(folder):
        folder.mkdir(parents=True)
    for number, found in enumerate(delta.truncated(rank, energy, device)):
        with filesystem(folder):
            np.save(folder / f"{number}-left.npy", found.left)
            np.save(folder / f"{number}-right.npy", found.right)
        highest = max(highest, found.left.shape[1])
        square = found.total**2
        total_sq += square
        kept_sq += found.energy_kept * square
        error_sq += found.relative_error**2 * square
    extents = dict(zip(delta.equation.target, delta.cut.shape, strict=True))
    return Factored(
        delta.equation,
        highest,
        kept_sq / total_sq if total_sq else 1.0,
        math.sqrt(error_sq / total_sq) if total_sq else 0.0,
        math.sqrt(total_sq),
        extents | {delta.equation.rank: highest},
        delta.cut.outputs_first,
        folder,
    )
