"""Reads the leaves of a plan, block by block, each with what will change it. Runs on the threads that read ahead."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_merge_cli.compare import count_non_finite
from lora_merge_cli.draws import rounding_bits
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.factors import FactorReader, one_layer
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.operations import (
    Contribution,
    KernelUpdate,
    OutputNorms,
    is_row_operation,
    operation_named,
    row_operation_named,
)
from lora_merge_cli.operations.add_delta import arranged_factors, scaled_factors
from lora_merge_cli.operations.chain import Chain, RowSite, outputs_and_inputs
from lora_merge_cli.operations.combine import Part, combine, departure
from lora_merge_cli.operations.sequence import in_sequence, partial
from lora_merge_cli.plan import MergePlan, Step
from lora_merge_cli.reading import scan_start
from lora_merge_cli.records import AdapterSite, Array, Region, full_region, grid, offset, region_shape


@dataclass(frozen=True)
class Sides:
    """What a run of a leaf's entries may start as, each as stored."""

    values: Array
    """The checkpoint's, with an adapter's in their place where it replaces them."""
    base: Array | None
    """The base's, where the fine-tune froze the leaf."""
    anchor: Array | None
    """What alpha 0 stands for, where that is another leaf, or the leaf before it was replaced."""


@dataclass(frozen=True)
class Block:
    """A run of a leaf's entries before any site is applied."""

    region: Region
    """Where it lies in the leaf."""
    inside: Region
    """Where it lies in its layer; in the leaf where no layers are stacked."""
    sides: Sides
    """Its values."""
    updates: tuple[KernelUpdate | None, ...] = ()
    """For each output what the leaf's sites do to its layer; None where they do nothing, alpha being 0."""
    chain: Chain | None = None
    """What its sites make of it at alpha 1, where one of them is no low-rank product; there are no `updates` then."""
    bits: Array | None = None
    """16 random bits for each entry, one after the other, if it is rounded stochastically."""


