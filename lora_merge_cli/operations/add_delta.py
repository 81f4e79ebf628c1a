"""Add a low-rank delta to a kernel: ``W + scale * einsum(equation, lora_a, lora_b)`` (arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput, Unrepresentable
from lora_merge_cli.lowrank import input_basis
from lora_merge_cli.records import AdapterSite, Array, Region, region_shape
from lora_merge_cli.survival import Moments, Realised

if TYPE_CHECKING:
    from lora_merge_cli.numerics import FusedTile

_TILE_ENTRIES = 2**19
_TILE_COLUMNS = 2048
_ALIGNMENT = 128


class AddDelta:
    """The additive low-rank operation. It carries nothing from tile to tile but sums for the report."""

    name = "add_delta"

    def tile(self, site: AdapterSite, shape: Sequence[int]) -> tuple[int, ...]:
        """See `Operation.tile`: one index of every batch dim, at most 2048 columns, some half a million entries."""
        batch = site.parameters.equation.batch
        dims = site.parameters.equation.target
        tile = [1 if dim in batch else n for dim, n in zip(dims, shape, strict=True)]
        tile[-1] = _even_part(tile[-1], _TILE_COLUMNS)
        for axis, extent in enumerate(tile[:-1]):
            excess = -(-math.prod(tile) // _TILE_ENTRIES)
            if excess > 1:
                tile[axis] = max(1, extent // excess)
        return tuple(tile)

    def init(
        self,
        site: AdapterSite,
        where: str,
        shape: Sequence[int],
        factors: Mapping[str, Array],
        dtype: np.dtype[Any],
        serving_dtype: np.dtype[Any],
        multiplier: float,
        device: Any,
    ) -> LowRankUpdate:
        """See `Operation.init`."""
        scale = site.parameters.scale.value
        assert scale is not None, "a plan has no site without a scale"
        return LowRankUpdate(
            where,
            site.parameters.equation,
            tuple(shape),
            factors["lora_a"],
            factors["lora_b"],
            np.float32(scale * multiplier),
            dtype,
            serving_dtype,
            device,
        )


class LowRankUpdate:
    """One kernel being fused. See `Update`.

    A tile has one index of every batch dim, so it is a matrix: inputs by outputs, or the other way round where the trainer stores
    it so. One compiled function then serves every kind of site.
    """

    def __init__(
        self,
        where: str,
        equation: Equation,
        shape: tuple[int, ...],
        lora_a: Array,
        lora_b: Array,
        scale: np.float32,
        dtype: np.dtype[Any],
        serving_dtype: np.dtype[Any],
        device: Any,
    ) -> None:
        self._where = where
        self._equation = equation
        self._shape = shape
        self._scale = scale
        self._dtype = dtype
        self._serving_dtype = serving_dtype
        self._device = device
        batch, inputs, outputs, rank = (
            equation.batch,
            equation.inputs,
            equation.outputs,
            equation.rank,
        )
        self._outputs_first = equation.target.endswith(inputs) and not equation.target.endswith(outputs)
        self._a = _arranged(lora_a.astype(FLOAT32), equation.a, batch + inputs + rank)
        summed = tuple(equation.b.index(dim) for dim in equation.summed)
        b = lora_b.astype(FLOAT32).sum(axis=summed, dtype=FLOAT32)
        self._b = _arranged(b, "".join(dim for dim in equation.b if dim not in equation.summed), batch + rank + outputs)
        self._basis = input_basis(self._a, len(batch))
        self._unit = _delta_unit(scale, self._a, self._b)
        self._stacked = equation.stacked
        self._layers = tuple(Moments() for _ in range(shape[0] if self._stacked else 1))
        self._projections: dict[tuple[int, ...], _Projection] = {}
        self._input_entries = math.prod(self._a.shape[len(batch) : -1])

    def step(self, region: Region, kernel: Array, base: Array | None) -> PendingTile:
        """See `Update.step`."""
        from lora_merge_cli.numerics import fuse_tile

        batch, inputs, outputs = self._split(region)
        a = self._a[(*batch, *inputs)]
        a = a.reshape(-1, a.shape[-1])
        b = self._b_matrix(batch, outputs)
        basis = self._basis[(*batch, *inputs)].reshape(a.shape)
        matrix = (b.shape[1], a.shape[0]) if self._outputs_first else (a.shape[0], b.shape[1])
        tile = fuse_tile(
            kernel.reshape(matrix),
            None if base is None else base.reshape(matrix),
            a,
            b,
            basis,
            self._scale,
            self._unit,
            outputs_first=self._outputs_first,
            dtype=self._dtype.name,
            serving_dtype=self._serving_dtype.name,
            device=self._device,
        )
        return PendingTile(self, region, tile)

    def finish(self) -> tuple[Moments, ...]:
        """See `Update.finish`."""
        if self._projections or sum(m.entries for m in self._layers) != math.prod(self._shape):
            raise RuntimeError(f"{self._where}: not every tile was computed")
        return self._layers

    def take(self, region: Region, tile: FusedTile) -> Array:
        """Check a finished tile, add its sums, and return its values."""
        if not bool(tile.kernel_finite):
            raise NonFiniteInput(
                "a kernel under an adapter is not finite",
                where=self._where,
                expected="finite values",
                found=f"NaN or Inf in {_spell(region)}",
            )
        if not bool(tile.finite):
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

    def _split(self, region: Region) -> tuple[Any, Any, Any]:
        """A tile's index in the batch dims, and its slices of the inputs and of the outputs."""
        parts = dict(zip(self._equation.target, region, strict=True))
        return (
            tuple(parts[dim].start for dim in self._equation.batch),
            tuple(parts[dim] for dim in self._equation.inputs),
            tuple(parts[dim] for dim in self._equation.outputs),
        )

    def _project(self, region: Region, tile: FusedTile, layer: Moments) -> None:
        """Add ``U^T q`` of a tile; once all inputs of its outputs are in, compare it with ``U^T d``."""
        batch, inputs, outputs = self._split(region)
        key = (*batch, *(part.start for part in outputs))
        projection = self._projections.setdefault(key, _Projection())
        projection.covered += math.prod(region_shape(inputs))
        for name, sums in tile.realised.items():
            seen = projection.realised.get(name)
            values = sums.projected.astype(np.float64)
            projection.realised[name] = values if seen is None else seen + values
        if projection.covered < self._input_entries:
            return
        del self._projections[key]
        ideal = self._ideal_projection(batch, outputs)
        for name, values in projection.realised.items():
            layer.realised[name].add(
                Realised(
                    inputs_q_dot_d=float(np.sum(values * ideal)),
                    inputs_d_sq=float(np.sum(np.square(ideal))),
                    inputs_error_sq=float(np.sum(np.square(values - ideal))),
                )
            )

    def _ideal_projection(self, batch: Any, outputs: Any) -> Array:
        """``U^T d = scale * (U^T A) B`` without forming ``d``, in float64."""
        a = self._a[batch].reshape(self._input_entries, -1).astype(np.float64)
        basis = self._basis[batch].reshape(self._input_entries, -1).astype(np.float64)
        b = self._b_matrix(batch, outputs).astype(np.float64)
        return np.asarray(np.float64(self._scale) * ((basis.T @ a) @ b))

    def _b_matrix(self, batch: Any, outputs: Any) -> Array:
        b = self._b[(*batch, slice(None), *outputs)]
        return b.reshape(b.shape[0], -1)


