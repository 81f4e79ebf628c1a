"""One kernel being changed, tile by tile, by all its adapters at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable
from lora_merge_cli.lowrank import input_basis
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import Array, Region, region_shape
from lora_merge_cli.survival import Moments, Realised

if TYPE_CHECKING:
    from lora_merge_cli.numerics import FusedTile, Operands

_TILE_ENTRIES = 2**19
_TILE_COLUMNS = 2048
_ALIGNMENT = 128


def tile_of(equations: Sequence[Equation], shape: Sequence[int]) -> tuple[int, ...]:
    """The extents that a kernel is computed in: a function of its shape and the kind of its sites alone.

    One index of every batch dim, at most 2048 columns, some half a million entries.
    """
    batch = {axis for equation in equations for axis, dim in enumerate(equation.target) if dim in equation.batch}
    tile = [1 if axis in batch else n for axis, n in enumerate(shape)]
    tile[-1] = _even_part(tile[-1], _TILE_COLUMNS)
    for axis, extent in enumerate(tile[:-1]):
        excess = -(-math.prod(tile) // _TILE_ENTRIES)
        if excess > 1:
            tile[axis] = max(1, extent // excess)
    return tuple(tile)


class KernelUpdate:
    """The kernel of all sites with one target.

    A tile has one index of every batch dim, so it is a matrix: inputs by outputs, or the other way round where the trainer stores
    it so. One compiled function then serves every kind of site.

    Law: the values of a tile depend on the leaf's shape, the contributions and the tile alone, not on the order or the grouping
    in which tiles are asked for.

    Args:
        where: The kernel as errors name it.
        equation: Which of its dims are batch, inputs and outputs: any site's.
        shape: The kernel's shape.
        contributions: What each site adds.
        dtype: What the result is stored in.
        serving_dtype: What a server will cast it to.
        device: The JAX device to compute on.
    """

    def __init__(
        self,
        where: str,
        equation: Equation,
        shape: tuple[int, ...],
        contributions: Sequence[Contribution],
        dtype: np.dtype[Any],
        serving_dtype: np.dtype[Any],
        device: Any,
    ) -> None:
        self._where = where
        self._equation = equation
        self._shape = shape
        self._dtype = dtype
        self._serving_dtype = serving_dtype
        self._device = device
        batch, inputs = equation.batch, equation.inputs
        self._outputs_first = outputs_first(equation)
        self._a = np.concatenate([part.a for part in contributions], axis=-1)
        self._b = np.concatenate([part.b for part in contributions], axis=len(batch))
        gains = [part.gain for part in contributions if part.gain is not None]
        self._gain = sum(gains[1:], gains[0]).astype(FLOAT32) if gains else None
        self._basis = input_basis(self._a, len(batch))
        self._unit = _delta_unit(self._a, self._b, self._gain)
        self._stacked = equation.stacked
        self._layers = tuple(Moments() for _ in range(shape[0] if self._stacked else 1))
        self._projections: dict[tuple[int, ...], _Projection] = {}
        self._middles: dict[tuple[int, ...], Array] = {}
        self._input_entries = math.prod(self._a.shape[len(batch) : len(batch) + len(inputs)])

    def step(self, region: Region, kernel: Array, base: Array | None) -> PendingTile:
        """Start computing one tile.

        Args:
            region: Where the tile lies in the leaf.
            kernel: The values there that the adapters change, in the stored dtype.
            base: The values to change instead, float32; None to use the kernel's.
        """
        from lora_merge_cli.numerics import fuse_tile

        batch, inputs, outputs = split(self._equation, region)
        operands = self._operands(batch, inputs, outputs)
        rows, columns = (_entries(inputs), _entries(outputs))
        matrix = (columns, rows) if self._outputs_first else (rows, columns)
        tile = fuse_tile(
            kernel.reshape(matrix),
            None if base is None else base.reshape(matrix),
            operands,
            self._unit,
            outputs_first=self._outputs_first,
            dtype=self._dtype.name,
            serving_dtype=self._serving_dtype.name,
            device=self._device,
        )
        return PendingTile(self, region, kernel, tile)

    def finish(self) -> tuple[Moments, ...]:
        """The sums per layer; one entry for a leaf that stacks no layers.

        Raises:
            RuntimeError: Some tile was never asked for.
        """
        if self._projections or sum(m.entries for m in self._layers) != math.prod(self._shape):
            raise RuntimeError(f"{self._where}: not every tile was computed")
        return self._layers

    def take(self, region: Region, kernel: Array, tile: FusedTile) -> Array:
        """Check a finished tile, add its sums, and return its values.

        Raises:
            NonFiniteInput: The kernel has a NaN or Inf there.
            Unrepresentable: A finite result is not finite in the stored dtype.
        """
        # Sums that are finite have finite terms; the others need a look at the values themselves.
        if not np.isfinite(tile.kernel_sq).all() and not np.isfinite(kernel).all():
            raise NonFiniteInput(
                "a kernel under an adapter is not finite",
                where=self._where,
                expected="finite values",
                found=f"NaN or Inf in {_spell(region)}",
            )
        stored = tile.realised[self._dtype.name]
        if not np.isfinite(stored.error_sq).all() and not np.isfinite(tile.values).all():
            raise Unrepresentable(
                f"the merged kernel overflows {self._dtype.name}",
                where=self._where,
                found=f"a result beyond its range in {_spell(region)}",
                hint="use --dtype float32 or bfloat16",
            )
        layer = self._layers[region[0].start if self._stacked else 0]
        unit = float(self._unit) ** 2
        layer.add(
            Moments(
                delta_sq=_total(tile.delta_sq) * unit,
                kernel_sq=_total(tile.kernel_sq),
                max_abs=float(tile.max_abs),
                entries=tile.values.size,
                realised={
                    name: Realised(
                        q_dot_d=_total(sums.q_dot_d) * unit,
                        error_sq=_total(sums.error_sq) * unit,
                        unchanged=int(np.sum(sums.unchanged, dtype=np.int64)),
                    )
                    for name, sums in tile.realised.items()
                },
            )
        )
        self._project(region, tile, layer)
        return np.asarray(tile.values).reshape(region_shape(region))

    def _operands(self, batch: Any, inputs: Any, outputs: Any) -> Operands:
        from lora_merge_cli.numerics import Operands

        a = self._a[(*batch, *inputs)]
        a = a.reshape(-1, a.shape[-1])
        return Operands.on_device(
            a,
            self._b_matrix(batch, outputs),
            self._basis[(*batch, *inputs)].reshape(a.shape),
            None if self._gain is None else self._gain[(*batch, *outputs)].reshape(-1),
            outputs_first=self._outputs_first,
            device=self._device,
        )

    def _project(self, region: Region, tile: FusedTile, layer: Moments) -> None:
        """Add ``U^T q`` of a tile; once all inputs of its outputs are in, compare it with ``U^T d``."""
        batch, inputs, outputs = split(self._equation, region)
        key = (*batch, *(part.start for part in outputs))
        projection = self._projections.setdefault(key, _Projection())
        projection.covered += math.prod(region_shape(inputs))
        for name, sums in tile.realised.items():
            seen = projection.realised.get(name)
            values = self._rank_first(sums.projected)
            projection.realised[name] = values if seen is None else seen + values
        if tile.projected_delta is not None:
            projection.ideal = projection.ideal + self._rank_first(tile.projected_delta)
        if projection.covered < self._input_entries:
            return
        del self._projections[key]
        ideal = projection.ideal if self._gain is not None else self._ideal_projection(batch, outputs)
        for name, values in projection.realised.items():
            layer.realised[name].add(
                Realised(
                    inputs_q_dot_d=float(np.sum(values * ideal)),
                    inputs_d_sq=float(np.sum(np.square(ideal))),
                    inputs_error_sq=float(np.sum(np.square(values - ideal))),
                )
            )

    def _rank_first(self, projected: Array) -> Array:
        return (projected.T if self._outputs_first else projected).astype(np.float64)

    def _ideal_projection(self, batch: Any, outputs: Any) -> Array:
        """``U^T d = (U^T A) B`` without forming ``d``, in float64."""
        if batch not in self._middles:
            a = self._a[batch].reshape(self._input_entries, -1).astype(np.float64)
            basis = self._basis[batch].reshape(self._input_entries, -1).astype(np.float64)
            self._middles[batch] = basis.T @ a
        return np.asarray(self._middles[batch] @ self._b_matrix(batch, outputs).astype(np.float64))

    def _b_matrix(self, batch: Any, outputs: Any) -> Array:
        b = self._b[(*batch, slice(None), *outputs)]
        return b.reshape(b.shape[0], -1)


@dataclass
class PendingTile:
    """A tile on its way."""

    update: KernelUpdate
    region: Region
    kernel: Array
    tile: FusedTile

    def result(self) -> Array:
        """Wait for the tile; see `KernelUpdate.take`."""
        return self.update.take(self.region, self.kernel, self.tile.to_host())


class _Projection:
    """``U^T q`` of some columns, summed over the tiles seen so far."""

    def __init__(self) -> None:
        self.covered = 0
        self.ideal: Any = 0.0
        self.realised: dict[str, Array] = {}


def _even_part(extent: int, limit: int) -> int:
    """The size of the fewest equal parts of at most `limit`, rounded up to an aligned size."""
    if extent <= limit:
        return extent
    parts = -(-extent // limit)
    even = -(-extent // parts)
    return min(-(-even // _ALIGNMENT) * _ALIGNMENT, limit)


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
        self._equation = equation
        self._a, self._b, self._device = a, b, device
        extents = dict(zip(equation.target, shape, strict=True))
        self._squares = np.zeros([extents[dim] for dim in equation.batch + equation.outputs])

    def add(self, region: Region, kernel: Array) -> None:
        """Add one tile; sums over tiles are float64."""
        from lora_merge_cli.numerics import output_squares

        batch, inputs, outputs = split(self._equation, region)
        a = self._a[(*batch, *inputs)]
        a = a.reshape(-1, a.shape[-1])
        b = self._b[(*batch, slice(None), *outputs)]
        b = b.reshape(b.shape[0], -1)
        flipped = outputs_first(self._equation)
        matrix = kernel.reshape((b.shape[1], a.shape[0]) if flipped else (a.shape[0], b.shape[1]))
        squares = output_squares(matrix, a, b, outputs_first=flipped, device=self._device)
        self._squares[(*batch, *outputs)] += squares.reshape([part.stop - part.start for part in outputs])

    def finish(self) -> Array:
        """The norms, dims batch, outputs; float64."""
        return np.sqrt(self._squares)


def outputs_first(equation: Equation) -> bool:
    """Whether the kernel is stored as outputs by inputs."""
    return bool(equation.inputs) and equation.target.endswith(equation.inputs) and bool(equation.outputs)


def split(equation: Equation, region: Region) -> tuple[Any, Any, Any]:
    """A region's index in the batch dims, and its slices of the inputs and of the outputs."""
    parts = dict(zip(equation.target, region, strict=True))
    return (
        tuple(parts[dim].start for dim in equation.batch),
        tuple(parts[dim] for dim in equation.inputs),
        tuple(parts[dim] for dim in equation.outputs),
    )


def _delta_unit(a: Array, b: Array, gain: Array | None) -> np.float32:
    """A power of two about the size of the largest product of a factor's entries."""
    largest = float(np.abs(a).max(initial=0)) * float(np.abs(b).max(initial=0))
    if gain is not None:
        largest = max(largest, float(np.abs(gain).max(initial=0)))
    exponent = math.frexp(largest)[1] if largest else 0
    return np.float32(2.0 ** min(max(exponent, -120), 120))


def _entries(parts: Sequence[slice]) -> int:
    return math.prod(part.stop - part.start for part in parts)


def _spell(region: Region) -> str:
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in region) + "]"


def _total(values: Array) -> float:
    return float(np.sum(values, dtype=np.float64))
