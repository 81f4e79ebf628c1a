"""What operations by row have in common: products on the device, and operands rounded on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.records import AdapterSite, Array


def product(text: str, *operands: Any) -> Any:
    """An einsum on the device, at the highest precision; traced."""
    import jax
    import jax.numpy as jnp

    return jnp.einsum(text, *operands, precision=jax.lax.Precision.HIGHEST)


def scale_of(site: AdapterSite) -> float:
    """Every constant factor of the site's change."""
    scale = site.parameters.scale.value
    assert scale is not None, "a plan has no site without a scale"
    return scale


def rounded(site: AdapterSite, values: Array, what: str) -> Array:
    """Values in float32.

    Args:
        site: Whose they are.
        values: float64.
        what: What is not finite if they are not, as a clause.

    Raises:
        NonFiniteInput: They are not finite, or not within float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(FLOAT32)
    bad = int(np.sum(~np.isfinite(result)))
    if bad:
        raise NonFiniteInput(
            f"{what} is not finite in float32",
            where=site.name,
            expected="finite values",
            found=f"{bad} of {result.size} entries NaN or Inf",
        )
    return result
