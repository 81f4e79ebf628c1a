"""Resize: an adapter alone, with smaller ranks. From its factors; neither a delta nor a base is needed.

Each module's scaled delta ``s * B @ A`` is truncated by its singular values, and the scale goes into the new factors: the new
adapter's is 1, by ``lora_alpha`` equal to ``r``. What else the adapter brings is copied bit for bit.

Source: the method is that of huggingface/peft 0.21, ``tuners/lora/conversion.py``, which truncates deltas to LoRA factors too; here
the SVD is exact, and of the factors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli import __version__
from lora_merge_cli.compare import count_non_finite
from lora_merge_cli.dialects import ScaleOptions, Tree, detect_adapter_dialect
from lora_merge_cli.dialects.peft.config import LORA, AdapterConfig, read_config
from lora_merge_cli.dialects.peft.keys import Layer, read_keys
from lora_merge_cli.dialects.peft.patterns import rank_of, scale_of
from lora_merge_cli.dialects.peft.sites import pattern_name
from lora_merge_cli.dtypes import FLOAT32
from lora_merge_cli.errors import (
    NonFiniteInput,
    ShapeMismatch,
    UnknownScale,
    Unrepresentable,
    UnsupportedCheckpoint,
    UsageError,
)
from lora_merge_cli.formats import format_named, open_adapter
from lora_merge_cli.formats.hf_dir import ADAPTER_CONFIG, companions
from lora_merge_cli.formats.interface import PROVENANCE, Checkpoint, Destination, LeafData
from lora_merge_cli.inputs import tree_of
from lora_merge_cli.recording import peak_rss, source_record, versions
from lora_merge_cli.records import AdapterSummary, Array, KeyPath, TensorSpec, first_names, full_region
from lora_merge_cli.resize_report import ResizedRecord, ResizeReport
from lora_merge_cli.staging import anchored, check_space, check_target, filesystem, staged
from lora_merge_cli.truncation import Truncated, check_cut, truncate_product

DTYPES = ("keep", "float32")
"""What ``--dtype`` of a resizing may be."""

_WEIGHTS = "adapter_model.safetensors"
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_ROUNDING_WORTH_A_NOTE = 1e-4


@dataclass(frozen=True)
class ResizeRequest:
    """What to resize, and to what: a rank or a share of the energy."""

    adapter: Path
    """A PEFT adapter's directory; never changed."""
    output: Path | None = None
    """The directory to create; None for a dry run."""
    rank: int | None = None
    """The rank of every module that has a larger one."""
    energy: float | None = None
    """The share of each ``|delta|_F^2`` to keep: every module gets the least rank that does."""
    dtype: str = "keep"
    """What the factors are stored in: one of `DTYPES`."""
    overwrite: bool = False
    """Whether the output may replace something."""


@dataclass(frozen=True)
class PreparedResize:
    """A new adapter, in memory: the factors, the configuration and the report, before anything is written."""

    request: ResizeRequest
    """What was asked for."""
    checkpoint: Checkpoint
    """The adapter, opened."""
    config: Mapping[str, Any]
    """The new ``adapter_config.json``; the adapter's own where no rank changes."""
    factors: Mapping[KeyPath, Array]
    """Every tensor that is not copied as it is."""
    report: ResizeReport
    """What there is to say of it; a plan, until it is written."""

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """The directories and files that must not be written to."""
        return _input_paths(self.checkpoint)


@dataclass(frozen=True)
class _Module:
    """An adapted module with its factors' places."""

    layer: Layer
    name: str
    """What patterns for rank and alpha are compared with."""
    a: TensorSpec
    b: TensorSpec
    bias: TensorSpec | None
    """What ``lora_B`` adds, times the scale."""
    rank: int
    scale: float
    """By the configuration; the delta that peft adds to an output projection inside an attention block is twice that."""

    def delta(self, a: Array, b: Array) -> tuple[Array, Array]:
        """The scaled delta as two float64 matrices, ``(outputs, rank)`` and ``(rank, inputs)``."""
        return self.scale * b.reshape(-1, self.rank).astype(np.float64), a.reshape(self.rank, -1).astype(np.float64)


