"""The only loop: reads, computes on the device, yields blocks. What it learned on the way is in `Execution` afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import NonFiniteInput, NothingToMerge, Unrepresentable, UnsupportedCheckpoint, WrongBase
from lora_merge_cli.formats.interface import Blocks, LeafData, Source
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.lowrank import LeafDigest, adapter_digest, leaf_digest, spectrum, with_ones
from lora_merge_cli.operations import Contribution, KernelUpdate, OutputNorms, PendingTile, operation_named
from lora_merge_cli.operations.add_delta import AddDelta, scaled_factors
from lora_merge_cli.plan import MergePlan, Step
from lora_merge_cli.reading import FactorReader, nbytes, read_start
from lora_merge_cli.records import (
    AdapterSite,
    Array,
    KeyPath,
    Region,
    TensorSpec,
    display,
    first_names,
    full_region,
    grid,
    region_shape,
    relative,
)
from lora_merge_cli.side_by_side import side_by_side
from lora_merge_cli.survival import Moments

_TILES_IN_FLIGHT = 3
_READ_AHEAD_BYTES = 256 * 2**20


class Execution:
    """One run of a plan.

    Args:
        plan: What to do.
        inputs: What the plan was made for.
        device: The JAX device to compute on.
        encodings: What the sink takes as it is stored.
        listener: Who to tell of progress.
    """

    def __init__(
        self,
        plan: MergePlan,
        inputs: Inputs,
        device: Any,
        encodings: frozenset[str] = frozenset(),
        listener: Listener | None = None,
    ) -> None:
        self._plan = plan
        self._inputs = inputs
        self._source = inputs.checkpoint.source
        self._factors = FactorReader(inputs)
        self._device = device
        self._encodings = encodings
        self._listener = listener or Silent()
        self._wrong_frozen: list[str] = []
        self._frozen = 0
        self.moments: dict[KeyPath, tuple[Moments, ...]] = {}
        """Per changed leaf and layer, once it is done."""
        self.not_finite: dict[str, int] = {}
        """Non-finite entries per untouched leaf that had to be decoded anyway."""
        self.adapter_digests: list[str] = []
        """Per site, in the plan's order, a digest of its factors' names, shapes, dtypes and values."""
        self.spectra: list[tuple[float, ...]] = []
        """Per site, in the plan's order, the singular values of its delta; see `lowrank.spectrum`."""
        self.silent: list[AdapterSite] = []
        """The sites one of whose factors is zero."""

    def check_factors(self) -> None:
        """Read every factor once, and whatever must be equal, before anything is written.

        Raises:
            NonFiniteInput: A factor holds NaN or Inf.
            NothingToMerge: Nothing would change: a factor of each site is zero, and no tensor is replaced.
            UnsupportedCheckpoint: Two leaves that the model ties differ.
        """
        digests: dict[tuple[int | None, KeyPath], LeafDigest] = {}
        for site in self._plan.sites:
            leaves = {}
            for role, factor in site.factors.items():
                key = site.adapter, factor.path
                spec = self._plan.factors[key]
                values = self._factors.leaf(*key)
                if key not in digests:
                    self._refuse_not_finite(site, spec, values)
                    digests[key] = leaf_digest(spec, values)
                leaves[role] = factor.of(values)
            self.adapter_digests.append(
                adapter_digest({r: digests[site.adapter, f.path] for r, f in site.factors.items()})
            )
            if any(not leaves[role].any() for role in ("lora_a", "lora_b") if role in leaves):
                self.silent.append(site)
            leaves = with_ones(leaves)
            scale = (site.parameters.scale.value or 0.0) * site.weight * self._plan.multiplier
            self.spectra.append(spectrum(site.parameters.equation, leaves["lora_a"], leaves["lora_b"], scale))
        self._refuse_silence()
        for one, other in self._plan.equal:
            self._refuse_unequal(one, other)

    def _refuse_not_finite(self, site: AdapterSite, spec: TensorSpec, values: Array) -> None:
        bad = int(np.sum(~np.isfinite(values.astype(np.float32))))
        if bad:
            raise NonFiniteInput(
                "a factor is not finite",
                where=f"{self._inputs.source(site.adapter).path} :: {spec.name}",
                expected="finite values",
                found=f"{bad} of {spec.size} entries NaN or Inf",
            )

    def _refuse_silence(self) -> None:
        plan = self._plan
        silent = {id(site) for site in self.silent if site.operation == AddDelta.name}
        speaking = any(site.weight and id(site) not in silent for site in plan.sites)
        if any(found.weight for found in plan.replacements) or (speaking and plan.multiplier):
            return
        if plan.multiplier == 0:
            why = "--scale is 0"
        elif any(site.weight for site in plan.sites):
            why = "a factor of each site is zero"
        else:
            why = "its weight is 0"
        raise NothingToMerge(
            f"every delta is zero: {why}",
            where=self._inputs.source(plan.sites[0].adapter if plan.sites else None).path,
            hint="the adapter was never trained, or this is the wrong step",
        )

    def _refuse_unequal(self, one: KeyPath, other: KeyPath) -> None:
        tensors = self._source.index().tensors
        leaves = [(self._source, tensors[path]) for path in (one, other)]
        if tensors[one].shape != tensors[other].shape or not all(
            equals_rounded(first, second) for _, (first, second) in side_by_side(leaves)
        ):
            raise UnsupportedCheckpoint(
                "two tensors that the configuration ties, and that differ",
                where=f"{self._source.path} :: {display(one)} and {display(other)}",
                hint="save the model again, or set tie_word_embeddings in its config.json to what is true",
            )

    def leaves(self) -> Iterator[LeafData]:
        """Every output leaf, with its data produced as it is pulled.

        Raises:
            CorruptCheckpoint: An input cannot be read.
            NonFiniteInput: A kernel under an adapter, or what an adapter replaces a tensor by, holds NaN or Inf.
            Unrepresentable: A result is not finite in the dtype that it is stored in.
            WrongBase: Frozen leaves do not equal the base's, known once all were seen.
            NothingToMerge: Every delta turned out to be zero.
        """
        self._listener.start(self._plan.output_bytes)
        for step in self._plan.steps:
            if step.base is not None:
                self._frozen += 1
            yield self._leaf(step)
        self._check_base()
        if (
            self.moments
            and not any(found.weight for found in self._plan.replacements)
            and len(delta_is_zero(self.moments)) == len(self.moments)
        ):
            raise NothingToMerge("every delta is zero", where=self._source.path)

    def _leaf(self, step: Step) -> LeafData:
        if step.sites:
            return LeafData(step.output, step.write_block, self._fused(step))
        same_as = self._plan.shared.get(step.output.path)
        as_before = step.before is not None and not step.replacements and step.output.dtype == step.before.dtype
        stored = self._source.stored(step.before.path) if as_before and step.before is not None else None
        if stored is None or stored.encoding not in self._encodings:
            return LeafData(step.output, step.write_block, self._carried(step), same_as)
        if step.base is not None:
            self._compare_whole(step)
        self._listener.advance(step.output.name, step.output.nbytes)
        return LeafData(step.output, step.write_block, stored, same_as)

    def _carried(self, step: Step) -> Blocks:
        """A leaf without a site: decoded, with an adapter's values in it, and cast if need be."""
        differs = False
        for region, values, base in self._blocks(step):
            differs = differs or not (base is None or equals_rounded(values, base))
            self._count_not_finite(step, values)
            for part in grid(region, step.write_block):
                piece = values[relative(part, region)]
                yield part, _cast(piece, step, self._source)
                self._listener.advance(step.output.name, nbytes(part, step.output))
        self._note_frozen(step, differs)

    def _fused(self, step: Step) -> Blocks:
        """A kernel with its deltas added."""
        where = f"{self._source.path} :: {step.output.name}"
        equation = step.sites[0].parameters.equation
        contributions = [self._contribution(step, site) for site in step.sites]
        update = KernelUpdate(
            where,
            equation,
            step.source.shape,
            contributions,
            step.output.dtype,
            self._plan.serving_dtype,
            self._device,
        )
        differs = False
        for region, values, base in self._blocks(step):
            differs = differs or not (base is None or equals_rounded(values, base))
            for part in grid(region, step.write_block):
                inside = relative(part, region)
                added_to = None if base is None else base[inside]
                yield part, _computed(update, step, part, values[inside], added_to)
                self._listener.advance(step.output.name, nbytes(part, step.output))
        self._note_frozen(step, differs)
        self.moments[step.output.path] = update.finish()

    def _contribution(self, step: Step, site: AdapterSite) -> Contribution:
        """What a site adds; with a first pass over the kernel where the operation needs one."""
        operation = operation_named(site.operation)
        factors = self._factors.read(site)
        norms = None
        if operation.needs_norms:
            a, b = (values.astype(np.float32) for values in scaled_factors(site, factors, 1.0))
            passed = OutputNorms(site.parameters.equation, step.source.shape, a, b, self._device)
            for region, values, base in self._blocks(step):
                kernel = values if base is None else base
                for tile in grid(region, step.tile):
                    passed.add(tile, at_most_float32(np.ascontiguousarray(kernel[relative(tile, region)])))
            norms = passed.finish()
        return operation.contribute(site, factors, site.weight * self._plan.multiplier, norms)

    def _blocks(self, step: Step) -> Iterator[tuple[Region, Array, Array | None]]:
        """Each read block of the leaf, and of its base, the next one being read ahead where it is small."""
        regions = list(grid(full_region(step.source.shape), step.read_block))
        size = int(np.prod(step.read_block)) * step.source.dtype.itemsize
        if size > _READ_AHEAD_BYTES or len(regions) < 2:
            for region in regions:
                yield region, *self._read(step, region)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, step, regions[0])
            for region, following in zip(regions, [*regions[1:], None], strict=True):
                values, base = ahead.result()
                if following is not None:
                    ahead = reader.submit(self._read, step, following)
                yield region, values, base

    def _read(self, step: Step, region: Region) -> tuple[Array, Array | None]:
        values = read_start(self._inputs, step, region)
        base = self._inputs.base
        if step.base is None or base is None:
            return values, None
        return values, base.source.read(step.base.path, region)

    def _compare_whole(self, step: Step) -> None:
        blocks = self._blocks(step)
        self._note_frozen(step, not all(base is None or equals_rounded(values, base) for _, values, base in blocks))

    def _note_frozen(self, step: Step, differs: bool) -> None:
        if differs:
            self._wrong_frozen.append(step.source.name)

    def _check_base(self) -> None:
        if self._wrong_frozen and self._inputs.base is not None:
            raise WrongBase(
                "the base is not what the fine-tune started from",
                where=self._inputs.base.source.path,
                expected="every frozen leaf to equal the base's, rounded to its dtype, bit for bit",
                found=f"{len(self._wrong_frozen)} of {self._frozen} that differ: {first_names(self._wrong_frozen, 3)}",
            )

    def _count_not_finite(self, step: Step, values: Array) -> None:
        if is_float(values.dtype):
            bad = int(np.sum(~np.isfinite(values)))
            if bad:
                name = step.output.name
                self.not_finite[name] = self.not_finite.get(name, 0) + bad


