"""The only loop: reads, computes on the device, yields blocks. What it learned on the way is in `Execution` afterwards."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_merge_cli.ahead import Ahead, in_order
from lora_merge_cli.compare import count_non_finite, equals_rounded
from lora_merge_cli.errors import NonFiniteInput, NothingToMerge, Unrepresentable, UnsupportedCheckpoint, WrongBase
from lora_merge_cli.factors import FactorFindings, FactorReader, check_factors, one_layer
from lora_merge_cli.formats.interface import Blocks, LeafData, Source, Stored
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.jobs import jobs_or_default
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.operations import Contribution, KernelUpdate, OutputNorms, operation_named
from lora_merge_cli.operations.add_delta import AddDelta, scaled_factors
from lora_merge_cli.plan import MergePlan, Step
from lora_merge_cli.reading import nbytes, scan_start
from lora_merge_cli.records import (
    AdapterSite,
    Array,
    KeyPath,
    Region,
    display,
    first_names,
    full_region,
    grid,
)
from lora_merge_cli.side_by_side import side_by_side
from lora_merge_cli.survival import Moments

if TYPE_CHECKING:
    from lora_merge_cli.numerics import FusedBlock


@dataclass(frozen=True)
class _Block:
    """A run of a leaf's entries before any site is applied."""

    region: Region
    """Where it lies in the leaf."""
    inside: Region
    """Where it lies in its layer; in the leaf where no layers are stacked."""
    values: Array
    base: Array | None
    """The base's values there."""
    update: KernelUpdate | None
    """What the leaf's sites do to its layer."""