@dataclass(frozen=True)
class _Resized:
    """What became of a module."""

    rank: int
    """Its new rank; the old one if its factors stay."""
    factors: Mapping[KeyPath, Array]
    """Its tensors that are not copied as they are."""
    record: ResizedRecord


def prepare_resize(request: ResizeRequest) -> PreparedResize:
    """Open an adapter, truncate every module, and write nothing.

    The new factors are held in memory: less than the adapter itself.

    Raises:
        UsageError: The request makes no sense.
        InputError: The adapter cannot be opened or read, or a factor is not finite.
        Refused: It is no LoRA adapter, is on stacked experts, or contradicts itself; or the output lies inside it.
        OutputExists: Something is at the output.
    """
    started = time.monotonic()
    _check(request)
    checkpoint = open_adapter(request.adapter)
    if request.output is not None:
        check_target(request.output, _input_paths(checkpoint), overwrite=request.overwrite)
        request = dataclasses.replace(request, output=anchored(request.output))
    tree = tree_of(checkpoint)
    summary, config = _understood(tree)
    modules = list(_modules(tree, config))
    resized = [found for group in _groups(modules) for found in _resize(group, checkpoint, request)]
    ranks = {module.name: found.rank for module, found in zip(_in_groups(modules), resized, strict=True)}
    changed = any(found.record.rank_after != found.record.rank_before for found in resized)
    document = _new_config(tree, modules, ranks) if changed else dict(tree.config or {})
    factors = {path: values for found in resized for path, values in found.factors.items()}
    order = {module.layer.module: number for number, module in enumerate(modules)}
    records = sorted((found.record for found in resized), key=lambda record: order[record.module])
    report = _report(request, checkpoint, summary, modules, records, factors)
    report = dataclasses.replace(report, seconds=time.monotonic() - started, peak_rss_bytes=peak_rss())
    return PreparedResize(request, checkpoint, document, factors, report)


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


def _understood(tree: Tree) -> tuple[AdapterSummary, AdapterConfig]:
    """What the adapter is; refused where it is none whose delta is a product of its factors."""
    dialect = detect_adapter_dialect(tree)
    method = (tree.config or {}).get("peft_type", LORA)
    if dialect.name != "peft" or method != LORA:
        raise UnsupportedCheckpoint(
            f"resizing an adapter of {dialect.name if dialect.name != 'peft' else f'peft_type {str(method)[:80]}'} is not supported",
            where=tree.where,
            expected="a PEFT adapter of peft_type LORA (LoRA, rsLoRA, DoRA)",
        )
    options = ScaleOptions()
    summary, config = dialect.describe(tree, options), read_config(tree, options).config
    for problem in summary.problems:
        raise problem
    assert config is not None, "what has no configuration has a problem"
    if not config.stated:
        raise UnknownScale(
            "the LoRA scale is not stated: there is no adapter_config.json beside the adapter",
            where=tree.where,
            hint="put the adapter's configuration beside its weights",
        )
    return summary, config


def _modules(tree: Tree, config: AdapterConfig) -> Iterator[_Module]:
    keys = read_keys(tree)
    if not keys.layers:
        raise UnsupportedCheckpoint("an adapter without low-rank factors: nothing to resize", where=tree.where)
    for layer in keys.layers.values():
        name, here = pattern_name(layer, config), f"{tree.where} :: {layer.module}"
        tensors = layer.tensors
        embedding = "embedding_a" in tensors
        stacked = set(layer.nested) != {0} or layer.module.rsplit(".", maxsplit=1)[-1] == "experts"
        rank = rank_of(config, name)
        a, b = (
            tensors.get("embedding_a" if embedding else "lora_a"),
            tensors.get("embedding_b" if embedding else "lora_b"),
        )
        if stacked or a is None or b is None or (config.target_parameters and a.shape[:1] != (rank,)):
            raise UnsupportedCheckpoint(
                "an adapter on parameters of experts (target_parameters): resizing it is not supported",
                where=here,
                expected="factors of layers, one pair each",
            )
        if len(a.shape) < 2 or len(b.shape) < 2 or 0 in (*a.shape, *b.shape) or set(b.shape[2:]) > {1}:
            raise ShapeMismatch("factors of no layer's shape", where=here, found=f"A {a.shape}, B {b.shape}")
        if rank is None or (a.shape[0], b.shape[1]) != (rank, rank):
            raise ShapeMismatch(
                "factors of another rank than the configuration states",
                where=here,
                expected=f"rank {rank}",
                found=f"A {a.shape}, B {b.shape}",
                hint="see that adapter_config.json belongs to these weights",
            )
        scale = scale_of(config, name, rank).value
        assert scale is not None, "a configuration states an alpha, or peft's default holds"
        yield _Module(layer, name, a, b, tensors.get("bias"), rank, scale)


