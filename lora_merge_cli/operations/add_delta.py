"""Add a low-rank delta to a kernel: ``W + scale * einsum(equation, lora_a, lora_b)`` (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import AdapterSite, Array


class AddDelta:
    """The additive low-rank operation."""

    name = "add_delta"
    needs_norms = False

    def reduce(self, site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:  # noqa: ARG002  (others need it)
        """See `LowRankOperation.reduce`: the factors as they are."""
        return factors

    def contribute(
        self,
        site: AdapterSite,
        factors: Mapping[str, Array],
        weight: float,
        norms: Array | None,  # noqa: ARG002  (others need them)
    ) -> Contribution:
        """See `LowRankOperation.contribute`."""
        return Contribution(*map(partial(in_float32, site), scaled_factors(site, factors, weight)))


def in_float32(site: AdapterSite, values: Array) -> Array:
    """A factor with its scale, rounded once.

    Raises:
        NonFiniteInput: It is beyond float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result = values.astype(FLOAT32)
    if not np.isfinite(result).all():
        raise NonFiniteInput(
            "a factor with its scale is beyond float32",
            where=site.name,
            hint="the training diverged: take an earlier step",
        )
    return result


def scaled_factors(site: AdapterSite, factors: Mapping[str, Array], weight: float) -> tuple[Array, Array]:
    """lora_a, and lora_b times scale and weight, in the dims of `Contribution`; float64, to be rounded once."""
    scale = site.parameters.scale.value
    assert scale is not None, "a plan has no site without a scale"
    a, b = arranged_factors(site, factors)
    return a, b * (scale * weight)


def arranged_factors(site: AdapterSite, factors: Mapping[str, Array]) -> tuple[Array, Array]:
    """lora_a, and lora_b summed over the dims that the model sums by itself, in the dims of `Contribution`; float64."""
    equation = site.parameters.equation
    a = _arranged(factors["lora_a"], equation.a, equation.batch + equation.inputs + equation.rank)
    summed = tuple(equation.b.index(dim) for dim in equation.summed)
    kept = "".join(dim for dim in equation.b if dim not in equation.summed)
    b = factors["lora_b"].astype(np.float64).sum(axis=summed)
    return a.astype(np.float64), _arranged(b, kept, equation.batch + equation.rank + equation.outputs)


def _arranged(values: Array, dims: str, order: str) -> Array:
    return np.ascontiguousarray(np.transpose(values, [dims.index(dim) for dim in order]))
