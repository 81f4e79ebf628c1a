"""The plan of a merge: every question that needs no tensor bytes, answered before the first one is read. Pure; needs no JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lora_merge_cli.dialects import Dialect, ScaleOptions, looks_like_adapter
from lora_merge_cli.dtypes import dtype_named, is_float, is_float8
from lora_merge_cli.errors import (
    AlreadyMerged,
    NothingToMerge,
    UnsupportedCheckpoint,
    UsageError,
    WrongBase,
)
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.operations import operation_named
from lora_merge_cli.records import (
    AdapterSite,
    Constant,
    Dropped,
    Index,
    KeyPath,
    ModelSummary,
    TensorSpec,
    first_names,
)
from lora_merge_cli.selection import excluded_factors, select_sites

DTYPE_CHOICES = ("auto", "keep", "float32", "bfloat16", "float16")

_READ_TARGET = 64 * 2**20
_WRITE_TARGET = 128 * 2**20
_PIPELINE = 4
_BYTES_IN_FLIGHT = 256 * 2**20  # about what a sink keeps waiting
_FACTOR_BYTES_PER_ENTRY = 32  # two factors and a basis in float32, and the float64 copies that the basis is made from
_RUNTIME_BYTES = 400 * 2**20


@dataclass(frozen=True)
class MergeOptions:
    """What the user asks of a merge."""

    scales: ScaleOptions = field(default_factory=ScaleOptions)
    """What is known about alphas."""
    multiplier: float = 1.0
    """What every delta is multiplied by besides its scale; 1 is as trained."""
    dtype: str = "auto"
    """The dtype of the leaves that change; one of `DTYPE_CHOICES`."""
    dtype_untouched: str = "keep"
    """The dtype of the leaves that do not change; any of `DTYPE_CHOICES` but auto."""
    include: tuple[str, ...] = ()
    """Globs of sites to merge; all if empty."""
    exclude: tuple[str, ...] = ()
    """Globs of sites not to merge."""


@dataclass(frozen=True)
class Step:
    """One output leaf, and where it comes from."""

    output: TensorSpec
    """What is written."""
    source: TensorSpec
    """The leaf that it comes from."""
    origin: Literal["copied", "cast", "changed"]
    """Copied bit for bit, cast to another dtype, or changed by `site`."""
    read_block: tuple[int, ...]
    """What is read at a time: whole chunks and whole tiles."""
    write_block: tuple[int, ...]
    """What is written at a time: a part of `read_block`."""
    tile: tuple[int, ...] = ()
    """What is computed at a time; depends on the leaf's shape alone."""
    site: AdapterSite | None = None
    """The adapter that changes it."""
    base: TensorSpec | None = None
    """The base's leaf: to add the delta to, and to compare with."""


@dataclass(frozen=True)
class MergePlan:
    """All that a merge will do. A dry run prints it, a run executes it.

    Every input leaf is in exactly one of: a step, the factors of a site, `dropped`.
    """

    dialect: str
    """The trainer's conventions."""
    model: ModelSummary
    """Which model the checkpoint is of."""
    steps: tuple[Step, ...]
    """The output's leaves in the input's order."""
    constants: tuple[Constant, ...]
    """The output's parts that are no arrays."""
    sites: tuple[AdapterSite, ...]
    """The adapters that are merged; their factors are consumed."""
    dropped: tuple[Dropped, ...]
    """Leaves that the output does not have, and why."""
    factors: Mapping[KeyPath, TensorSpec]
    """The factors of `sites`."""
    multiplier: float
    """What every delta is multiplied by besides its scale."""
    serving_dtype: np.dtype[Any]
    """What servers cast the result to."""
    notes: tuple[str, ...]
    """What a reader of the report should know."""
    peak_bytes: int
    """An estimate of the largest resident size."""
    output_bytes: int
    """The size of all output arrays before compression."""


