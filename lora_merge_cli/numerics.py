"""The float32 kernels, jitted: what runs on the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.records import Array

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class RealisedSums:
    """Per row of a tile, for one dtype, in squared units of `fuse_tile`; see `survival.Realised`."""

    q_dot_d: Any
    error_sq: Any
    unchanged: Any
    projected: Any
    """``U^T q``, rank by outputs; outputs by rank if the kernel is outputs first."""


@dataclass(frozen=True)
class FusedTile:
    """A fused tile and the sums over its last axis. JAX arrays, or NumPy ones once on the host."""

    values: Any
    delta_sq: Any
    """In squared units of `fuse_tile`."""
    kernel_sq: Any
    max_abs: Any
    realised: dict[str, RealisedSums]
    projected_delta: Any = None
    """``U^T d``, as `RealisedSums.projected`, where the delta is more than its factors."""

    def to_host(self) -> FusedTile:
        """The same as NumPy arrays, once the device is done."""
        return jax.device_get(self)  # type: ignore[no-any-return]


jax.tree_util.register_dataclass(RealisedSums, ["q_dot_d", "error_sq", "unchanged", "projected"], [])
jax.tree_util.register_dataclass(
    FusedTile,
    ["values", "delta_sq", "kernel_sq", "max_abs", "realised", "projected_delta"],
    [],
)


def fuse_tile(
    kernel: Array,
    base: Array | None,
    operands: Operands,
    unit: np.float32,
    *,
    outputs_first: bool,
    dtype: str,
    serving_dtype: str,
    device: Any,
) -> FusedTile:
    """``(1 + gain) * (base or kernel) + a @ b`` of one tile, in float32, rounded once to `dtype`.

    Args:
        kernel: The tile of the kernel that the checkpoint holds, inputs by outputs, any floating dtype.
        base: The tile to add the delta to instead of `kernel`.
        operands: The adapters' parts.
        unit: About the size of the delta. Squares are summed in squared units, so that float32 neither overflows nor loses them.
        outputs_first: Whether `kernel` and `base` are outputs by inputs instead, and `operands` are arranged for that.
        dtype: The name of the dtype to round to.
        serving_dtype: The name of the dtype that a server will cast to; survival is measured for both.
        device: The JAX device to compute on.
    """
    tile, added_to, size = jax.device_put((kernel, base, unit), device)
    return _fuse(outputs_first, dtype, serving_dtype, tile, added_to, operands, size)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Operands:
    """The adapters' parts in one tile, on the device. Products then are plain ones, whatever the kernel's orientation."""

    left: Any
    """Inputs by rank, times `right`; outputs by rank if the kernel is outputs first. float32."""
    right: Any
    """Rank by outputs; rank by inputs if the kernel is outputs first. float32."""
    basis: Any
    """The tile's rows of an orthonormal basis of lora_a's columns: inputs by rank. float32."""
    gain: Any = None
    """What `kernel` or `base` is multiplied by besides 1, per output; None for 0. float32."""

    @staticmethod
    def on_device(
        a: Array, b: Array, basis: Array, gain: Array | None, *, outputs_first: bool, device: Any
    ) -> Operands:
        """The operands of a tile.

        Args:
            a: lora_a's part, inputs by rank.
            b: lora_b's part, rank by outputs, scaled, already summed where the model sums it alone.
            basis: See `Operands.basis`.
            gain: See `Operands.gain`.
            outputs_first: Whether the kernel is outputs by inputs.
            device: The JAX device to compute on.
        """
        left, right = (b.T, a.T) if outputs_first else (a, b)
        arrays = (np.ascontiguousarray(left), np.ascontiguousarray(right), np.ascontiguousarray(basis), gain)
        return Operands(*jax.device_put(arrays, device))


jax.tree_util.register_dataclass(Operands, ["left", "right", "basis", "gain"], [])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fuse(
    outputs_first: bool, dtype: str, serving_dtype: str, kernel: Any, base: Any, operands: Operands, unit: Any
) -> FusedTile:
    stored_kernel, kernel = kernel.dtype, kernel.astype(jnp.float32)
    delta = jnp.dot(operands.left, operands.right, precision=_HIGHEST)
    changed = kernel if base is None else base.astype(jnp.float32)
    if operands.gain is None:
        result = changed + delta
    else:
        gain = operands.gain[:, None] if outputs_first else operands.gain[None, :]
        result = (1 + gain) * changed + delta
        delta = gain * changed + delta

    def projected(values: Any) -> Any:
        if outputs_first:
            return jnp.dot(values, operands.basis, precision=_HIGHEST)
        return jnp.dot(operands.basis.T, values, precision=_HIGHEST)

    stored = _rounded(result, dtype)
    per_unit = 1 / unit
    unit_delta = delta * per_unit
    realised = {}
    for name in dict.fromkeys((dtype, serving_dtype)):
        # A server casts what is stored, so the stored values are what it rounds once more.
        served = stored if name == dtype else _rounded(stored, name)
        q = served - (kernel if stored_kernel == dtype_named(name) else _rounded(kernel, name))
        unit_q = q * per_unit
        error = unit_q - unit_delta
        realised[name] = RealisedSums(
            q_dot_d=jnp.sum(unit_q * unit_delta, axis=-1),
            error_sq=jnp.sum(error * error, axis=-1),
            unchanged=jnp.sum(q == 0, axis=-1, dtype=jnp.int32),
            projected=projected(q),
        )
    return FusedTile(
        values=stored.astype(dtype_named(dtype)),
        delta_sq=jnp.sum(unit_delta * unit_delta, axis=-1),
        kernel_sq=jnp.sum(kernel * kernel, axis=-1),
        max_abs=jnp.max(jnp.abs(delta)),
        realised=realised,
        projected_delta=None if operands.gain is None else projected(delta),
    )


def output_squares(kernel: Array, a: Array, b: Array, *, outputs_first: bool, device: Any) -> Array:
    """``|kernel + a @ b|^2`` of one tile over its inputs, per output, summed in float32.

    Args:
        kernel: The tile, inputs by outputs, or outputs by inputs if `outputs_first`; any floating dtype.
        a: lora_a's part, inputs by rank, float32.
        b: lora_b's part, rank by outputs, float32, scaled.
        outputs_first: Whether `kernel` is outputs by inputs.
        device: The JAX device to compute on.
    """
    return np.asarray(_output_squares(outputs_first, *jax.device_put((kernel, a, b), device)))


@functools.partial(jax.jit, static_argnums=0)
def _output_squares(outputs_first: bool, kernel: Any, a: Any, b: Any) -> Any:
    layout = "oi" if outputs_first else "io"
    changed = kernel.astype(jnp.float32) + jnp.einsum(f"ir,ro->{layout}", a, b, precision=_HIGHEST)
    return jnp.sum(changed * changed, axis=1 if outputs_first else 0)


def _rounded(values: Any, dtype: str) -> Any:
    """float32 values on the grid of a dtype."""
    if dtype == "bfloat16":
        # XLA may drop a cast to bfloat16 and back as excess precision; it never drops this.
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    return values.astype(dtype_named(dtype)).astype(jnp.float32)