class Execution:
    """One run of a plan.

    Args:
        plan: What to do.
        inputs: What the plan was made for.
        device: The JAX device to compute on.
        encodings: What the sink takes as it is stored.
        jobs: How many leaves are read, and how many blocks are computed, at a time. Changes no bit of the result.
        listener: Who to tell of progress.
    """

    def __init__(
        self,
        plan: MergePlan,
        inputs: Inputs,
        device: Any,
        encodings: frozenset[str] = frozenset(),
        jobs: int | None = None,
        listener: Listener | None = None,
    ) -> None:
        self._plan = plan
        self._inputs = inputs
        self._source = inputs.checkpoint.source
        self._reader = FactorReader(inputs)
        self._device = device
        self._encodings = encodings
        self._jobs = jobs_or_default(jobs)
        self._listener = listener or Silent()
        self._wrong_frozen: list[str] = []
        self._frozen = 0
        self.moments: dict[KeyPath, tuple[Moments, ...]] = {}
        """Per changed leaf and layer, once it is done."""
        self.not_finite: dict[str, int] = {}
        """Non-finite entries per untouched leaf that had to be decoded anyway."""
        self.factors = FactorFindings()
        """What was found of the factors."""

    def check(self) -> None:
        """Read every factor once, and whatever must be equal, before anything is written.

        Raises:
            NonFiniteInput: A factor holds NaN or Inf.
            NothingToMerge: Nothing would change: a factor of each site is zero, and no tensor is replaced.
            UnsupportedCheckpoint: Two leaves that the model ties differ.
        """
        self.factors = check_factors(self._plan, self._inputs, self._reader)
        self._refuse_silence()
        for one, other in self._plan.equal:
            self._refuse_unequal(one, other)

    def _refuse_silence(self) -> None:
        plan = self._plan
        silent = {id(site) for site in self.factors.silent if site.operation == AddDelta.name}
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

    def leaves(self) -> Generator[LeafData]:
        """Every output leaf, with its data produced as it is pulled.

        Raises:
            CorruptCheckpoint: An input cannot be read.
            NonFiniteInput: A kernel under an adapter, or what an adapter replaces a tensor by, holds NaN or Inf.
            Unrepresentable: A result is not finite in the dtype that it is stored in.
            WrongBase: Frozen leaves do not equal the base's, known once all were seen.
            NothingToMerge: Every delta turned out to be zero.
        """
        self._listener.start(self._plan.output_bytes)
        decoded = [step for step in self._plan.steps if self._stored(step) is None or step.base is not None]
        with ThreadPoolExecutor(self._jobs, "read") as readers, ThreadPoolExecutor(self._jobs, "compute") as workers:
            makers = [functools.partial(self._read, step, readers) for step in decoded]
            arriving = in_order(makers, self._jobs)
            try:
                for step in self._plan.steps:
                    if step.base is not None:
                        self._frozen += 1
                    yield self._leaf(step, arriving, workers)
            finally:
                arriving.close()
        self._check_base()
        if (
            self.moments
            and not any(found.weight for found in self._plan.replacements)
            and len(delta_is_zero(self.moments)) == len(self.moments)
        ):
            raise NothingToMerge("every delta is zero", where=self._source.path)

    def _stored(self, step: Step) -> Stored | None:
        """What of the checkpoint the sink takes as it is."""
        if step.before is None or step.sites or step.replacements or step.output.dtype != step.before.dtype:
            return None
        stored = self._source.stored(step.before.path)
        return stored if stored is not None and stored.encoding in self._encodings else None

    def _leaf(self, step: Step, arriving: Iterator[Ahead[_Block]], workers: ThreadPoolExecutor) -> LeafData:
        data: Stored | Blocks
        stored = self._stored(step)
        if step.sites:
            data = self._fused(step, next(arriving), workers)
        elif stored is None:
            data = self._carried(step, next(arriving))
        else:
            if step.base is not None:
                self._compare_whole(step, next(arriving))
            self._listener.advance(step.output.name, step.output.nbytes)
            data = stored
        return LeafData(step.output, step.chunk, data, self._plan.shared.get(step.output.path))

    def _carried(self, step: Step, blocks: Iterator[_Block]) -> Blocks:
        """A leaf without a site: decoded, with an adapter's values in it, and cast if need be."""
        differs = False
        for block in blocks:
            differs = differs or not (block.base is None or equals_rounded(block.values, block.base))
            self._count_not_finite(step, block.values)
            yield block.region, _cast(block.values, step, self._source)
            self._listener.advance(step.output.name, nbytes(block.region, step.output))
        self._note_frozen(step, differs)

    def _fused(self, step: Step, blocks: Iterator[_Block], workers: ThreadPoolExecutor) -> Blocks:
        """A kernel with its deltas added, some blocks being computed while earlier ones are stored."""
        pending: deque[tuple[_Block, KernelUpdate, Future[FusedBlock]]] = deque()
        updates: list[KernelUpdate] = []
        differs = False

        def taken() -> tuple[Region, Array]:
            block, update, computed = pending.popleft()
            result = update.take(block.inside, block.values, computed.result())
            self._listener.advance(step.output.name, nbytes(block.region, step.output))
            return block.region, result.reshape(block.values.shape)

        for block in blocks:
            update = block.update
            assert update is not None, "a step with sites has one"
            if not updates or updates[-1] is not update:
                updates.append(update)
            differs = differs or not (block.base is None or equals_rounded(block.values, block.base))
            pending.append((block, update, workers.submit(update.compute, block.inside, block.values, block.base)))
            if len(pending) > self._jobs:
                yield taken()
        while pending:
            yield taken()
        self._note_frozen(step, differs)
        self.moments[step.output.path] = tuple(update.finish() for update in updates)

    def _read(self, step: Step, pool: ThreadPoolExecutor) -> Iterator[_Block]:
        """The blocks of a leaf, and what changes them: layers that are stacked are kernels of their own."""
        regions = list(grid(full_region(step.source.shape), step.block))
        if not step.sites:
            for region, values, base in self._scanned(step, regions, pool):
                yield _Block(region, region, values, base, None)
            return
        stacked = step.sites[0].parameters.equation.stacked
        sites = [one_layer(site) for site in step.sites]
        scanned = self._scanned(step, regions, pool)
        layers = zip(*(self._reader.layers(site) for site in step.sites), strict=True)
        for layer, factors in enumerate(layers):
            here = [region for region in regions if not stacked or region[0].start == layer]
            update = KernelUpdate(
                f"{self._source.path} :: {step.output.name}",
                sites[0].parameters.equation,
                step.source.shape[1:] if stacked else step.source.shape,
                [self._contribution(step, site, own, here, pool) for site, own in zip(sites, factors, strict=True)],
                step.output.dtype,
                self._plan.serving_dtype,
                self._device,
            )
            for region, values, base in itertools.islice(scanned, len(here)):
                yield _Block(region, region[1:] if stacked else region, values, base, update)

    def _contribution(
        self,
        step: Step,
        site: AdapterSite,
        factors: Mapping[str, Array],
        regions: Sequence[Region],
        pool: ThreadPoolExecutor,
    ) -> Contribution:
        """What a site adds to one layer; with a first pass over the kernel where the operation needs one."""
        operation = operation_named(site.operation)
        norms = None
        if operation.needs_norms:
            a, b = (values.astype(np.float32) for values in scaled_factors(site, factors, 1.0))
            shape = step.source.shape[len(step.source.shape) - len(site.parameters.equation.target) :]
            passed = OutputNorms(site.parameters.equation, shape, a, b, self._device)
            for region, values, base in self._scanned(step, regions, pool):
                passed.add(region[len(region) - len(shape) :], values if base is None else base)
            norms = passed.finish()
        return operation.contribute(site, factors, site.weight * self._plan.multiplier, norms)

    def _scanned(
        self, step: Step, regions: Sequence[Region], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Region, Array, Array | None]]:
        """The leaf's values as they start, and the base's, region by region."""
        bases: Iterator[Array | None] = itertools.repeat(None, len(regions))
        if step.base is not None and self._inputs.base is not None:
            bases = self._inputs.base.source.scan(step.base.path, regions, pool)
        for region, values, base in zip(regions, scan_start(self._inputs, step, regions, pool), bases, strict=True):
            if base is not None and step.sites:
                self._refuse_base_not_finite(step, values, base)
            yield region, at_most_float32(values) if step.sites else values, base

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

    def _compare_whole(self, step: Step, blocks: Iterator[_Block]) -> None:
        equal = True
        for block in blocks:
            equal = equal and (block.base is None or equals_rounded(block.values, block.base))
        self._note_frozen(step, not equal)

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
        bad = count_non_finite(values)
        if bad:
            name = step.output.name
            self.not_finite[name] = self.not_finite.get(name, 0) + bad


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
