"""All adapters on one kernel, one after the other, as one product and one gain: what a judge compares with. NumPy, float64.

Adapter k makes ``(1 + e_k) * X + a_k @ b_k`` of what those before it left, ``e_k`` being 0 but for DoRA: with g its magnitude over
the norm of the unmerged kernel and its delta, ``e = weight * (g - 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_merge_cli.records import Array
from lora_merge_cli.verification.adapted import Adapted


@dataclass(frozen=True)
class Series:
    """The change ``alpha * (gain * W + a @ b)`` of a kernel W, and how large what it is summed from can be."""

    a: Array
    """Dims batch, inputs, rank."""
    b: Array
    """Dims batch, rank, outputs; alpha and all scales in it."""
    b_size: Array
    """As `b`: the size of what its entries are sums of."""
    gain: Array | None
    """What W itself is multiplied by besides 1, dims batch, outputs, alpha in it; None for 0."""
    gain_size: Array | None
    """As `gain`: the size of what multiplies W."""
    gain_error: float
    """The relative error of the gains, whose norms were summed in float32."""
    steps: int
    """How many roundings a float32 sum of the products may have."""

    @classmethod
    def of(cls, adapted: Sequence[Adapted]) -> Series:
        """That of some adapters in their order; all of one kernel."""
        batch = len(adapted[0].site.parameters.equation.batch)
        b: list[Array] = []
        sizes: list[Array] = []
        kept: Array | None = None
        size: Array | None = None
        for part in adapted:
            extra = part.rescaling
            if extra is not None:
                factor = 1.0 + extra
                b = [values * np.expand_dims(factor, batch) for values in b]
                sizes = [values * np.abs(np.expand_dims(factor, batch)) for values in sizes]
                kept = factor if kept is None else kept * factor
                size = 1.0 + np.abs(extra) if size is None else size * (1.0 + np.abs(extra))
            b.append(part.right())
            sizes.append(part.right(magnitudes=True))
        return cls(
            a=np.concatenate([part.left() for part in adapted], axis=-1),
            b=np.concatenate(b, axis=batch),
            b_size=np.concatenate(sizes, axis=batch),
            gain=None if kept is None else adapted[0].at_alphas(kept - 1.0),
            gain_size=size,
            gain_error=sum(part.gain_error for part in adapted),
            steps=sum(part.steps for part in adapted),
        )