def _groups(modules: Sequence[_Module]) -> list[list[_Module]]:
    """The modules that one pattern names, and that so have one rank: all alone but for the two of an attention block."""
    groups: dict[str, list[_Module]] = {}
    for module in modules:
        groups.setdefault(module.name, []).append(module)
    return list(groups.values())


def _in_groups(modules: Sequence[_Module]) -> Iterator[_Module]:
    return (module for group in _groups(modules) for module in group)


def _resize(group: Sequence[_Module], checkpoint: Checkpoint, request: ResizeRequest) -> list[_Resized]:
    """The modules of a group at one rank: the largest that one of them needs, and never more than they have."""
    old = group[0].rank
    read = [(_read(checkpoint, module.a), _read(checkpoint, module.b)) for module in group]
    cuts = [
        truncate_product(*module.delta(*factors), rank=request.rank, energy=request.energy)
        for module, factors in zip(group, read, strict=True)
    ]
    rank = max(cut.rank for cut in cuts)
    if rank >= old or (request.rank is not None and request.rank >= old):
        return [
            _kept(module, *factors, cut, checkpoint, request)
            for module, factors, cut in zip(group, read, cuts, strict=True)
        ]
    if len(group) > 1:
        cuts = [
            _padded(truncate_product(*module.delta(*factors), rank=rank), rank)
            for module, factors in zip(group, read, strict=True)
        ]
    return [
        _cut(module, *factors, cut, checkpoint, request) for module, factors, cut in zip(group, read, cuts, strict=True)
    ]


def _padded(cut: Truncated, rank: int) -> Truncated:
    """The same with zeros up to a rank."""
    more = rank - cut.rank
    return dataclasses.replace(
        cut,
        left=np.pad(cut.left, ((0, 0), (0, more))),
        right=np.pad(cut.right, ((0, more), (0, 0))),
        singular_values=np.pad(cut.singular_values, (0, more)),
    )


def _read(checkpoint: Checkpoint, spec: TensorSpec) -> Array:
    values = checkpoint.source.read(spec.path, full_region(spec.shape))
    bad = count_non_finite(values)
    if bad:
        raise NonFiniteInput(
            "a factor is not finite",
            where=f"{checkpoint.source.path} :: {spec.name}",
            expected="finite values",
            found=f"{bad} of {values.size} entries NaN or Inf",
        )
    return values


def _kept(
    module: _Module, a: Array, b: Array, cut: Truncated, checkpoint: Checkpoint, request: ResizeRequest
) -> _Resized:
    """A module whose factors stay as they are, or are widened."""
    widened = {}
    if request.dtype != "keep":
        found = [(module.a, a), (module.b, b)]
        if module.bias is not None:
            found.append((module.bias, _read(checkpoint, module.bias)))
        widened = {spec.path: _stored(values, spec, checkpoint, request) for spec, values in found}
    record = _record(module, module.rank, cut, request)
    error = 0.0 if cut.total else None
    return _Resized(module.rank, widened, dataclasses.replace(record, energy_kept=1.0, relative_error=error))


