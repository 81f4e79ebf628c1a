"""One kernel being changed, block by block, by all its adapters at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable
from lora_merge_cli.lowrank import acting, basis_within, column_basis, input_basis
from lora_merge_cli.operations.carries import Carries
from lora_merge_cli.operations.cutting import Cut, cut
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import Array, Region
from lora_merge_cli.rounding import Choice, penalty
from lora_merge_cli.survival import Moments, Realised

if TYPE_CHECKING:
    from lora_merge_cli.numerics import FusedBlock, RealisedSums, StartedBlock


class KernelUpdate:
    """The kernel of all sites with one target.

    Blocks may be computed at the same time, and are taken one after the other.

    Law: the values of a block depend on the leaf's shape, the contributions and the block alone, not on the order in which blocks
    are asked for. Where rounding carries errors on (``preserve``, inputs first) they depend on the blocks of the matrix before it
    too: those must be asked for in their order, each before the next, if by other threads.

    Args:
        where: The kernel as errors name it.
        equation: Which of its dims are batch, inputs and outputs: any site's.
        shape: The kernel's shape.
        contribution: What its sites make of it, one after the other; see `sequence.in_sequence`.
        dtype: What the result is stored in.
        serving_dtype: What a server will cast it to.
        device: The JAX device to compute on.
        choice: Which of two neighbours is stored; None for the nearer one.
        mu: See `Rounding.mu`; to preserve.
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
        choice: Choice | None = None,
        mu: float = 1.0,
    ) -> None:
        self._where = where
        self._cut = cut(equation, shape)
        self._dtype, self._serving_dtype, self._device = dtype, serving_dtype, device
        batch = len(equation.batch)
        a, b = contribution.a, contribution.b
        gain = None if contribution.gain is None else contribution.gain.astype(FLOAT32)
        if gain is None:
            a = acting(a, b, batch)
        self._unit = _delta_unit(a, b, gain)
        self._choice = choice
        preserves = choice is not None and choice.method == "preserve"
        self._operands = _Operands(self._cut, a, b, *column_basis(a, batch), gain, mu if preserves else None)
        self._carries = Carries()
        self._moments = Moments()
        self._projections: dict[int, _Projection] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all blocks were taken."""
        return not self._projections and self._moments.entries == math.prod(self._cut.shape)

    def compute(self, region: Region, kernel: Array, base: Array | None, bits: Array | None = None) -> FusedBlock:
        """Compute one block; keeps nothing but what the next one carries on, so any thread may.

        Args:
            region: Where the block lies in the leaf.
            kernel: The values there that the adapters change, in the stored dtype.
            base: The values to change instead; None to use the kernel's.
            bits: 16 random bits for each entry, one after the other; None if it takes none.
        """
        try:
            return self._started(region, kernel, base, bits).finish()
        except BaseException:
            self.give_up(region)
            raise

    def give_up(self, region: Region) -> None:
        """Say that a block will not be computed: none that follows it waits for what it would have carried on."""
        behind = sum(self._cut.rows_of(region))
        if self._carries_on and behind % self._cut.rows:
            self._carries.give_up(behind)

    @property
    def _carries_on(self) -> bool:
        return self._operands.preserves and not self._cut.outputs_first

    def _started(self, region: Region, kernel: Array, base: Array | None, bits: Array | None) -> StartedBlock:
        from lora_merge_cli.numerics import Block, start_block

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
            **self._operands.inputs_of(first, rows),
            bits=None if bits is None else _padded(bits.reshape(rows, -1), shape.block_rows),
        )
        if self._carries_on:
            begins = first % shape.rows == 0
            block = dataclasses.replace(block, carry=self._operands.no_carry() if begins else self._carries.take(first))
        started = start_block(
            block,
            tile_rows=shape.tile_rows,
            outputs_first=shape.outputs_first,
            dtype=self._dtype.name,
            serving_dtype=self._serving_dtype.name,
            device=self._device,
            choice=self._choice,
        )
        if self._carries_on and (first + rows) % shape.rows:
            # As soon as this one is started: the device knows to wait.
            self._carries.put(first + rows, started.carry)
        return started

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
        if not self.is_complete:
            raise RuntimeError(f"{self._where}: not every block was computed")
        return self._moments

    def _sums(self, fused: FusedBlock, rows: int) -> Moments:
        unit = float(self._unit) ** 2

        def realised(sums: RealisedSums) -> Realised:
            return Realised(
                q_dot_d=0.0 if sums.q_dot_d is None else _total(sums.q_dot_d[:rows]) * unit,
                error_sq=_total(sums.error_sq[:rows]) * unit,
                unchanged=int(np.sum(sums.unchanged[:rows], dtype=np.int64)),
            )

        return Moments(
            delta_sq=0.0 if fused.delta_sq is None else _total(fused.delta_sq[:rows]) * unit,
            kernel_sq=_total(fused.kernel_sq[:rows]),
            max_abs=float(fused.max_abs.max(initial=0.0)),
            entries=rows * self._cut.columns,
            realised={name: realised(sums) for name, sums in fused.realised.items()},
            nearest=None if fused.nearest is None else realised(fused.nearest),
            moved=0 if fused.moved is None else int(np.sum(fused.moved[:rows], dtype=np.int64)),
        )

    def _project(self, first: int, rows: int, fused: FusedBlock) -> None:
        """Add ``Q^T q`` of a block; compare it with ``Q^T d`` for each matrix all of whose rows are in."""
        shape = self._cut
        projected = {name: sums.projected for name, sums in fused.realised.items()}
        if fused.nearest is not None:
            projected[_NEAREST] = fused.nearest.projected
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
        self._moments.add(Moments(rank=int(np.count_nonzero(within.any(axis=1))), inputs=self._operands.inputs))
        along = within @ ideal
        along_sq = float(np.sum(np.square(along)))
        for name, values in projected.items():
            realised = within @ values
            sums = self._moments.nearest if name == _NEAREST else self._moments.realised[name]
            assert sums is not None, "it was measured with the block"
            sums.add(
                Realised(
                    q_dot_d=0.0 if has_gain else float(np.sum(values * ideal)),
                    inputs_q_dot_d=float(np.sum(realised * along)),
                    inputs_d_sq=along_sq,
                    inputs_error_sq=float(np.sum(np.square(realised - along))),
                )
            )


_IDEAL, _NEAREST = "ideal", "to nearest"


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

    def __init__(
        self, shape: Cut, a: Array, b: Array, basis: Array, r: Array, gain: Array | None, mu: float | None = None
    ) -> None:
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
        self.inputs = inputs
        self._b, self._r = b, r.reshape(shape.matrices, rank, rank)
        self._span: Array | None = None
        self.preserves = mu is not None
        if mu is not None:
            span = input_basis(a, 1)
            # What the adapter does not look at is to nearest; roundings of a zero would be something to look at.
            span[~a.any(axis=-1)] = 0
            ranks = np.count_nonzero(span.any(axis=1), axis=-1)
            weights = np.array([penalty(mu, int(each), inputs) for each in ranks])
            self._penalties = np.minimum(weights, np.finfo(np.float32).max).astype(np.float32)
            self._span = span if shape.outputs_first else span.reshape(-1, rank)

    def of(self, first: int, rows: int) -> tuple[Array, Array, Array, Array | None]:
        """`left`, `right`, `basis` and `gain` of a block, by its first row and its number of rows."""
        gain = self._gain
        if self._shape.outputs_first:
            return (
                self._per_row(self._left, first, rows),
                self._per_matrix(self._right, first, rows),
                self._per_matrix(self._basis, first, rows),
                None if gain is None else self._per_row(gain, first, rows),
            )
        return (
            self._per_row(self._left, first, rows),
            self._per_matrix(self._right, first, rows),
            self._per_row(self._basis, first, rows),
            None if gain is None else self._per_matrix(gain, first, rows),
        )

    def inputs_of(self, first: int, rows: int) -> dict[str, Array]:
        """`inputs` and `penalty` of a block; nothing if nothing is to be preserved."""
        if self._span is None:
            return {}
        cut = self._per_matrix if self._shape.outputs_first else self._per_row
        return {
            "inputs": cut(self._span, first, rows),
            "penalty": self._per_matrix(self._penalties, first, rows),
        }

    def no_carry(self) -> Array:
        """What the first block of a matrix starts from."""
        return np.zeros((self._b.shape[1], self._shape.columns), np.float32)

    def _per_row(self, values: Array, first: int, rows: int) -> Array:
        return _padded(values[first : first + rows], self._shape.block_rows)

    def _per_matrix(self, values: Array, first: int, rows: int) -> Array:
        # A block of several matrices may have fewer of them at the leaf's end: the program is one of as many as in a full one.
        shape = self._shape
        part = values[first // shape.rows : -(-(first + rows) // shape.rows)]
        return _padded(part, max(1, shape.block_rows // shape.rows))

    def projected_delta(self, matrix: int) -> Array:
        """``Q^T d = R B`` of one matrix without forming ``d``; rank by outputs, float64."""
        return np.asarray(self._r[matrix] @ self._b[matrix].astype(np.float64))

    def basis_within(self, matrix: int) -> Array:
        """See `lowrank.basis_within`."""
        return basis_within(self._r[matrix], self.inputs)


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
