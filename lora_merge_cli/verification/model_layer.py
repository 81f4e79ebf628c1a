"""A site as the model runs it, for a few random inputs: kernel and adapter beside the merged kernel. NumPy, float64.

Nothing here knows how a merge fuses; the einsums are the dialect's `Forward`, which are the trainer's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_merge_cli.records import Array, Forward, Region
from lora_merge_cli.verification.adapted import Adapted

INPUTS = 8
"""How many inputs go through each layer; half of them are mixtures of lora_a's columns."""


@dataclass(frozen=True)
class LayerError:
    """How far the merged kernel is from kernel and adapter, over all inputs."""

    error: float | None
    """``|y' - y| / |y - x w|``: the root mean square over inputs. None where the adapter contributes nothing, Inf where an
    output is not finite."""
    share: float
    """The largest error of an output as a share of what the bounds of the kernel's entries allow."""
    served: float | None
    """``|y' - y| / |y - x w|`` with both kernels cast to the serving dtype."""


@dataclass(frozen=True)
class LayerAdapter:
    """One adapter in one layer, as the trainer runs it: of the output y so far ``gain * (y + scale * up(down(x)))``."""

    forward: Forward
    """What the model computes."""
    lora_a: Array
    """One layer of it, float64."""
    lora_b: Array
    """One layer of it, float64."""
    scale: float
    """What the adapter's output is multiplied by."""
    weight: float
    """What the adapter's whole change is multiplied by."""
    gain: Array | None = None
    """DoRA's magnitude over norm, per output; None for what has none."""
    outputs: str = ""
    """The dims of `gain`, as the forward names them."""

    @staticmethod
    def of(adapted: Adapted, layer: int | None) -> LayerAdapter:
        """An adapter's part in one stacked layer; None where none are stacked."""
        a, b = adapted.lora_a, adapted.lora_b
        return LayerAdapter(
            adapted.site.forward,
            a if layer is None else a[layer],
            b if layer is None else b[layer],
            adapted.scale,
            adapted.weight,
            adapted.gain if layer is None or adapted.gain is None else adapted.gain[layer],
            adapted.site.parameters.equation.outputs,
        )

    def low_rank(self, inputs: Array) -> Array:
        """The adapter's own branch, in two steps."""
        down = np.einsum(self.forward.down, inputs, self.lora_a, optimize=True)
        return np.asarray(self._gained(self.scale * np.einsum(self.forward.up, down, self.lora_b, optimize=True)))

    def after(self, output: Array, low_rank: Array) -> Array:
        """What the adapter makes of the layer's output so far."""
        if self.gain is None:
            return np.asarray(output + self.weight * low_rank)
        return np.asarray(output + self.weight * (self._gained(output) + low_rank - output))

    def _gained(self, values: Array) -> Array:
        if self.gain is None:
            return values
        output = self.forward.base.split("->")[1]
        return np.asarray(np.einsum(f"{output},{self.outputs}->{output}", values, self.gain))