def _cut(
    module: _Module, a: Array, b: Array, cut: Truncated, checkpoint: Checkpoint, request: ResizeRequest
) -> _Resized:
    rank = cut.rank
    shapes = (rank, *module.a.shape[1:]), (module.b.shape[0], rank, *module.b.shape[2:])
    factors = {
        spec.path: _stored(values.reshape(shape), spec, checkpoint, request)
        for spec, values, shape in zip((module.a, module.b), (cut.right, cut.left), shapes, strict=True)
    }
    left, right = module.delta(a, b)
    new_left = factors[module.b.path].reshape(-1, rank).astype(np.float64)
    new_right = factors[module.a.path].reshape(rank, -1).astype(np.float64)
    error = _norm(np.hstack((left, new_left)), np.vstack((right, -new_right)))
    if module.bias is not None:
        # It is multiplied by the scale too.
        bias = module.scale * _read(checkpoint, module.bias).astype(np.float64)
        factors[module.bias.path] = _stored(bias, module.bias, checkpoint, request)
    record = _record(module, rank, cut, request)
    relative = error / cut.total if cut.total else None
    return _Resized(rank, factors, dataclasses.replace(record, relative_error=relative))


def _record(module: _Module, rank: int, cut: Truncated, request: ResizeRequest) -> ResizedRecord:
    before = module.b.dtype.name
    return ResizedRecord(
        module=module.layer.module,
        shape=(module.b.shape[0], module.a.size // module.rank),
        scale=module.scale,
        rank_before=module.rank,
        rank_after=rank,
        dtype_before=before,
        dtype_after=before if request.dtype == "keep" else request.dtype,
        norm=cut.total,
        energy_kept=cut.energy_kept,
        relative_error=None,
    )


def _norm(left: Array, right: Array) -> float:
    """``|left @ right|_F``, from the factors."""
    r_left, r_right = np.linalg.qr(left)[1], np.linalg.qr(right.T)[1]
    return float(np.linalg.norm(r_left @ r_right.T))


def _stored(values: Array, spec: TensorSpec, checkpoint: Checkpoint, request: ResizeRequest) -> Array:
    dtype = spec.dtype if request.dtype == "keep" else FLOAT32
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values.astype(dtype))
    if count_non_finite(rounded):
        raise Unrepresentable(
            f"a factor does not fit {dtype.name}",
            where=f"{checkpoint.source.path} :: {spec.name}",
            hint="store float32 with --dtype float32",
        )
    return rounded