def plan_merge(
    checkpoint: Checkpoint, dialect: Dialect, options: MergeOptions, base: Checkpoint | None = None
) -> MergePlan:
    """Plan the merge of the adapters inside a checkpoint into its own kernels.

    Raises:
        UsageError: An option has no valid value, or a glob matches no site.
        Refused: The merge would be wrong or pointless; see its subclasses.
    """
    check_options(options)
    index = checkpoint.source.index()
    where = str(checkpoint.source.path)
    survey = dialect.survey(index, options.scales, where)
    chosen, excluded = select_sites(dialect, survey.sites, options.include, options.exclude)
    if survey.problems:
        raise survey.problems[0]
    if not chosen:
        raise nothing_to_merge(checkpoint, index)
    unscaled = [site for site in chosen if site.parameters.scale.value is None]
    if unscaled:
        raise dialect.unknown_scale(unscaled, where)
    dropped = [*survey.dropped, *excluded_factors(excluded)]
    factors = {path: index.tensors[path] for site in chosen for path in site.factors.values()}
    gone = {*factors, *(leaf.path for leaf in dropped)}
    by_target = {target: site for site in chosen for target in site.targets}
    bases = match_base(checkpoint, dialect, index, chosen, base)
    steps = tuple(
        _step(checkpoint, dialect, spec, by_target.get(path), options, bases.get(path), base)
        for path, spec in index.tensors.items()
        if path not in gone
    )
    notes = [*checkpoint.notes, *survey.notes]
    if excluded:
        notes.append(
            f"{len(excluded)} of {len(survey.sites)} adapters are left out by --include and --exclude: "
            "the result does not act as the fine-tune did"
        )
    if base is not None:
        notes.append(
            "with --base each delta is added to the base's own values, not to the rounded kernel that the fine-tune ran on"
        )
    return MergePlan(
        dialect=dialect.name,
        model=dialect.summary(index),
        steps=steps,
        constants=index.constants,
        sites=chosen,
        dropped=tuple(dropped),
        factors=factors,
        multiplier=options.multiplier,
        serving_dtype=dialect.serving_dtype,
        notes=tuple(notes),
        peak_bytes=_peak_bytes(steps, factors),
        output_bytes=sum(step.output.nbytes for step in steps),
    )


