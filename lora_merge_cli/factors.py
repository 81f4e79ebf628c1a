"""An adapter's factors, layer by layer where layers are stacked: read, and looked at before anything is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lora_merge_cli.compare import count_non_finite
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.lowrank import LeafDigest, adapter_digest, delta_singular_values, mean_spectrum, with_ones
from lora_merge_cli.operations import is_row_operation, operation_named
from lora_merge_cli.plan import MergePlan
from lora_merge_cli.records import AdapterSite, Array, KeyPath, TensorSpec, full_region

_LEAVES_KEPT = 4
_PRODUCT = {"lora_a", "lora_b"}

FactorKey = tuple[int | None, KeyPath]
"""An adapter's number, None for the checkpoint, and a leaf of it."""


def one_layer(site: AdapterSite) -> AdapterSite:
    """The site as it is in each of its layers: the same where none are stacked."""
    parameters = dataclasses.replace(site.parameters, equation=site.parameters.equation.of_one_layer)
    return dataclasses.replace(site, parameters=parameters)


def effective(site: AdapterSite, factors: Mapping[str, Array]) -> Mapping[str, Array]:
    """What a site's operation computes from: of a low-rank one `lora_a` and `lora_b`, whatever the adapter keeps."""
    return (
        factors
        if is_row_operation(site.operation)
        else operation_named(site.operation).reduce(site, with_ones(dict(factors)))
    )


class FactorReader:
    """Reads adapters' factors.

    The last few leaves that are not stacked are kept: experts share theirs, each taking a part.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._leaf = functools.lru_cache(_LEAVES_KEPT)(self._read)

    def layers(self, site: AdapterSite) -> Iterator[Mapping[str, Array]]:
        """A site's factors by role for each stacked layer, or once, as the equation of `one_layer` takes them; stored dtypes.

        Raises:
            CorruptCheckpoint: One cannot be read.
        """
        for parts in self.parts(site):
            yield effective(site, {role: part for role, (part, _) in parts.items()})

    def read(self, site: AdapterSite) -> Mapping[str, Array]:
        """A site's factors by role, all layers at once, as its own equation takes them; see `layers`."""
        return effective(
            site, {role: factor.of(self._leaf((site.adapter, factor.path))) for role, factor in site.factors.items()}
        )

    def parts(self, site: AdapterSite) -> Iterator[dict[str, tuple[Array, Array]]]:
        """As `layers`, without a factor that stands for none, and beside each the part of the leaf that was read for it."""
        source = self._inputs.source(site.adapter)
        if not site.parameters.equation.stacked:
            leaves = {role: self._leaf((site.adapter, factor.path)) for role, factor in site.factors.items()}
            yield {role: (factor.of(leaves[role]), leaves[role]) for role, factor in site.factors.items()}
            return
        scans = {}
        for role, factor in site.factors.items():
            shape = source.index().tensors[factor.path].shape
            assert factor.shape is None and not factor.at, "stacked factors are whole leaves"
            layers = [(slice(layer, layer + 1), *full_region(shape[1:])) for layer in range(shape[0])]
            scans[role] = source.scan(factor.path, layers)
        for values in zip(*scans.values(), strict=True):
            yield {role: (part[0], part) for role, part in zip(scans, values, strict=True)}

    def _read(self, key: FactorKey) -> Array:
        source, path = self._inputs.source(key[0]), key[1]
        return source.read(path, full_region(source.index().tensors[path].shape))


@dataclass
class FactorFindings:
    """What is known of a plan's factors once each was read. Lists have an entry per site, in the plan's order."""

    digests: list[str] = field(default_factory=list)
    """Of the factors' names, shapes, dtypes and values; see `lowrank.adapter_digest`."""
    spectra: list[tuple[float, ...]] = field(default_factory=list)
    """The singular values of the delta, see `lowrank.mean_spectrum`; none where it is no low-rank product."""
    silent: list[AdapterSite] = field(default_factory=list)
    """The sites one of whose factors is zero."""


def check_factors(plan: MergePlan, inputs: Inputs, reader: FactorReader) -> FactorFindings:
    """Read every factor once.

    Raises:
        CorruptCheckpoint: One cannot be read.
        NonFiniteInput: One holds NaN or Inf.
    """
    found = FactorFindings()
    leaves: dict[FactorKey, _Leaf] = {}
    for site in plan.sites:
        unseen = {
            role: leaves.setdefault(key, _Leaf(plan.factors[key]))
            for role, factor in site.factors.items()
            if (key := (site.adapter, factor.path)) not in leaves
        }
        speaking: set[str] = set()
        singular: list[Array] = []
        for parts in reader.parts(site):
            for role, (_, stored) in parts.items():
                if role in unseen:
                    unseen[role].add(stored)
            if is_row_operation(site.operation) or any(leaf.non_finite for leaf in unseen.values()):
                continue
            factors = effective(site, {role: part for role, (part, _) in parts.items()})
            speaking |= {role for role in _PRODUCT if factors[role].any()}
            equation = site.parameters.equation.of_one_layer
            singular.append(delta_singular_values(equation, factors["lora_a"], factors["lora_b"]))
        for leaf in unseen.values():
            leaf.refuse_non_finite(inputs, site)
        digests = {role: leaves[site.adapter, factor.path].digest.text for role, factor in site.factors.items()}
        found.digests.append(adapter_digest(digests))
        if singular and speaking != _PRODUCT:
            found.silent.append(site)
        scale = (site.parameters.scale.value or 0.0) * site.weight * plan.multiplier
        found.spectra.append(mean_spectrum(singular, scale) if singular else ())
    return found


class _Leaf:
    """What was seen of one leaf of factors."""

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec
        self.digest = LeafDigest(spec)
        self.non_finite = 0

    def add(self, values: Array) -> None:
        self.digest.add(values)
        self.non_finite += count_non_finite(values)

    def refuse_non_finite(self, inputs: Inputs, site: AdapterSite) -> None:
        if self.non_finite:
            raise NonFiniteInput(
                "a factor is not finite",
                where=f"{inputs.source(site.adapter).path} :: {self._spec.name}",
                expected="finite values",
                found=f"{self.non_finite} of {self._spec.size} entries NaN or Inf",
            )