def _new_config(tree: Tree, modules: Sequence[_Module], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration with the new ranks, and alphas by which the scale is 1, or what it was where factors stay."""
    alphas = {
        module.name: _number(module.scale * module.rank if ranks[module.name] == module.rank else ranks[module.name])
        for module in modules
    }
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda found: (counts[found], found))
    raw = dict(tree.config or {})
    document = raw | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, rank),
    }
    if isinstance(raw.get("init_lora_weights"), str):
        # Factors of another rank are no result of it, and some refuse odd ranks when the adapter is loaded.
        document["init_lora_weights"] = True
    config = read_config(Tree(tree.index, tree.where, document), ScaleOptions()).config
    for module in modules:
        new = ranks[module.name]
        scale = module.scale if new == module.rank else 1.0
        said = None if config is None else scale_of(config, module.name, new).value
        assert config is not None and rank_of(config, module.name) == new, "each module has its own rank"
        assert said is not None and math.isclose(said, scale, rel_tol=1e-12), "each module has its own scale"
    return document


def _patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    """The values that are not the default, each by a regular expression that fits no module of another value."""
    found = {}
    for name, value in values.items():
        if value == default:
            continue
        # A pattern fits every module that ends with it.
        clash = any(other.endswith(f".{name}") and rival != value for other, rival in values.items())
        found[f"{'^' if clash else ''}{re.escape(name)}"] = value
    return dict(sorted(found.items()))


def _number(value: float) -> float:
    """The value, without the rounding of a division where it was a whole number."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _companions(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What lies beside the adapter and belongs to it: its model card, a tokenizer."""
    return companions(checkpoint.directory, ()) if checkpoint.directory.is_dir() else ()


def _write(prepared: PreparedResize, stage: Path, names: Sequence[str]) -> None:
    checkpoint = prepared.checkpoint
    destination = Destination(stage, _WEIGHTS)
    sink = format_named("safetensors").sink(destination, checkpoint)
    specs = _specs(checkpoint, prepared.factors)
    leaves = (
        _leaf(checkpoint, old, new, prepared.factors.get(old.path))
        for old, new in zip(checkpoint.source.index().tensors.values(), specs, strict=True)
    )
    sink.write(specs, leaves, ())
    for name in names:
        place = stage / name
        with filesystem(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.directory / name, place)
    text = json.dumps(prepared.config, indent=2, sort_keys=True)
    with filesystem(stage):
        (stage / ADAPTER_CONFIG).write_text(f"{text}\n", encoding="utf-8")


def _specs(checkpoint: Checkpoint, factors: Mapping[KeyPath, Array]) -> list[TensorSpec]:
    """What the output's tensors are; their names are the adapter's, as one key each."""
    return [
        TensorSpec(
            (".".join(map(str, path)),),
            spec.shape if path not in factors else factors[path].shape,
            spec.dtype if path not in factors else factors[path].dtype,
        )
        for path, spec in checkpoint.source.index().tensors.items()
    ]


def _leaf(checkpoint: Checkpoint, old: TensorSpec, new: TensorSpec, values: Array | None) -> LeafData:
    stored = None if values is not None else checkpoint.source.stored(old.path)
    if stored is not None:
        return LeafData(new, new.shape, stored)
    region = full_region(new.shape)
    if values is None:
        values = checkpoint.source.read(old.path, region)
    return LeafData(new, new.shape, iter([(region, values)]))


def _report(
    request: ResizeRequest,
    checkpoint: Checkpoint,
    summary: AdapterSummary,
    modules: Sequence[_Module],
    records: Sequence[ResizedRecord],
    factors: Mapping[KeyPath, Array],
) -> ResizeReport:
    before = {spec.path: spec for module in modules for spec in (module.a, module.b)}
    after = {spec.path: new for spec, new in zip(_originals(checkpoint), _specs(checkpoint, factors), strict=True)}
    total_sq = sum(record.norm**2 for record in records)
    kept_sq = sum(record.energy_kept * record.norm**2 for record in records)
    error_sq = sum(((record.relative_error or 0.0) * record.norm) ** 2 for record in records)
    return ResizeReport(
        status="planned",
        tool_version=__version__,
        sources=(source_record("adapter", checkpoint),),
        notes=(*checkpoint.notes, *summary.notes, *_notes(checkpoint, summary, records)),
        output=None if request.output is None else str(request.output),
        method=summary.method,
        base=summary.base,
        rank=request.rank,
        energy=request.energy,
        modules=tuple(records),
        energy_kept=min(1.0, kept_sq / total_sq) if total_sq else 1.0,
        relative_error=math.sqrt(error_sq / total_sq) if total_sq else None,
        factor_bytes_before=sum(spec.nbytes for spec in before.values()),
        factor_bytes_after=sum(after[path].nbytes for path in before),
        bytes_before=checkpoint.source.index().nbytes,
        bytes_after=sum(spec.nbytes for spec in after.values()),
    )


def _originals(checkpoint: Checkpoint) -> list[TensorSpec]:
    return list(checkpoint.source.index().tensors.values())


def _notes(checkpoint: Checkpoint, summary: AdapterSummary, records: Sequence[ResizedRecord]) -> Iterator[str]:
    same = [record for record in records if record.rank_after == record.rank_before]
    if same:
        names = first_names((record.module for record in same), 3)
        yield f"{len(same)} of {len(records)} modules need no smaller rank than they have: unchanged ({names})"
    zero = [record.module for record in records if not record.norm]
    if zero:
        yield f"{len(zero)} of {len(records)} deltas are exactly zero: {first_names(zero, 3)}"
    if summary.method.startswith("DoRA") and len(same) < len(records):
        yield (
            "DoRA: the magnitudes are copied; the norm that divides them is that of the base and the new delta, so that it changes with "
            "it, and the figures are of the delta alone"
        )
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