class ModelLayer:
    """One layer with its inputs; takes the kernel piece by piece, since it is linear in it.

    Args:
        adapters: The adapters in it, in their order.
        shape: The kernel's extents in one layer.
        rng: Where the inputs come from.
        alpha: How much of what they change is taken.
    """

    def __init__(
        self, adapters: Sequence[LayerAdapter], shape: tuple[int, ...], rng: np.random.Generator, alpha: float = 1.0
    ) -> None:
        self._adapters, self._alpha = adapters, alpha
        forward = adapters[0].forward
        operands, self._output = forward.base.split("->")
        self._input, self._kernel = operands.split(",")
        self._shared = "".join(dim for dim in self._kernel if dim in self._input and dim in self._output)
        self._contracted = "".join(dim for dim in self._kernel if dim in self._input and dim not in self._output)
        self._free = "".join(dim for dim in self._kernel if dim not in self._input)
        self._given = "".join(dim for dim in self._input if dim not in self._kernel)
        sizes = dict(zip(self._kernel, shape, strict=True))
        self._inputs = layer_inputs(forward, self._input, sizes, adapters[0].lora_a, rng)
        self._magnitudes = np.abs(self._inputs)
        self._low_rank = [adapter.low_rank(self._inputs) for adapter in adapters]
        empty = self._low_rank[0].shape
        self._base = np.zeros(empty)
        self._merged = np.zeros(empty)
        self._served = np.zeros(empty)
        self._limit = np.zeros(empty)

    def take(self, region: Region, kernel: Array, merged: Array, limit: Array, *, served: Array | None) -> LayerPart:
        """What one piece of the kernel contributes; nothing is kept, so pieces may be computed at the same time.

        Args:
            region: Where the piece lies in the layer's kernel.
            kernel: The kernel that the adapter is added to there, float64.
            merged: The merged kernel there.
            limit: The bound of each entry's error.
            served: The difference of the two once both are cast to the serving dtype; None where that casts neither.
        """
        parts = dict(zip(self._kernel, region, strict=True))
        x, magnitudes = (
            self._matrices(
                values[tuple(parts.get(dim, slice(None)) for dim in self._input)],
                self._input,
                self._given,
                self._contracted,
            )
            for values in (self._inputs, self._magnitudes)
        )
        extents = dict(zip(self._input, self._inputs.shape, strict=True)) | dict(
            zip(self._kernel, kernel.shape, strict=True)
        )
        order = self._shared + self._given + self._free

        def product(rows: Array, values: Array) -> Array:
            found = rows @ self._matrices(values, self._kernel, self._contracted, self._free)
            ordered = found.reshape([extents[dim] for dim in order])
            return np.transpose(ordered, [order.index(dim) for dim in self._output])

        base, whole = product(x, kernel), product(x, merged)
        return LayerPart(
            where=tuple(parts.get(dim, slice(None)) for dim in self._output),
            base=base,
            merged=whole,
            served=whole - base if served is None else product(x, served),
            limit=product(magnitudes, limit),
        )

    def _matrices(self, values: Array, dims: str, rows: str, columns: str) -> Array:
        """A matrix for each index of the dims that input, kernel and output share: BLAS multiplies those."""
        moved = np.transpose(values, [dims.index(dim) for dim in self._shared + rows + columns])
        shared, height = len(self._shared), len(self._shared + rows)
        extents = moved.shape[:shared], moved.shape[shared:height], moved.shape[height:]
        return moved.reshape([math.prod(part) for part in extents])

    def add(self, part: LayerPart) -> None:
        """Add what a piece contributes."""
        self._base[part.where] += part.base
        self._merged[part.where] += part.merged
        self._served[part.where] += part.served
        self._limit[part.where] += part.limit

    def finish(self) -> LayerError:
        """The errors, once every piece was added."""
        with np.errstate(all="ignore"):
            return self._errors()

    def _errors(self) -> LayerError:
        output = self._base
        for adapter, low_rank in zip(self._adapters, self._low_rank, strict=True):
            output = adapter.after(output, low_rank)
        self._change = self._alpha * (output - self._base)
        error = self._merged - (self._base + self._change)
        share = np.where(error == 0, 0.0, np.abs(error) / self._limit)
        return LayerError(
            self._relative(error),
            float(share.max(initial=0.0)) if np.isfinite(share).all() and np.isfinite(self._limit).all() else math.inf,
            self._relative(self._served - self._change),
        )

    def _relative(self, error: Array) -> float | None:
        """The root mean square over inputs of the error's norm, relative to that of the adapter's output."""
        per_input = self._output.index(_position(self._input))
        axes = tuple(axis for axis in range(error.ndim) if axis != per_input)
        wanted = np.square(self._change).sum(axis=axes)
        if not np.all(wanted > 0):
            return None
        ratio = float(np.sqrt(np.mean(np.square(error).sum(axis=axes) / wanted)))
        return ratio if math.isfinite(ratio) else math.inf


@dataclass(frozen=True)
class LayerPart:
    """What a piece of the kernel contributes to the outputs at `where`."""

    where: Region
    base: Array
    merged: Array
    served: Array
    limit: Array


def _position(dims: str) -> str:
    """The dim of a model's input that numbers the positions of a sequence: the second, after the batch."""
    return dims[1]


def layer_inputs(forward: Forward, dims: str, sizes: dict[str, int], a: Array, rng: np.random.Generator) -> Array:
    """Inputs of norm 1: random ones, then as many random mixtures of lora_a's columns, to which the adapter reacts most.

    Args:
        forward: What the model computes.
        dims: The dims of its input.
        sizes: The extents of the kernel's dims.
        a: One layer of lora_a.
        rng: Where they come from.

    Returns:
        float64, dims as in `dims`: a batch of one sequence of `INPUTS` positions.
    """
    position = _position(dims)
    features = [dim for dim in dims if dim in sizes]
    half = INPUTS // 2
    plain = rng.standard_normal((half, *(sizes[dim] for dim in features)))
    a_dims = forward.down.split("->")[0].split(",")[1]
    others = "".join(dim for dim in a_dims if dim not in features)
    amounts = rng.standard_normal(
        (INPUTS - half, *(n for dim, n in zip(a_dims, a.shape, strict=True) if dim in others))
    )
    joined = "".join(features)
    mixed = np.einsum(f"{a_dims},{position}{others}->{position}{joined}", a, amounts, optimize=True)
    inputs = np.concatenate([plain, mixed])
    norms = np.sqrt(np.square(inputs).sum(axis=tuple(range(1, inputs.ndim)), keepdims=True))
    inputs = inputs / np.where(norms > 0, norms, 1.0)
    order = [dims.index(dim) for dim in (*(d for d in dims if d not in sizes), *features)]
    # One sequence: the batch dim has extent 1.
    return np.transpose(inputs[None], np.argsort(order))
