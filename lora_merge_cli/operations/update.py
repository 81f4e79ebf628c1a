"""One kernel being changed, block by block, by all its adapters at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable
from lora_merge_cli.lowrank import basis_within, column_basis
from lora_merge_cli.operations.cutting import Cut, cut
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import Array, Region
from lora_merge_cli.survival import Moments, Realised

if TYPE_CHECKING:
    from lora_merge_cli.numerics import FusedBlock


class KernelUpdate:
    """The kernel of all sites with one target.

    Blocks may be computed at the same time, and are taken one after the other.

    Law: the values of a block depend on the leaf's shape, the contributions and the block alone, not on the order in which blocks
    are asked for.

    Args:
        where: The kernel as errors name it.
        equation: Which of its dims are batch, inputs and outputs: any site's.
        shape: The kernel's shape.
        contribution: What its sites make of it, one after the other; see `sequence.in_sequence`.
        dtype: What the result is stored in.
        serving_dtype: What a server will cast it to.
        device: The JAX device to compute on.
    """

    def __init__(
        self,
        where: str,
        equation: Equation,
        shape: Sequence[int],
        contribution: Contribution,
        dtype: np.dtype[Any],
        serving_dtype: np.dtype[Any],
        device: Any,
    ) -> None:
        self._where = where
        self._cut = cut(equation, shape)
        self._dtype, self._serving_dtype, self._device = dtype, serving_dtype, device
        batch = len(equation.batch)
        a, b = contribution.a, contribution.b
        gain = None if contribution.gain is None else contribution.gain.astype(FLOAT32)
        self._unit = _delta_unit(a, b, gain)
        self._operands = _Operands(self._cut, a, b, *column_basis(a, batch), gain)
        self._moments = Moments()
        self._projections: dict[int, _Projection] = {}

    def compute(self, region: Region, kernel: Array, base: Array | None) -> FusedBlock:
        """Compute one block; keeps nothing, so any thread may.

        Args:
            region: Where the block lies in the leaf.
            kernel: The values there that the adapters change, in the stored dtype.
            base: The values to change instead; None to use the kernel's.
        """
        from lora_merge_cli.numerics import Block, fuse_block

        shape = self._cut
        first, rows = shape.rows_of(region)
        left, right, basis, gain = self._operands.of(first, rows)
        block = Block(
            kernel=_padded(kernel.reshape(rows, -1), shape.block_rows),
            base=None if base is None else _padded(base.reshape(rows, -1), shape.block_rows),
            left=left,
            right=right,
            basis=basis,
            gain=gain,
            unit=self._unit,
            tiles=np.int32(-(-rows // shape.tile_rows)),
        )
        return fuse_block(
            block,
            tile_rows=shape.tile_rows,
            outputs_first=shape.outputs_first,
            dtype=self._dtype.name,
            serving_dtype=self._serving_dtype.name,
            device=self._device,
        )

    def take(self, region: Region, kernel: Array, fused: FusedBlock) -> Array:
        """Check a computed block, add its sums, and return its values.

        Raises:
            NonFiniteInput: The kernel has a NaN or Inf there.
            Unrepresentable: A finite result is not finite in the stored dtype.
        """
        first, rows = self._cut.rows_of(region)
        values = fused.values[:rows]
        # Sums that are finite have finite terms; the others need a look at the values themselves.
        if not np.isfinite(fused.kernel_sq).all() and not np.isfinite(kernel).all():
            raise NonFiniteInput(
                "a kernel under an adapter is not finite",
                where=self._where,
                expected="finite values",
                found=f"NaN or Inf in {_spell(region)}",
            )
        if not np.isfinite(fused.realised[self._dtype.name].error_sq).all() and not np.isfinite(values).all():
            raise Unrepresentable(
                f"the merged kernel overflows {self._dtype.name}",
                where=self._where,
                found=f"a result beyond its range in {_spell(region)}",
                hint="use --dtype float32 or bfloat16"
                if self._dtype.itemsize < FLOAT32.itemsize and self._dtype.name != "bfloat16"
                else "see that the adapter is one of this base, and did not diverge",
            )
        # Figures of what overflows are not finite, and said to be so.
        with np.errstate(over="ignore", invalid="ignore"):
            self._moments.add(self._sums(fused, rows))
            self._project(first, rows, fused)
        return np.asarray(values).reshape([part.stop - part.start for part in region])

    def finish(self) -> Moments:
        """The sums over the kernel.

        Raises:
            RuntimeError: Some block was never taken.
        """
        if self._projections or self._moments.entries != math.prod(self._cut.shape):
            raise RuntimeError(f"{self._where}: not every block was computed")
        return self._moments

    def _sums(self, fused: FusedBlock, rows: int) -> Moments:
        unit = float(self._unit) ** 2
        return Moments(
            delta_sq=0.0 if fused.delta_sq is None else _total(fused.delta_sq[:rows]) * unit,
            kernel_sq=_total(fused.kernel_sq[:rows]),
            max_abs=float(fused.max_abs.max(initial=0.0)),
            entries=rows * self._cut.columns,
            realised={
                name: Realised(
                    q_dot_d=0.0 if sums.q_dot_d is None else _total(sums.q_dot_d[:rows]) * unit,
                    error_sq=_total(sums.error_sq[:rows]) * unit,
                    unchanged=int(np.sum(sums.unchanged[:rows], dtype=np.int64)),
                )
                for name, sums in fused.realised.items()
            },
        )

    def _project(self, first: int, rows: int, fused: FusedBlock) -> None:
        """Add ``Q^T q`` of a block; compare it with ``Q^T d`` for each matrix all of whose rows are in."""
        shape = self._cut
        projected = {name: sums.projected for name, sums in fused.realised.items()}
        if fused.projected_delta is not None:
            projected[_IDEAL] = fused.projected_delta
        for matrix in range(first // shape.rows, -(-(first + rows) // shape.rows)):
            start, stop = max(first, matrix * shape.rows), min(first + rows, (matrix + 1) * shape.rows)
            seen = self._projections.setdefault(matrix, _Projection(shape))
            for name, values in projected.items():
                if shape.outputs_first:
                    outputs = slice(start - matrix * shape.rows, stop - matrix * shape.rows)
                    seen.add(name, outputs, values[start - first : stop - first].T)
                else:
                    seen.add(name, slice(None), values[matrix - first // shape.rows])
            seen.missing -= stop - start
            if seen.missing == 0:
                self._compare(matrix, self._projections.pop(matrix).sums)

    def _compare(self, matrix: int, projected: dict[str, Array]) -> None:
        ideal = projected.pop(_IDEAL, None)
        has_gain = ideal is not None
        if ideal is None:
            ideal = self._operands.projected_delta(matrix)
            # Without a gain d lies in Q's span, so that nothing of it is lost in the projection.
            self._moments.delta_sq += float(np.sum(np.square(ideal)))
        within = self._operands.basis_within(matrix)
        along = within @ ideal
        along_sq = float(np.sum(np.square(along)))
        for name, values in projected.items():
            realised = within @ values
            self._moments.realised[name].add(
                Realised(
                    q_dot_d=0.0 if has_gain else float(np.sum(values * ideal)),
                    inputs_q_dot_d=float(np.sum(realised * along)),
                    inputs_d_sq=along_sq,
                    inputs_error_sq=float(np.sum(np.square(realised - along))),
                )
            )


_IDEAL = "ideal"


class _Projection:
    """Projections of one matrix on the adapter's inputs, rank by outputs, summed in float64 over the rows seen so far."""

    def __init__(self, shape: Cut) -> None:
        self._outputs = shape.rows if shape.outputs_first else shape.columns
        self.missing = shape.rows
        self.sums: dict[str, Array] = {}

    def add(self, name: str, outputs: slice, values: Array) -> None:
        """Add what some rows make of some outputs."""
        self.sums.setdefault(name, np.zeros((len(values), self._outputs)))[:, outputs] += values


