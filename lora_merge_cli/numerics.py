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
    """``U^T q``, rank by outputs."""


@dataclass(frozen=True)
class FusedTile:
    """A fused tile and the sums over its last axis. JAX arrays, or NumPy ones once on the host."""

    values: Any
    kernel_finite: Any
    finite: Any
    delta_sq: Any
    """In squared units of `fuse_tile`."""
    kernel_sq: Any
    max_abs: Any
    realised: dict[str, RealisedSums]
    projected_delta: Any = None
    """``U^T d``, rank by outputs, where the delta is more than its factors."""

    def to_host(self) -> FusedTile:
        """The same as NumPy arrays, once the device is done."""
        return jax.device_get(self)  # type: ignore[no-any-return]


jax.tree_util.register_dataclass(RealisedSums, ["q_dot_d", "error_sq", "unchanged", "projected"], [])
jax.tree_util.register_dataclass(
    FusedTile,
    ["values", "kernel_finite", "finite", "delta_sq", "kernel_sq", "max_abs", "realised", "projected_delta"],
    [],
)


def fuse_tile(
    kernel: Array,
    base: Array | None,
    a: Array,
    b: Array,
    basis: Array,
    gain: Array | None,
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
        a: lora_a's part, inputs by rank, float32.
        b: lora_b's part, rank by outputs, float32, scaled, already summed where the model sums it alone.
        basis: The tile's rows of an orthonormal basis of lora_a's columns, inputs by rank, float32.
        gain: What `kernel` or `base` is multiplied by besides 1, per output, float32; None for 0.
        unit: About the size of the delta. Squares are summed in squared units, so that float32 neither overflows nor loses them.
        outputs_first: Whether `kernel` and `base` are outputs by inputs instead.
        dtype: The name of the dtype to round to.
        serving_dtype: The name of the dtype that a server will cast to; survival is measured for both.
        device: The JAX device to compute on.
    """
    operands = jax.device_put((kernel, base, a, b, basis, gain, unit), device)
    return _fuse(outputs_first, dtype, serving_dtype, *operands)  # type: ignore[no-any-return]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fuse(
    outputs_first: bool,
    dtype: str,
    serving_dtype: str,
    kernel: Any,
    base: Any,
    a: Any,
    b: Any,
    basis: Any,
    gain: Any,
    unit: Any,
) -> FusedTile:
    layout = "oi" if outputs_first else "io"
    kernel = kernel.astype(jnp.float32)
    delta = jnp.einsum(f"ir,ro->{layout}", a, b, precision=_HIGHEST)
    changed = kernel if base is None else base.astype(jnp.float32)
    if gain is None:
        result = changed + delta
    else:
        per_output = gain[:, None] if outputs_first else gain[None, :]
        result = (1 + per_output) * changed + delta
        delta = per_output * changed + delta
    values = _rounded(result, dtype).astype(dtype_named(dtype))
    per_unit = 1 / unit
    unit_delta = delta * per_unit
    realised = {}
    for name in dict.fromkeys((dtype, serving_dtype)):
        # A server casts what is stored, so the stored values are what it rounds once more.
        q = _rounded(values.astype(jnp.float32), name) - _rounded(kernel, name)
        unit_q = q * per_unit
        error = unit_q - unit_delta
        realised[name] = RealisedSums(
            q_dot_d=jnp.sum(unit_q * unit_delta, axis=-1),
            error_sq=jnp.sum(error * error, axis=-1),
            unchanged=jnp.sum(q == 0, axis=-1, dtype=jnp.int32),
            projected=jnp.einsum(f"ir,{layout}->ro", basis, q, precision=_HIGHEST),
        )
    return FusedTile(
        values=values,
        kernel_finite=jnp.all(jnp.isfinite(kernel)),
        finite=jnp.all(jnp.isfinite(values)),
        delta_sq=jnp.sum(unit_delta * unit_delta, axis=-1),
        kernel_sq=jnp.sum(kernel * kernel, axis=-1),
        max_abs=jnp.max(jnp.abs(delta)),
        realised=realised,
        projected_delta=None if gain is None else jnp.einsum(f"ir,{layout}->ro", basis, delta, precision=_HIGHEST),
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
