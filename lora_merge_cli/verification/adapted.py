"""One adapter on one kernel as its judge sees it: matrices, gains and the model's own two steps. NumPy, float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_merge_cli.lowrank import delta_singular_values, mean_spectrum
from lora_merge_cli.records import AdapterSite, Array, Region

_EPSILON = 2.0**-24


@dataclass(frozen=True)
class Adapted:
    """One site's part in a kernel: with W_k its own kernel, ``weight * (W_k - W)``."""

    site: AdapterSite
    """The site."""
    lora_a: Array
    """As its equation takes it, float64."""
    lora_b: Array
    """As its equation takes it, float64."""
    weight: float
    """What its change is multiplied by: the adapter's weight, times the whole merge's multiplier."""
    gain: Array | None = None
    """DoRA's ``m / |W + delta|`` per output, float64; None for what has no magnitude."""
    alphas: tuple[float, ...] = (1.0,)
    """What its change is multiplied by besides: one for all layers, or one per stacked layer."""

    @property
    def scale(self) -> float:
        """The site's own."""
        return float(self.site.parameters.scale.value or 0.0)

    @property
    def rank(self) -> int:
        """The extent that the factors share."""
        return int(self.lora_a.shape[self.site.parameters.equation.a.index(self.site.parameters.equation.rank)])

    def alpha_of(self, layer: int) -> float:
        """The alpha of a stacked layer; of the kernel where none are stacked."""
        return self.alphas[layer if len(self.alphas) > 1 else 0]

    @property
    def spectrum(self) -> tuple[float, ...]:
        """Singular values of the product of its factors, scaled, at alpha 1; see `lowrank.mean_spectrum`."""
        equation = self.site.parameters.equation
        values = delta_singular_values(equation, self.lora_a, self.lora_b)
        return mean_spectrum([values], self.scale * self.weight)

    def left(self) -> Array:
        """lora_a, dims batch, inputs, rank."""
        equation = self.site.parameters.equation
        return _arranged(self.lora_a, equation.a, equation.batch + equation.inputs + equation.rank)

    def right(self, *, magnitudes: bool = False) -> Array:
        """All that lora_a is multiplied by, dims batch, rank, outputs: lora_b, its heads summed, scale, weight and gain.

        Args:
            magnitudes: Whether to add up absolute values instead: the size of what is summed.
        """
        equation = self.site.parameters.equation
        summed = tuple(equation.b.index(dim) for dim in equation.summed)
        kept = "".join(dim for dim in equation.b if dim not in equation.summed)
        values = np.abs(self.lora_b) if magnitudes else self.lora_b
        b = _arranged(values.sum(axis=summed), kept, equation.batch + equation.rank + equation.outputs)
        factor = self._weights(self.scale, b.ndim)
        b = b * (np.abs(factor) if magnitudes else factor)
        if self.gain is None:
            return b
        gain = np.abs(self.gain) if magnitudes else self.gain
        return np.asarray(b * np.expand_dims(gain, len(equation.batch)))

    @property
    def rescaling(self) -> Array | None:
        """What the kernel so far is multiplied by besides 1, at alpha 1; dims batch, outputs. None for what has no magnitude."""
        return None if self.gain is None else self.weight * (self.gain - 1.0)

    def at_alphas(self, values: Array) -> Array:
        """`values`, which have the layers first where some are stacked, times `alphas`."""
        return np.asarray(values * np.reshape(self.alphas, (-1, *[1] * (values.ndim - 1))))

    def _weights(self, scale: float, axes: int) -> Array:
        """`weight` and `alphas` times a scale, for an array of so many axes: the layers come first."""
        return np.reshape([scale * self.weight * alpha for alpha in self.alphas], (-1, *[1] * (axes - 1)))

    @property
    def steps(self) -> int:
        """How many roundings a float32 sum of its products may have, a few more than its terms."""
        equation = self.site.parameters.equation
        heads = math.prod(int(self.lora_b.shape[equation.b.index(dim)]) for dim in equation.summed)
        return self.rank + heads

    @property
    def gain_error(self) -> float:
        """The relative error of a gain whose norm was summed in float32 by any sensible order of summation."""
        if self.gain is None:
            return 0.0
        equation = self.site.parameters.equation
        inputs = math.prod(self.lora_a.shape[equation.a.index(dim)] for dim in equation.inputs)
        return (16 + math.sqrt(inputs)) * _EPSILON


class Norms:
    """``|W + delta|`` per output over the inputs, in float64: what DoRA divides by."""

    def __init__(self, site: AdapterSite, shape: tuple[int, ...], factors: Mapping[str, Array]) -> None:
        self._equation = equation = site.parameters.equation
        alone = Adapted(site, factors["lora_a"], factors["lora_b"], 1.0)
        self._left, self._right = alone.left(), alone.right()
        extents = dict(zip(equation.target, shape, strict=True))
        self._squares = np.zeros([extents[dim] for dim in equation.batch + equation.outputs])

    def add(self, region: Region, kernel: Array) -> None:
        """Add a block, which has one index of every batch dim."""
        equation = self._equation
        parts = dict(zip(equation.target, region, strict=True))
        batch = tuple(parts[dim].start for dim in equation.batch)
        inputs = tuple(parts[dim] for dim in equation.inputs)
        outputs = tuple(parts[dim] for dim in equation.outputs)
        left = self._left[(*batch, *inputs)]
        right = self._right[(*batch, slice(None), *outputs)]
        delta = left.reshape(-1, left.shape[-1]) @ right.reshape(right.shape[0], -1)
        order = equation.batch + equation.inputs + equation.outputs
        moved = np.transpose(kernel.astype(np.float64), [equation.target.index(dim) for dim in order])
        changed = moved.reshape(delta.shape) + delta
        squares = np.einsum("io,io->o", changed, changed)
        self._squares[(*batch, *outputs)] += squares.reshape([part.stop - part.start for part in outputs])

    def finish(self) -> Array:
        """Dims batch, outputs."""
        return np.sqrt(self._squares)


def _arranged(values: Array, dims: str, order: Iterable[str]) -> Array:
    return np.ascontiguousarray(np.transpose(values, [dims.index(dim) for dim in order]))
