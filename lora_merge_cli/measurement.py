"""What `inspect --stats` measures: sizes and ranks of deltas from their factors, which are never multiplied but for a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.lowrank import delta_singular_values
from lora_merge_cli.nearest_sample import NearestGain, NearestSample
from lora_merge_cli.records import AdapterSite, Array, TensorSpec
from lora_merge_cli.side_by_side import side_by_side


@dataclass(frozen=True)
class SiteStats:
    """Measured from the factors and the kernel; the delta is formed at a few entries alone."""

    relative_norm: float | None
    """``|delta| / |kernel|``, Frobenius; None where the scale is unknown or the kernel is zero."""
    relative_norm_worst: float | None
    """The largest over the stacked layers."""
    effective_rank: float
    """Mean over layers and heads of exp(entropy of the normalised singular values) (Roy and Vetterli, 2007)."""
    non_finite: int
    """NaN or Inf in the factors and the kernel."""
    nearest: tuple[NearestGain, ...] = ()
    """What rounding to nearest would keep of all that is added to the kernel, estimated; none where that is not known."""


def site_stats(
    checkpoint: Checkpoint,
    spec: TensorSpec,
    site: AdapterSite,
    factors: Mapping[str, Array],
    sample: NearestSample | None = None,
) -> SiteStats:
    """Measure one site.

    Args:
        checkpoint: What is merged into.
        spec: The site's kernel in it; read block by block.
        site: The site.
        factors: What it takes of the adapter's leaves, by role.
        sample: Of the kernel, to look at on the way.
    """
    equation = site.parameters.equation
    a, b = (factors[role].astype(np.float64) for role in ("lora_a", "lora_b"))
    bad = int(np.sum(~np.isfinite(a))) + int(np.sum(~np.isfinite(b)))
    stacked = equation.stacked
    kernel_sq = np.zeros(spec.shape[0] if stacked else 1)
    for region, (stored,) in side_by_side([(checkpoint.source, spec)]):
        values = stored.astype(np.float32)
        bad += int(np.sum(~np.isfinite(values)))
        if sample is not None and not bad:
            sample.add(region, stored)
        squares = np.square(values, dtype=np.float64)
        if stacked:
            kernel_sq[region[0]] += squares.reshape(squares.shape[0], -1).sum(axis=1)
        else:
            kernel_sq += squares.sum()
    if bad:
        return SiteStats(None, None, 0.0, bad)
    singular = delta_singular_values(equation, a, b)
    delta_sq = np.square(singular).sum(axis=-1)
    per_layer = delta_sq.reshape(len(kernel_sq), -1).sum(axis=1)
    scale = site.parameters.scale.value
    scale = None if scale is None else scale * site.weight
    ratios = None
    if scale is not None and np.all(kernel_sq > 0):
        ratios = abs(scale) * np.sqrt(per_layer / kernel_sq)
    total = None if ratios is None or scale is None else float(abs(scale) * np.sqrt(per_layer.sum() / kernel_sq.sum()))
    return SiteStats(
        relative_norm=total,
        relative_norm_worst=None if ratios is None else float(ratios.max()),
        effective_rank=_effective_rank(singular),
        non_finite=0,
        nearest=() if sample is None else sample.finish(),
    )


def _effective_rank(singular: Array) -> float:
    total = singular.sum(axis=-1, keepdims=True)
    used = singular[total[:, 0] > 0]
    if not len(used):
        return 0.0
    share = used / used.sum(axis=-1, keepdims=True)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1)
    return float(np.exp(entropy).mean())