@dataclass
class PendingTile:
    """See `Pending`."""

    update: LowRankUpdate
    region: Region
    tile: FusedTile

    def result(self) -> Array:
        """See `Pending.result`."""
        return self.update.take(self.region, self.tile.to_host())


class _Projection:
    """``U^T q`` of some columns, summed over the tiles seen so far."""

    def __init__(self) -> None:
        self.covered = 0
        self.realised: dict[str, Array] = {}


def _even_part(extent: int, limit: int) -> int:
    """The size of the fewest equal parts of at most `limit`, rounded up to an aligned size."""
    if extent <= limit:
        return extent
    parts = -(-extent // limit)
    even = -(-extent // parts)
    return min(-(-even // _ALIGNMENT) * _ALIGNMENT, limit)


def _delta_unit(scale: np.float32, a: Array, b: Array) -> np.float32:
    """A power of two about the size of the largest product of a factor's entries."""
    largest = abs(float(scale)) * float(np.abs(a).max(initial=0)) * float(np.abs(b).max(initial=0))
    exponent = math.frexp(largest)[1] if largest else 0
    return np.float32(2.0 ** min(max(exponent, -120), 120))


def _arranged(values: Array, dims: str, order: str) -> Array:
    return np.ascontiguousarray(np.transpose(values, [dims.index(dim) for dim in order]))


def _spell(region: Region) -> str:
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in region) + "]"


def _total(values: Array) -> float:
    return float(np.sum(values, dtype=np.float64))
