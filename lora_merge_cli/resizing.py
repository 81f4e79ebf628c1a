"""Resize: an adapter alone, with smaller ranks. From its factors; neither a delta nor a base is needed.

Each module's scaled delta is truncated by its singular values, and the scale goes into the new factors: the new one is 1. What else
the adapter brings is copied bit for bit. `resizing_peft` does so for PEFT's adapters, `resizing_detached` for lora-merge's own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_merge_cli import __version__
from lora_merge_cli.dialects import Tree, detect_adapter_dialect
from lora_merge_cli.dialects.detached import Detached
from lora_merge_cli.errors import UnsupportedCheckpoint, UsageError
from lora_merge_cli.formats import format_named, open_adapter
from lora_merge_cli.formats.hf_dir import ADAPTER_CONFIG, companions
from lora_merge_cli.formats.interface import PROVENANCE, Checkpoint, Destination, LeafData
from lora_merge_cli.inputs import tree_of
from lora_merge_cli.recording import peak_rss, source_record, versions
from lora_merge_cli.records import Array, TensorSpec, first_names, full_region
from lora_merge_cli.resize_report import ResizedRecord, ResizeReport
from lora_merge_cli.resizing_detached import resize_detached
from lora_merge_cli.resizing_factors import DTYPES, ResizedAdapter, Wanted
from lora_merge_cli.resizing_peft import resize_peft
from lora_merge_cli.staging import anchored, check_space, check_target, filesystem, staged
from lora_merge_cli.truncation import check_cut

_WEIGHTS = "adapter_model.safetensors"
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_ROUNDING_WORTH_A_NOTE = 1e-4


@dataclass(frozen=True)
class ResizeRequest:
    """What to resize, and to what: a rank or a share of the energy."""

    adapter: Path
    """The directory of a PEFT adapter, or of one that ``lora-merge extract`` made of a tree; never changed."""
    output: Path | None = None
    """The directory to create; None for a dry run."""
    rank: int | None = None
    """The rank of every module that has a larger one."""
    energy: float | None = None
    """The share of each ``|delta|_F^2`` to keep: every module gets the least rank that does."""
    dtype: str = "keep"
    """What the factors are stored in: one of `resizing_factors.DTYPES`."""
    overwrite: bool = False
    """Whether the output may replace something."""


@dataclass(frozen=True)
class PreparedResize:
    """A new adapter, in memory: the factors, the configuration and the report, before anything is written."""

    request: ResizeRequest
    """What was asked for."""
    checkpoint: Checkpoint
    """The adapter, opened."""
    adapter: ResizedAdapter
    """The new factors and the configuration."""
    report: ResizeReport
    """What there is to say of it; a plan, until it is written."""

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """The directories and files that must not be written to."""
        return _input_paths(self.checkpoint)


def prepare_resize(request: ResizeRequest) -> PreparedResize:
    """Open an adapter, truncate every module, and write nothing.

    The new factors are held in memory: less than the adapter itself.

    Raises:
        UsageError: The request makes no sense.
        InputError: The adapter cannot be opened or read, or a factor is not finite.
        Refused: It is no LoRA adapter, is on experts of a PEFT adapter, or contradicts itself; or the output lies inside it.
        OutputExists: Something is at the output.
    """
    started = time.monotonic()
    _check(request)
    checkpoint = open_adapter(request.adapter)
    if request.output is not None:
        check_target(request.output, _input_paths(checkpoint), overwrite=request.overwrite)
        request = dataclasses.replace(request, output=anchored(request.output))
    adapter = _resized(tree_of(checkpoint), checkpoint, Wanted(request.rank, request.energy, request.dtype))
    report = _report(request, checkpoint, adapter)
    report = dataclasses.replace(report, seconds=time.monotonic() - started, peak_rss_bytes=peak_rss())
    return PreparedResize(request, checkpoint, adapter, report)


def resize(
    prepared: PreparedResize | ResizeRequest, beside: Callable[[ResizeReport, Path], None] | None = None
) -> ResizeReport:
    """Write a resized adapter. It appears complete or not at all.

    Args:
        prepared: What `prepare_resize` made, or the request.
        beside: Called with the finished report and the staged directory before that is published; if it raises, it is not.

    Raises:
        LoraMergeError: See `prepare_resize`; or the disk is full, or the operating system denies access.
    """
    started = time.monotonic()
    if isinstance(prepared, ResizeRequest):
        prepared = prepare_resize(prepared)
    target = prepared.request.output
    if target is None:
        raise UsageError("an output is needed", hint="pass -o OUT")
    names = _companions(prepared.checkpoint)
    beside_bytes = sum((prepared.checkpoint.directory / name).stat().st_size for name in names)
    check_space(target, prepared.report.bytes_after + beside_bytes)
    with staged(target, overwrite=prepared.request.overwrite) as stage:
        _write(prepared, stage, names)
        seconds = (prepared.report.seconds or 0) + time.monotonic() - started
        report = dataclasses.replace(
            prepared.report, status="resized", seconds=seconds, peak_rss_bytes=peak_rss(), versions=versions()
        )
        with filesystem(stage):
            (stage / PROVENANCE).write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
        if beside is not None:
            beside(report, stage)
    return report


def _check(request: ResizeRequest) -> None:
    check_cut(request.rank, request.energy)
    if request.dtype not in DTYPES:
        raise UsageError("--dtype has no such value", expected=", ".join(DTYPES), found=request.dtype)
    if request.output is not None and request.output.suffix in _FILE_SUFFIXES:
        raise UsageError(
            "an adapter is written as a directory", where=request.output, hint="give -o a directory's name"
        )


def _input_paths(checkpoint: Checkpoint) -> tuple[Path, ...]:
    return checkpoint.given, checkpoint.directory, checkpoint.source.path


def _resized(tree: Tree, checkpoint: Checkpoint, wanted: Wanted) -> ResizedAdapter:
    dialect = detect_adapter_dialect(tree)
    if dialect.name == "peft":
        return resize_peft(tree, dialect, checkpoint, wanted)
    if isinstance(dialect, Detached):
        return resize_detached(tree, dialect, checkpoint, wanted)
    raise UnsupportedCheckpoint(
        f"resizing an adapter of {dialect.name} is not supported",
        where=tree.where,
        expected="a PEFT adapter of peft_type LORA (LoRA, rsLoRA, DoRA), or one that lora-merge extract made",
    )


def _companions(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What lies beside the adapter and belongs to it: its model card, a tokenizer."""
    return companions(checkpoint.directory, ()) if checkpoint.directory.is_dir() else ()