class BlockReader:
    """Reads what several outputs that differ in nothing but their alphas are made of, once for all of them.

    Args:
        plans: One per output.
        inputs: What the plans were made for.
        factors: Where factors come from.
        device: The JAX device that kernels are changed on.
    """

    def __init__(self, plans: Sequence[MergePlan], inputs: Inputs, factors: FactorReader, device: Any) -> None:
        self._plan = plans[0]
        self._inputs = inputs
        self._factors = factors
        self._device = device
        self._combining = threading.Lock()
        self.departures: dict[str, float] = {}
        """Of what is combined, by kernel and layer: how far it is from the sum of the deltas; see `combine.departure`."""

    def read(self, steps: Sequence[Step], pool: ThreadPoolExecutor) -> Iterator[Block]:
        """The blocks of a leaf, from the first to the last.

        Args:
            steps: One per output.
            pool: Where parts of the leaf may be decoded at the same time.

        Raises:
            CorruptCheckpoint: An input cannot be read.
            NonFiniteInput: A replacement, a factor's product or a base's kernel holds NaN or Inf.
        """
        step = steps[0]
        regions = list(grid(full_region(step.source.shape), step.block))
        if not step.sites:
            for region, sides in self._scanned(step, regions, pool):
                yield Block(region, region, sides, bits=self._bits(step, region))
            return
        stacked = step.sites[0].parameters.equation.stacked
        sites = [one_layer(site) for site in step.sites]
        scanned = self._scanned(step, regions, pool)
        layers = zip(*(self._factors.layers(site) for site in step.sites), strict=True)
        for layer, factors in enumerate(layers):
            here = [region for region in regions if not stacked or region[0].start == layer]
            changes = self._changes(steps, sites, factors, here, layer, pool)
            for region, sides in itertools.islice(scanned, len(here)):
                yield Block(region, region[1:] if stacked else region, sides, *changes, bits=self._bits(step, region))

    def _bits(self, step: Step, region: Region) -> Array | None:
        if step.rounding.method != "stochastic":
            return None
        start = offset(step.output.shape, region)
        size = math.prod(region_shape(region))
        return rounding_bits(self._plan.rounding.seed, step.output.name, start, start + size)

    def _changes(
        self,
        steps: Sequence[Step],
        sites: Sequence[AdapterSite],
        factors: Sequence[Mapping[str, Array]],
        regions: Sequence[Region],
        layer: int,
        pool: ThreadPoolExecutor,
    ) -> tuple[tuple[KernelUpdate | None, ...], Chain | None]:
        """What each output makes of one layer; see `Block`."""
        step, equation = steps[0], sites[0].parameters.equation
        shape = step.source.shape[len(step.source.shape) - len(equation.target) :]
        norms = [self._norms(step, site, own, regions, pool) for site, own in zip(sites, factors, strict=True)]
        given = list(zip(sites, factors, norms, strict=True))
        by_row = [self._row_site(site, own, shape) for site, own, _ in given if is_row_operation(site.operation)]
        if by_row:
            parts = [self._contribution(*each) for each in given if not is_row_operation(each[0].operation)]
            return (), Chain(equation, shape, in_sequence(parts) if parts else None, by_row, self._device)
        if self._plan.combining.is_sum:
            whole = in_sequence([self._contribution(*each) for each in given])
        else:
            whole = self._combined(sites, factors, step.tensor_name(layer))

        def update(alpha: float) -> KernelUpdate | None:
            if alpha == 0 and step.mixed:
                return None
            return KernelUpdate(
                f"{self._inputs.checkpoint.source.path} :: {step.output.name}",
                equation,
                shape,
                partial(whole, alpha),
                step.output.dtype,
                self._plan.serving_dtype,
                self._device,
                step.rounding.choice(self._plan.rounding),
                self._plan.rounding.mu,
            )

        return tuple(update(each.alpha_of(layer)) for each in steps), None

    def _contribution(self, site: AdapterSite, factors: Mapping[str, Array], norms: Array | None) -> Contribution:
        weight = site.weight * self._plan.multiplier
        return operation_named(site.operation).contribute(site, factors, weight, norms)

    def _combined(
        self, sites: Sequence[AdapterSite], factors: Sequence[Mapping[str, Array]], name: str
    ) -> Contribution:
        """What ``--combine`` makes of several adapters' factors."""
        parts = []
        for site, own in zip(sites, factors, strict=True):
            scale = site.parameters.scale.value
            assert scale is not None, "a plan has no site without a scale"
            parts.append(Part(*arranged_factors(site, own), site.weight * self._plan.multiplier, scale))
        # One at a time: some hold whole deltas.
        with self._combining:
            found = combine(parts, self._plan.combining, name)
        self.departures[name] = departure(parts, found)
        return found

    def _row_site(self, site: AdapterSite, factors: Mapping[str, Array], shape: Sequence[int]) -> RowSite:
        operation = row_operation_named(site.operation)
        operands = operation.operands(site, factors, outputs_and_inputs(site.parameters.equation, shape))
        return RowSite(operation, site, operands, site.weight * self._plan.multiplier)

    def _norms(
        self,
        step: Step,
        site: AdapterSite,
        factors: Mapping[str, Array],
        regions: Sequence[Region],
        pool: ThreadPoolExecutor,
    ) -> Array | None:
        """What an operation that rescales needs of one layer: a first pass over the kernel."""
        if is_row_operation(site.operation) or not operation_named(site.operation).needs_norms:
            return None
        a, b = (values.astype(np.float32) for values in scaled_factors(site, factors, 1.0))
        shape = step.source.shape[len(step.source.shape) - len(site.parameters.equation.target) :]
        passed = OutputNorms(site.parameters.equation, shape, a, b, self._device)
        for region, sides in self._scanned(step, regions, pool):
            kernel = at_most_float32(sides.values if sides.base is None else sides.base)
            passed.add(region[len(region) - len(shape) :], kernel)
        return passed.finish()

    def _scanned(
        self, step: Step, regions: Sequence[Region], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Region, Sides]]:
        """The leaf's values, the base's and the anchor's, region by region."""
        starts: Iterator[Array | None]
        bases: Iterator[Array | None]
        anchors: Iterator[Array | None]
        starts, bases, anchors = (itertools.repeat(None, len(regions)) for _ in range(3))
        if step.base is not None and self._inputs.base is not None:
            bases = self._inputs.base.source.scan(step.base.path, regions, pool)
        if step.anchor is not None:
            anchors = self._inputs.anchor.scan(step.anchor.path, regions, pool)
        if step.before is not None or step.replacements:
            starts = scan_start(self._inputs, step, regions, pool)
        for region, values, base, anchor in zip(regions, starts, bases, anchors, strict=True):
            if values is not None and base is not None and step.sites:
                self._refuse_base_not_finite(step, values, base)
            start = anchor if values is None else values
            assert start is not None, "a leaf comes from the checkpoint, from an adapter or from the base"
            yield region, Sides(start, base, anchor)

    def _refuse_base_not_finite(self, step: Step, values: Array, base: Array) -> None:
        """A delta is added to the base: where the fine-tune's own kernel is finite, the base is to blame."""
        if self._inputs.base is not None and step.base is not None and not count_non_finite(values):
            bad = count_non_finite(base)
            if bad:
                raise NonFiniteInput(
                    "the base's kernel under an adapter is not finite",
                    where=f"{self._inputs.base.source.path} :: {step.base.name}",
                    expected="finite values",
                    found=f"{bad} entries NaN or Inf",
                )


def at_most_float32(values: Array) -> Array:
    """The values, float64 ones rounded to float32."""
    if values.dtype != np.float64:
        return values
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
