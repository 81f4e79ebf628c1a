"""A fine-tune whose adapters are merged as they are read: to everybody else a dense checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli.blocks import Block, BlockReader
from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.errors import UnsupportedCheckpoint, WrongBase
from lora_merge_cli.factors import FactorReader, check_factors
from lora_merge_cli.fine_tunes import of_fine_tune
from lora_merge_cli.formats.interface import Source, Stored
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.leaf_work import ChainedWork, FusedWork, LeafWork, cast
from lora_merge_cli.operations import is_row_operation
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.plan import MergePlan, Step, plan_merge
from lora_merge_cli.reading import refuse_unequal
from lora_merge_cli.records import Array, Index, KeyPath, Region, TensorSpec, first_names, offset, region_shape


class FusedSource:
    """A checkpoint with adapters inside, or a base with some beside it, as a `Source` of merged leaves.

    What adapters change or bring is float32, whatever it is stored in: it is not rounded before something else is made of it. All
    other leaves are as they are stored. With a base, deltas are added to its own values, as `merge --base` does.

    Args:
        inputs: What is merged.
        options: How; its dtypes do not count.
        device: The JAX device to compute on.

    Raises:
        Refused: The merge would be wrong or pointless, see `plan.plan_merge`; or it would change the model's configuration, which
            several fine-tunes have in common.
        NonFiniteInput: A factor holds NaN or Inf.
    """

    def __init__(self, inputs: Inputs, options: MergeOptions, device: Any) -> None:
        plain = of_fine_tune(inputs, options)
        self._inputs = inputs
        self._plan = plan_merge(inputs, dataclasses.replace(plain, dtype="float32"))
        self._factors = FactorReader(inputs)
        self._blocks = BlockReader([self._plan], inputs, self._factors, device)
        self._device = device
        self._steps = {step.output.path: step for step in self._plan.steps}
        self.declared: Mapping[KeyPath, np.dtype[Any]] = {
            step.output.path: step.output.dtype for step in plan_merge(inputs, plain).steps
        }
        """What a merge would store each leaf in by default."""
        self.warnings: tuple[str, ...] = (*self._plan.warnings, *_assumptions(self._plan))
        """What should make a reader of such a merge stop."""
        self._digests = check_factors(self._plan, inputs, self._factors).digests
        _refuse_other_config(self._plan, inputs)

    @property
    def path(self) -> Path:
        """See `Source.path`."""
        return self._source.path

    @property
    def _source(self) -> Source:
        return self._inputs.checkpoint.source

    @functools.cached_property
    def _index(self) -> Index:
        return Index({path: step.output for path, step in self._steps.items()}, self._plan.constants, self._plan.shared)

    def index(self) -> Index:
        """See `Source.index`."""
        return self._index

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:
        """See `Source.scan`.

        Raises:
            NonFiniteInput: A kernel under an adapter holds NaN or Inf.
            WrongBase: A kernel is not the base's, rounded.
            Unrepresentable: A merged kernel is beyond float32.
        """
        step = self._steps[path]
        if step.before is not None and not (step.sites or step.replacements):
            yield from self._source.scan(step.before.path, regions, pool)
            return
        yield from recut(step.output, self._merged(step), regions)

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`."""
        step = self._steps[path]
        if step.before is not None and not (step.sites or step.replacements):
            return self._source.read(step.before.path, region)
        (whole,) = self.scan(path, [tuple(slice(0, extent) for extent in step.output.shape)])
        return whole[region]

    def stored(self, path: KeyPath) -> Stored | None:
        """See `Source.stored`."""
        step = self._steps[path]
        if step.before is None or step.sites or step.replacements:
            return None
        return self._source.stored(step.before.path)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        digest = hashlib.sha256(self._source.fingerprint().encode())
        for site, factors in zip(self._plan.sites, self._digests, strict=True):
            digest.update(repr((site.name, site.operation, site.parameters.scale.value, site.weight, factors)).encode())
        return f"sha256:{digest.hexdigest()}"

    def _merged(self, step: Step) -> Iterator[tuple[Region, Array]]:
        work = self._work(step)
        with ThreadPoolExecutor(1) as pool:
            for block in self._blocks.read([step], pool):
                self._refuse_other_base(step, block)
                if work is None:
                    yield block.region, cast(block.sides.values, step, self._source)
                else:
                    yield block.region, work.take(block, work.compute(block))

    def _refuse_other_base(self, step: Step, block: Block) -> None:
        base = block.sides.base
        if base is not None and self._inputs.base is not None and not equals_rounded(block.sides.values, base):
            raise WrongBase(
                "the base is not what the fine-tune started from",
                where=f"{self._inputs.base.source.path} :: {step.output.name}",
                expected=f"the kernel of {self.path} once rounded to {step.source.dtype.name}, bit for bit",
            )

    def _work(self, step: Step) -> LeafWork | None:
        if not step.sites:
            return None
        if any(is_row_operation(site.operation) for site in step.sites):
            return ChainedWork(step, self._source, step.output.dtype, self._device, self._plan.rounding)
        return FusedWork(step, 0, self._source, step.output.dtype)


def _assumptions(plan: MergePlan) -> Iterator[str]:
    """Scales that nobody states."""
    sources = [site.parameters.scale.source for site in plan.sites if site.parameters.scale.assumed]
    if sources:
        yield f"{len(sources)} scales are assumed: {first_names(dict.fromkeys(sources), 2)}"


def _refuse_other_config(plan: MergePlan, inputs: Inputs) -> None:
    if plan.config:
        raise UnsupportedCheckpoint(
            "a fine-tune whose adapter changes the model's configuration, beside others",
            where=inputs.source(0 if inputs.adapters else None).path,
            found=", ".join(plan.config),
            hint="merge it first, and join the result",
        )
    for one, other in plan.equal:
        refuse_unequal(inputs.checkpoint.source, one, other)


def recut(spec: TensorSpec, blocks: Iterator[tuple[Region, Array]], regions: Iterable[Region]) -> Iterator[Array]:
    """The values in some regions of a leaf that comes in blocks of its own cut.

    Args:
        spec: The leaf.
        blocks: All of it: runs of entries in row-major order, one behind the other.
        regions: Such runs too, ascending and disjoint.
    """
    held: list[Array] = []
    start = stop = 0
    for region in regions:
        size = math.prod(region_shape(region))
        first = offset(spec.shape, region)
        while stop < first + size:
            _, values = next(blocks)
            held.append(values.reshape(-1))
            stop += values.size
            while held and start + held[0].size <= first:
                start += held.pop(0).size
        flat = held[0] if len(held) == 1 else np.concatenate(held)
        yield flat[first - start : first - start + size].reshape(region_shape(region))