def _write(prepared: PreparedResize, stage: Path, names: Sequence[str]) -> None:
    checkpoint = prepared.checkpoint
    destination = Destination(stage, _WEIGHTS)
    sink = format_named("safetensors").sink(destination, checkpoint)
    index = checkpoint.source.index()
    specs = _specs(checkpoint, prepared.adapter)
    leaves = (
        _leaf(checkpoint, old, new, prepared.adapter.factors.get(old.path))
        for old, new in zip(index.tensors.values(), specs, strict=True)
    )
    sink.write(specs, leaves, index.constants)
    for name in names:
        place = stage / name
        with filesystem(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, place)
    text = json.dumps(prepared.adapter.config, indent=2, sort_keys=True)
    with filesystem(stage):
        (stage / ADAPTER_CONFIG).write_text(f"{text}\n", encoding="utf-8")


def _specs(checkpoint: Checkpoint, adapter: ResizedAdapter) -> list[TensorSpec]:
    """What the output's tensors are, in the adapter's order."""
    found = []
    for path, old in checkpoint.source.index().tensors.items():
        new = dataclasses.replace(old, path=adapter.paths[path])
        values = adapter.factors.get(path)
        found.append(new if values is None else dataclasses.replace(new, shape=values.shape, dtype=values.dtype))
    return found


def _leaf(checkpoint: Checkpoint, old: TensorSpec, new: TensorSpec, values: Array | None) -> LeafData:
    stored = None if values is not None else checkpoint.source.stored(old.path)
    if stored is not None:
        return LeafData(new, new.shape, stored)
    region = full_region(new.shape)
    if values is None:
        values = checkpoint.source.read(old.path, region)
    return LeafData(new, new.shape, iter([(region, values)]))


def _report(request: ResizeRequest, checkpoint: Checkpoint, adapter: ResizedAdapter) -> ResizeReport:
    summary, records = adapter.summary, adapter.records
    specs = _specs(checkpoint, adapter)
    after = dict(zip(checkpoint.source.index().tensors, specs, strict=True))
    total_sq = sum(record.norm**2 for record in records)
    kept_sq = sum(record.energy_kept * record.norm**2 for record in records)
    error_sq = sum(((record.relative_error or 0.0) * record.norm) ** 2 for record in records)
    return ResizeReport(
        status="planned",
        tool_version=__version__,
        sources=(source_record("adapter", checkpoint),),
        notes=(*checkpoint.notes, *summary.notes, *adapter.notes, *_notes(checkpoint, adapter)),
        output=None if request.output is None else str(request.output),
        method=summary.method,
        base=summary.base,
        rank=request.rank,
        energy=request.energy,
        modules=records,
        energy_kept=min(1.0, kept_sq / total_sq) if total_sq else 1.0,
        relative_error=math.sqrt(error_sq / total_sq) if total_sq else None,
        factor_bytes_before=sum(spec.nbytes for spec in adapter.pairs),
        factor_bytes_after=sum(after[spec.path].nbytes for spec in adapter.pairs),
        bytes_before=checkpoint.source.index().nbytes,
        bytes_after=sum(spec.nbytes for spec in specs),
    )


def _notes(checkpoint: Checkpoint, adapter: ResizedAdapter) -> Iterator[str]:
    summary, records = adapter.summary, adapter.records
    same = [record for record in records if record.rank_after == record.rank_before]
    if same:
        names = first_names((record.module for record in same), 3)
        yield f"{len(same)} of {len(records)} modules need no smaller rank than they have: unchanged ({names})"
    zero = [record.module for record in records if not record.norm]
    if zero:
        yield f"{len(zero)} of {len(records)} deltas are exactly zero: {first_names(zero, 3)}"
    if summary.riding:
        yield f"copied bit for bit: {first_names(summary.riding)}"
    rounded = max((_rounding(record) for record in records), default=0.0)
    if rounded > _ROUNDING_WORTH_A_NOTE:
        dtypes = ", ".join(sorted({record.dtype_after for record in records}))
        yield f"rounding the new factors to {dtypes} costs up to {rounded:.1g} of a delta: --dtype float32 avoids it"
    if checkpoint.format != "safetensors":
        yield f"written as {_WEIGHTS}, whatever the adapter is"


def _rounding(record: ResizedRecord) -> float:
    """The relative error that is not the truncation's."""
    error = record.relative_error or 0.0
    return math.sqrt(max(0.0, error**2 - (1 - record.energy_kept))) if record.energy_kept < 1 or error else 0.0