def cast_dtype(choice: str, stored: np.dtype[Any], auto: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that a choice of `DTYPE_CHOICES` stands for."""
    if choice == "auto":
        return auto
    return stored if choice == "keep" else dtype_named(choice)


def check_options(options: MergeOptions, dtypes: Sequence[str] = DTYPE_CHOICES) -> None:
    """Refuse options without a valid value; `dtypes` are the valid ones for the leaves that change.

    Raises:
        UsageError: One has none.
    """
    for flag, value, choices in (
        ("--dtype", options.dtype, dtypes),
        ("--dtype-untouched", options.dtype_untouched, DTYPE_CHOICES[1:]),
    ):
        if value not in choices:
            raise UsageError(f"{flag} has no such value", expected=", ".join(choices), found=value)
    if not math.isfinite(options.multiplier):
        raise UsageError("--scale must be a finite number", found=options.multiplier)


def nothing_to_merge(checkpoint: Checkpoint, index: Index) -> NothingToMerge:
    """The refusal of a checkpoint without chosen sites, and why there are none."""
    where = checkpoint.source.path
    if checkpoint.provenance is not None:
        return AlreadyMerged(
            "already merged: no adapters are left",
            where=where,
            found=f"{checkpoint.provenance.name} of an earlier merge",
            hint="serve it as it is",
        )
    if any(map(looks_like_adapter, index.tensors)):
        return NothingToMerge("nothing to merge: --include and --exclude leave no site", where=where)
    return NothingToMerge(
        "nothing to merge: no adapter keys, so it is already merged or was trained without LoRA",
        where=where,
        found=f"{len(index.tensors)} leaves, none with lora in its name",
    )


def match_base(
    checkpoint: Checkpoint,
    dialect: Dialect,
    index: Index,
    sites: Sequence[AdapterSite],
    base: Checkpoint | None,
) -> Mapping[KeyPath, TensorSpec]:
    """The base's leaf for each leaf that the fine-tune froze.

    Raises:
        WrongBase: The base does not have them all, in the same shapes.
    """
    if base is None:
        return {}
    available = {dialect.canonical(path): spec for path, spec in base.source.index().tensors.items()}
    frozen = [path for path, group in dialect.grouping(index, tuple(sites)).items() if group in ("frozen", "lora")]
    matched, wrong = {}, []
    for path in frozen:
        spec = available.get(dialect.canonical(path))
        if spec is None or spec.shape != index.tensors[path].shape:
            found = "missing" if spec is None else f"shape {spec.shape}"
            wrong.append(f"{index.tensors[path].name} ({found})")
        else:
            matched[path] = spec
    if wrong:
        raise WrongBase(
            "the base does not have the leaves that the fine-tune froze",
            where=base.source.path,
            expected=f"{len(frozen)} frozen leaves of {checkpoint.source.path}",
            found=f"{len(wrong)} missing or of another shape: {first_names(wrong, 3)}",
            hint="give the checkpoint that the fine-tune started from",
        )
    return matched


def _step(
    checkpoint: Checkpoint,
    dialect: Dialect,
    spec: TensorSpec,
    site: AdapterSite | None,
    options: MergeOptions,
    base_spec: TensorSpec | None,
    base: Checkpoint | None,
) -> Step:
    _refuse_unfit_dtypes(checkpoint, spec, site, options)
    chunks = [checkpoint.source.chunk(spec.path)]
    tile: tuple[int, ...] = ()
    dtype = spec.dtype
    origin: Literal["copied", "cast", "changed"] = "copied"
    if site is not None:
        tile = operation_named(site.operation).tile(site, spec.shape)
        dtype = cast_dtype(options.dtype, spec.dtype, dialect.fused_dtype(spec.dtype))
        origin = "changed"
    elif is_float(spec.dtype) and spec.kind == "array":
        dtype = cast_dtype(options.dtype_untouched, spec.dtype, spec.dtype)
        origin = "copied" if dtype == spec.dtype else "cast"
    if base is not None and base_spec is not None:
        chunks.append(base.source.chunk(base_spec.path))
    output = TensorSpec(spec.path, spec.shape, dtype, spec.kind)
    read_block = _read_block(spec, [*chunks, tile] if tile else chunks)
    return Step(
        output=output,
        source=spec,
        origin=origin,
        read_block=read_block,
        write_block=_write_block(output, read_block, tile),
        tile=tile,
        site=site,
        base=base_spec,
    )


def _refuse_unfit_dtypes(
    checkpoint: Checkpoint, spec: TensorSpec, site: AdapterSite | None, options: MergeOptions
) -> None:
    leaves = [spec]
    if site is not None:
        index = checkpoint.source.index()
        leaves += [index.tensors[path] for path in site.factors.values()]
        integers = [leaf for leaf in leaves if not is_float(leaf.dtype)]
        if integers:
            raise UnsupportedCheckpoint(
                "a kernel or factor that is not floating-point, as if quantised",
                where=f"{checkpoint.source.path} :: {integers[0].name}",
                found=integers[0].dtype.name,
                hint="merge into the checkpoint that it was quantised from",
            )
    flag, wanted = ("--dtype", options.dtype) if site else ("--dtype-untouched", options.dtype_untouched)
    if is_float8(spec.dtype) and wanted != "keep":
        raise UnsupportedCheckpoint(
            "a float8 leaf that would change its dtype",
            where=f"{checkpoint.source.path} :: {spec.name}",
            found=spec.dtype.name,
            hint=f"pass {flag} keep",
        )
    if site is not None and spec.dtype == np.float64 and wanted == "keep":
        raise UnsupportedCheckpoint(
            "a float64 kernel under an adapter, and the arithmetic is float32",
            where=f"{checkpoint.source.path} :: {spec.name}",
            hint="pass --dtype float32",
        )


def _read_block(spec: TensorSpec, units: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The smallest block of whole units (chunks, tiles) per axis, grown from the last axis on up to a size worth a read."""
    block = [
        min(n, math.lcm(*(unit[axis] if unit[axis] < n else n for unit in units)) if n else 1)
        for axis, n in enumerate(spec.shape)
    ]
    size = math.prod(block) * spec.dtype.itemsize
    for axis in reversed(range(len(block))):
        room = max(1, _READ_TARGET // max(size, 1))
        grown = min(spec.shape[axis], block[axis] * room)
        size = size * grown // max(block[axis], 1)
        block[axis] = grown
        if grown < spec.shape[axis]:
            break
    return tuple(max(extent, 1) for extent in block)


def _write_block(output: TensorSpec, read_block: Sequence[int], tile: Sequence[int]) -> tuple[int, ...]:
    """A part of the read block that is small enough to hold several of: a layer where layers are stacked."""
    block = list(read_block)
    for axis in range(len(block)):
        unit = tile[axis] if tile else 1
        size = math.prod(block) * output.dtype.itemsize
        is_stack = axis == 0 and len(block) > 2
        if size <= _WRITE_TARGET and not is_stack:
            break
        wanted = 1 if is_stack else max(1, block[axis] * _WRITE_TARGET // size)
        block[axis] = max(unit, wanted // unit * unit)
    return tuple(block)


def _peak_bytes(steps: Sequence[Step], factors: Mapping[KeyPath, TensorSpec]) -> int:
    """An estimate: the largest block read and what it was decoded from, and beside it what still waits to be stored."""
    reading = writing = 0
    waiting = _BYTES_IN_FLIGHT
    for step in steps:
        read = math.prod(step.read_block) * step.source.dtype.itemsize
        if step.origin == "copied":
            # A stored value is kept in one piece until the format has it.
            waiting = max(waiting, read)
        if step.base is not None:
            read += math.prod(step.read_block) * step.base.dtype.itemsize
        reading = max(reading, read)
        writing = max(writing, math.prod(step.write_block) * step.output.dtype.itemsize)
    held = max((spec.size for spec in factors.values()), default=0)
    return _RUNTIME_BYTES + 2 * reading + 2 * waiting + _PIPELINE * writing + held * _FACTOR_BYTES_PER_ENTRY