def _computed(update: KernelUpdate, step: Step, part: Region, values: Array, base: Array | None) -> Array:
    """One write block, tile by tile, with a few tiles on the device at a time."""
    result = np.empty(region_shape(part), step.output.dtype)
    pending: deque[tuple[Region, PendingTile]] = deque()
    for tile in grid(part, step.tile):
        inside = relative(tile, part)
        kernel = at_most_float32(np.ascontiguousarray(values[inside]))
        added_to = None if base is None else np.ascontiguousarray(base[inside])
        pending.append((inside, update.step(tile, kernel, added_to)))
        if len(pending) >= _TILES_IN_FLIGHT:
            done, waiting = pending.popleft()
            result[done] = waiting.result()
    for done, waiting in pending:
        result[done] = waiting.result()
    return result


def at_most_float32(values: Array) -> Array:
    """The values, float64 ones rounded to float32."""
    return values.astype(np.float32) if values.dtype == np.float64 else values


def _cast(values: Array, step: Step, source: Source) -> Array:
    if values.dtype == step.output.dtype:
        return values
    with np.errstate(over="ignore"):
        result = values.astype(step.output.dtype)
    if np.isfinite(values).all() and not np.isfinite(result).all():
        flag = "--dtype" if step.replacements else "--dtype-untouched"
        raise Unrepresentable(
            f"a leaf overflows {step.output.dtype.name}",
            where=f"{source.path} :: {step.output.name}",
            hint=f"use {flag} float32 or bfloat16",
        )
    return np.asarray(result)


def delta_is_zero(moments: Mapping[KeyPath, tuple[Moments, ...]]) -> list[str]:
    """The leaves whose delta is exactly zero."""
    return [display(path) for path, layers in moments.items() if Moments.total(layers).max_abs == 0]
