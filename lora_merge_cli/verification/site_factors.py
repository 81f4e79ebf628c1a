"""The factors of adapters as the judge takes them: read whole, checked, and put into its own form. NumPy, float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.lowrank import LeafDigest, adapter_digest, with_ones
from lora_merge_cli.records import (
    AdapterSite,
    Array,
    Factor,
    KeyPath,
    Region,
    full_region,
    grid,
    region_shape,
    relative,
)
from lora_merge_cli.side_by_side import Leaf, side_by_side
from lora_merge_cli.verification.adapted import Adapted, Norms
from lora_merge_cli.verification.methods import is_by_row, reduced


class SiteFactors:
    """Reads what sites take of adapters.

    Args:
        inputs: What is merged.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        # Experts share their leaves, each taking a part.
        self._leaf = functools.lru_cache(4)(self._read_leaf)

    def of(self, site: AdapterSite) -> tuple[dict[str, Array], str]:
        """A site's factors by role, float64, as its operation takes them; and their digest.

        Raises:
            NonFiniteInput: One holds NaN or Inf.
        """
        leaves = {role: self._factor(site, factor) for role, factor in site.factors.items()}
        digest = adapter_digest({role: digest for role, (_, digest) in leaves.items()})
        factors = {role: values.astype(np.float64) for role, (values, _) in leaves.items()}
        return (factors if is_by_row(site.operation) else reduced(site, with_ones(factors))), digest

    def _factor(self, site: AdapterSite, factor: Factor) -> tuple[Array, str]:
        """What a site takes of an adapter's leaf, and the digest of the leaf."""
        values, digest = self._leaf(site.adapter, factor.path)
        return factor.of(values), digest

    def _read_leaf(self, adapter: int | None, path: KeyPath) -> tuple[Array, str]:
        source = self._inputs.source(adapter)
        spec = source.index().tensors[path]
        values = source.read(path, full_region(spec.shape))
        bad = int(np.count_nonzero(~np.isfinite(values.astype(np.float64))))
        if bad:
            raise NonFiniteInput(
                "a factor is not finite",
                where=f"{source.path} :: {spec.name}",
                expected="finite values",
                found=f"{bad} of {spec.size} entries NaN or Inf",
            )
        digest = LeafDigest(spec)
        digest.add(values)
        return values, digest.text


def adapted_site(
    site: AdapterSite,
    factors: Mapping[str, Array],
    added_to: Leaf,
    multiplier: float,
    alphas: tuple[float, ...] = (1.0,),
) -> Adapted:
    """A low-rank site, with DoRA's norms from a first pass over the kernel.

    Args:
        site: The site.
        factors: Its factors, see `SiteFactors.of`.
        added_to: The kernel that DoRA's norms are of.
        multiplier: What its change is multiplied by besides its weight.
        alphas: See `Adapted.alphas`.
    """
    gain = None
    if "magnitude" in factors:
        norms = Norms(site, added_to[1].shape, factors)
        equation = site.parameters.equation
        for region, (kernel,) in side_by_side([added_to]):
            for piece in batch_pieces(equation, region):
                norms.add(piece, kernel[relative(piece, region)])
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = factors["magnitude"].reshape(norms.finish().shape) / norms.finish()
    return Adapted(site, factors["lora_a"], factors["lora_b"], site.weight * multiplier, gain, alphas)


def batch_pieces(equation: Equation, region: Region) -> Iterator[Region]:
    """Pieces of one index of every batch dim."""
    extents = region_shape(region)
    yield from grid(
        region, [1 if dim in equation.batch else n for dim, n in zip(equation.target, extents, strict=True)]
    )
