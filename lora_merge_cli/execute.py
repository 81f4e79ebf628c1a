"""The only loop: reads, computes on the device, yields blocks. What it learned on the way is in `Execution` afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lora_merge_cli.compare import equals_rounded
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import NonFiniteInput, NothingToMerge, Unrepresentable, WrongBase
from lora_merge_cli.formats.interface import Blocks, LeafData, Source
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.lowrank import adapter_digest, spectrum
from lora_merge_cli.operations import operation_named
from lora_merge_cli.operations.interface import Pending, Update
from lora_merge_cli.plan import MergePlan, Step
from lora_merge_cli.records import (
    Array,
    KeyPath,
    Region,
    TensorSpec,
    first_names,
    full_region,
    grid,
    region_shape,
    relative,
)
from lora_merge_cli.survival import Moments

_TILES_IN_FLIGHT = 3
_READ_AHEAD_BYTES = 256 * 2**20


class Execution:
    """One run of a plan.

    Args:
        plan: What to do.
        source: The checkpoint that the plan was made for.
        base: The base that the plan was made with, if any.
        device: The JAX device to compute on.
        encodings: What the sink takes as it is stored.
        listener: Who to tell of progress.
    """

    def __init__(
        self,
        plan: MergePlan,
        source: Source,
        base: Source | None,
        device: Any,
        encodings: frozenset[str] = frozenset(),
        listener: Listener | None = None,
    ) -> None:
        self._plan = plan
        self._source = source
        self._base = base
        self._device = device
        self._encodings = encodings
        self._listener = listener or Silent()
        self._wrong_frozen: list[str] = []
        self._frozen = 0
        self.moments: dict[str, tuple[Moments, ...]] = {}
        """Per site and layer, once its kernel is done."""
        self.not_finite: dict[str, int] = {}
        """Non-finite entries per untouched leaf that had to be decoded anyway."""
        self.adapter_digests: dict[str, str] = {}
        """Per site, a digest of its factors' names, shapes, dtypes and values."""
        self.spectra: dict[str, tuple[float, ...]] = {}
        """Per site, the singular values of its delta; see `lowrank.spectrum`."""

    def check_factors(self) -> None:
        """Read every factor once, before anything is written.

        Raises:
            NonFiniteInput: A factor holds NaN or Inf.
            NothingToMerge: Every delta is zero, since one factor of each pair is.
        """
        silent = 0
        sites = self._plan.sites
        for site in sites:
            factors = {role: self._finite_factor(path) for role, path in site.factors.items()}
            self.adapter_digests[site.name] = adapter_digest(factors)
            silent += any(not values.any() for _, values in factors.values())
        if self._plan.multiplier == 0 or silent == len(sites):
            why = "--scale is 0" if self._plan.multiplier == 0 else "a factor of each site is zero"
            raise NothingToMerge(
                f"every delta is zero: {why}",
                where=self._source.path,
                hint="the adapter was never trained, or this is the wrong step",
            )

    def _finite_factor(self, path: KeyPath) -> tuple[TensorSpec, Array]:
        spec = self._plan.factors[path]
        values = self._read_whole(spec)
        bad = int(np.sum(~np.isfinite(values.astype(np.float32))))
        if bad:
            raise NonFiniteInput(
                "a factor is not finite",
                where=f"{self._source.path} :: {spec.name}",
                expected="finite values",
                found=f"{bad} of {spec.size} entries NaN or Inf",
            )
        return spec, values

    def leaves(self) -> Iterator[LeafData]:
        """Every output leaf, with its data produced as it is pulled.

        Raises:
            CorruptCheckpoint: An input cannot be read.
            NonFiniteInput: A kernel under an adapter holds NaN or Inf.
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
        if len(delta_is_zero(self.moments)) == len(self.moments):
            raise NothingToMerge("every delta is zero", where=self._source.path)

    def _leaf(self, step: Step) -> LeafData:
        if step.origin == "changed":
            return LeafData(step.output, step.write_block, self._fused(step))
        stored = self._source.stored(step.source.path) if step.origin == "copied" else None
        if stored is None or stored.encoding not in self._encodings:
            return LeafData(step.output, step.write_block, self._carried(step))
        if step.base is not None:
            self._compare_whole(step)
        self._listener.advance(step.output.name, step.output.nbytes)
        return LeafData(step.output, step.write_block, stored)

    def _carried(self, step: Step) -> Blocks:
        """An untouched leaf, decoded, and cast if asked."""
        differs = False
        for region, values, base in self._blocks(step):
            differs = differs or not (base is None or equals_rounded(values, base))
            self._count_not_finite(step, values)
            for part in grid(region, step.write_block):
                piece = values[relative(part, region)]
                yield part, _cast(piece, step, self._source)
                self._listener.advance(step.output.name, _nbytes(part, step.output))
        self._note_frozen(step, differs)

    def _fused(self, step: Step) -> Blocks:
        """A kernel with its delta added."""
        site = step.site
        assert site is not None, "only a site changes a leaf"
        factors = {role: self._read_whole(self._plan.factors[p]) for role, p in site.factors.items()}
        update = operation_named(site.operation).init(
            site,
            f"{self._source.path} :: {site.name}",
            step.source.shape,
            factors,
            step.output.dtype,
            self._plan.serving_dtype,
            self._plan.multiplier,
            self._device,
        )
        differs = False
        for region, values, base in self._blocks(step):
            differs = differs or not (base is None or equals_rounded(values, base))
            for part in grid(region, step.write_block):
                inside = relative(part, region)
                yield (
                    part,
                    _computed(
                        update,
                        step,
                        part,
                        values[inside],
                        None if base is None else base[inside],
                    ),
                )
                self._listener.advance(step.output.name, _nbytes(part, step.output))
        self._note_frozen(step, differs)
        self.moments[site.name] = update.finish()
        parameters = site.parameters
        scale = (parameters.scale.value or 0.0) * self._plan.multiplier
        self.spectra[site.name] = spectrum(parameters.equation, factors["lora_a"], factors["lora_b"], scale)

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
        values = self._source.read(step.source.path, region)
        if step.base is None or self._base is None:
            return values, None
        return values, self._base.read(step.base.path, region)

    def _read_whole(self, spec: TensorSpec) -> Array:
        return self._source.read(spec.path, full_region(spec.shape))

    def _compare_whole(self, step: Step) -> None:
        blocks = self._blocks(step)
        self._note_frozen(step, not all(base is None or equals_rounded(values, base) for _, values, base in blocks))

    def _note_frozen(self, step: Step, differs: bool) -> None:
        if differs:
            self._wrong_frozen.append(step.source.name)

    def _check_base(self) -> None:
        if self._wrong_frozen and self._base is not None:
            raise WrongBase(
                "the base is not what the fine-tune started from",
                where=self._base.path,
                expected="every frozen leaf to equal the base's, rounded to its dtype, bit for bit",
                found=f"{len(self._wrong_frozen)} of {self._frozen} that differ: {first_names(self._wrong_frozen, 3)}",
            )

    def _count_not_finite(self, step: Step, values: Array) -> None:
        if is_float(values.dtype):
            bad = int(np.sum(~np.isfinite(values)))
            if bad:
                name = step.output.name
                self.not_finite[name] = self.not_finite.get(name, 0) + bad


def _computed(update: Update, step: Step, part: Region, values: Array, base: Array | None) -> Array:
    """One write block, tile by tile, with a few tiles on the device at a time."""
    result = np.empty(region_shape(part), step.output.dtype)
    pending: deque[tuple[Region, Pending]] = deque()
    for tile in grid(part, step.tile):
        inside = relative(tile, part)
        kernel = _at_most_float32(np.ascontiguousarray(values[inside]))
        added_to = None if base is None else np.ascontiguousarray(base[inside])
        pending.append((inside, update.step(tile, kernel, added_to)))
        if len(pending) >= _TILES_IN_FLIGHT:
            done, waiting = pending.popleft()
            result[done] = waiting.result()
    for done, waiting in pending:
        result[done] = waiting.result()
    return result


def _at_most_float32(values: Array) -> Array:
    return values.astype(np.float32) if values.dtype == np.float64 else values


def _cast(values: Array, step: Step, source: Source) -> Array:
    if step.origin == "copied":
        return values
    with np.errstate(over="ignore"):
        result = values.astype(step.output.dtype)
    if np.isfinite(values).all() and not np.isfinite(result).all():
        raise Unrepresentable(
            f"an untouched leaf overflows {step.output.dtype.name}",
            where=f"{source.path} :: {step.output.name}",
            hint="use --dtype-untouched keep, float32 or bfloat16",
        )
    return np.asarray(result)


def _nbytes(region: Region, spec: TensorSpec) -> int:
    return int(np.prod(region_shape(region))) * spec.dtype.itemsize


def delta_is_zero(moments: Mapping[str, tuple[Moments, ...]]) -> list[str]:
    """The sites whose delta is exactly zero."""
    return [name for name, layers in moments.items() if Moments.total(layers).max_abs == 0]