class _Operands:
    """The contributions to a kernel as its blocks take them, see `numerics.Block`."""

    def __init__(self, shape: Cut, a: Array, b: Array, basis: Array, r: Array, gain: Array | None) -> None:
        self._shape = shape
        rank = a.shape[-1]
        inputs = shape.columns if shape.outputs_first else shape.rows
        outputs = shape.rows if shape.outputs_first else shape.columns
        a, basis = (values.reshape(shape.matrices, inputs, rank) for values in (a, basis))
        b = b.reshape(shape.matrices, rank, outputs)
        left, right = (b.transpose(0, 2, 1), a.transpose(0, 2, 1)) if shape.outputs_first else (a, b)
        self._left = np.ascontiguousarray(left).reshape(-1, rank)
        self._right = np.ascontiguousarray(right)
        self._basis = basis if shape.outputs_first else basis.reshape(-1, rank)
        self._gain = None if gain is None else gain.reshape(-1 if shape.outputs_first else (shape.matrices, outputs))
        self._inputs = inputs
        self._b, self._r = b, r.reshape(shape.matrices, rank, rank)

    def of(self, first: int, rows: int) -> tuple[Array, Array, Array, Array | None]:
        """`left`, `right`, `basis` and `gain` of a block, by its first row and its number of rows."""
        shape = self._shape
        row_part = slice(first, first + rows)
        matrix_part = slice(first // shape.rows, -(-(first + rows) // shape.rows))

        def padded(values: Array) -> Array:
            return _padded(values[row_part], shape.block_rows)

        # A block of several matrices may have fewer of them at the leaf's end: the program is one of as many as in a full one.
        def stacked(values: Array) -> Array:
            return _padded(values[matrix_part], max(1, shape.block_rows // shape.rows))

        gain = self._gain
        if shape.outputs_first:
            return (
                padded(self._left),
                stacked(self._right),
                stacked(self._basis),
                None if gain is None else padded(gain),
            )
        return padded(self._left), stacked(self._right), padded(self._basis), None if gain is None else stacked(gain)

    def projected_delta(self, matrix: int) -> Array:
        """``Q^T d = R B`` of one matrix without forming ``d``; rank by outputs, float64."""
        return np.asarray(self._r[matrix] @ self._b[matrix].astype(np.float64))

    def basis_within(self, matrix: int) -> Array:
        """See `lowrank.basis_within`."""
        return basis_within(self._r[matrix], self._inputs)


class OutputNorms:
    """``|W + delta|`` per output, over the inputs, of one kernel and one site: the first pass of DoRA.

    Args:
        equation: Which dims are batch, inputs and outputs.
        shape: The kernel's shape.
        a: lora_a, dims batch, inputs, rank; float32.
        b: lora_b with the scale in it, dims batch, rank, outputs; float32.
        device: The JAX device to compute on.
    """

    def __init__(self, equation: Equation, shape: Sequence[int], a: Array, b: Array, device: Any) -> None:
        self._cut = cut(equation, shape)
        self._device = device
        self._operands = _Operands(self._cut, a, b, *column_basis(a, len(equation.batch)), None)
        extents = dict(zip(equation.target, shape, strict=True))
        self._shape = tuple(extents[dim] for dim in equation.batch + equation.outputs)
        self._squares = np.zeros(math.prod(self._shape))

    def add(self, region: Region, kernel: Array) -> None:
        """Add one block; sums over blocks are float64."""
        from lora_merge_cli.numerics import output_squares

        shape = self._cut
        first, rows = shape.rows_of(region)
        left, right, _, _ = self._operands.of(first, rows)
        squares = output_squares(
            _padded(kernel.reshape(rows, -1), shape.block_rows),
            left,
            right,
            tile_rows=shape.tile_rows,
            outputs_first=shape.outputs_first,
            device=self._device,
        )
        if shape.outputs_first:
            self._squares[first : first + rows] += squares[:rows]
        else:
            matrix = first // shape.rows
            per_matrix = self._squares.reshape(shape.matrices, -1)[matrix : matrix + len(squares)]
            per_matrix += squares[: len(per_matrix)]

    def finish(self) -> Array:
        """The norms, dims batch, outputs; float64."""
        return np.sqrt(self._squares.reshape(self._shape))


def _padded(values: Array, rows: int) -> Array:
    """The values with rows of zeros behind them, if there are fewer."""
    if len(values) == rows:
        return values
    result = np.zeros((rows, *values.shape[1:]), values.dtype)
    result[: len(values)] = values
    return result


def _delta_unit(a: Array, b: Array, gain: Array | None) -> np.float32:
    """A power of two about the size of the largest product of a factor's entries."""
    largest = float(np.abs(a).max(initial=0)) * float(np.abs(b).max(initial=0))
    if gain is not None:
        largest = max(largest, float(np.abs(gain).max(initial=0)))
    exponent = math.frexp(largest)[1] if largest else 0
    return np.float32(2.0 ** min(max(exponent, -120), 120))


def _spell(region: Region) -> str:
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in region) + "]"


def _total(values: Array) -> float:
    return float(np.sum(values, dtype=np.float64))
