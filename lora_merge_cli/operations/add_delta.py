"""Add a low-rank delta to a kernel: ``W + scale * einsum(equation, lora_a, lora_b)`` (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.operations.interface import Contribution
from lora_merge_cli.records import AdapterSite, Array


class AddDelta:
    """The additive low-rank operation."""

    name = "add_delta"
    needs_norms = False

    def contribute(
        self,
        site: AdapterSite,
        factors: Mapping[str, Array],
        weight: float,
        norms: Array | None,  # noqa: ARG002  (others need them)
    ) -> Contribution:
        """See `Operation.contribute`."""
        a, b = scaled_factors(site, factors, weight)
        return Contribution(a.astype(FLOAT32), b.astype(FLOAT32))


def scaled_factors(site: AdapterSite, factors: Mapping[str, Array], weight: float) -> tuple[Array, Array]:
    """lora_a, and lora_b times scale and weight, in the dims of `Contribution`; float64, to be rounded once."""
    equation = site.parameters.equation
    scale = site.parameters.scale.value
    assert scale is not None, "a plan has no site without a scale"
    a = _arranged(factors["lora_a"], equation.a, equation.batch + equation.inputs + equation.rank)
    summed = tuple(equation.b.index(dim) for dim in equation.summed)
    kept = "".join(dim for dim in equation.b if dim not in equation.summed)
    b = factors["lora_b"].astype(np.float64).sum(axis=summed)
    b = _arranged(b, kept, equation.batch + equation.rank + equation.outputs)
    return a.astype(np.float64), b * (scale * weight)


def _arranged(values: Array, dims: str, order: str) -> Array:
    return np.ascontiguousarray(np.transpose(values, [dims.index(dim) for dim in order]))
