"""Extraction from two dense checkpoints: how they pair up, which leaves moved, and the factors of those that take some."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_merge_cli.adapter_writing import AdapterTensor, carried, write_adapter
from lora_merge_cli.dense_deltas import Factored, LeafDelta, Sides, factor_leaf, is_moved
from lora_merge_cli.dialects.kernels import Kernel, torch_kernel, tree_kernel
from lora_merge_cli.dialects.peft.written import refuse_fused
from lora_merge_cli.dialects.torch_model import Plain
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.dtypes import FLOAT32, is_float
from lora_merge_cli.errors import NothingToMerge, UsageError, WrongBase
from lora_merge_cli.extract_report import ExtractedSite, ExtractReport
from lora_merge_cli.extracting_prepared import (
    Dense,
    ExtractRequest,
    PreparedExtraction,
    dense_site,
    site_record,
    trained_record,
)
from lora_merge_cli.extracting_shapes import peft_shape, tree_shape
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.listening import Listener, Silent
from lora_merge_cli.pairing import by_canonical_path
from lora_merge_cli.records import AdapterSite, KeyPath, TensorSpec, display, first_names
from lora_merge_cli.selection import leaf_names, matches_any
from lora_merge_cli.staging import check_space


def dense_of(request: ExtractRequest, inputs: Inputs) -> Dense:
    """How two dense checkpoints pair up."""
    where = inputs.checkpoint.source.path
    if inputs.base is None:
        raise UsageError(
            "no adapters inside: only the base tells what changed", where=where, hint="pass --base BASE and --rank N"
        )
    from lora_merge_cli.truncation import check_cut

    check_cut(request.rank, request.energy)
    if request.scales.alpha or request.scales.rslora:
        raise UsageError("--lora-alpha and --rslora are for adapters, and neither side has any", hint="leave them out")
    dialect = inputs.dialect
    theirs = by_canonical_path(dialect, inputs.base.source.index().tensors.values())
    pairs: dict[KeyPath, Sides] = {}
    odd: list[str] = []
    for path, spec in inputs.checkpoint.source.index().tensors.items():
        base = theirs.pop(dialect.canonical(path), None)
        if base is None or base.shape != spec.shape or is_float(base.dtype) != is_float(spec.dtype):
            found = "not in the base" if base is None else f"{base.shape} {base.dtype.name} in the base"
            odd.append(f"{spec.name} ({found})")
        else:
            pairs[path] = Sides(spec, base)
    odd += [f"{spec.name} (only in the base)" for spec in theirs.values()]
    if odd:
        raise WrongBase(
            "leaves that only one side has, or that differ in shape",
            where=inputs.base.source.path,
            expected=f"the leaves of {where}",
            found=first_names(odd, 5),
            hint="give the checkpoint that the fine-tune started from",
        )
    wanted = _wanted(request, inputs, pairs)
    kernels = {path: kernel for path in wanted if (kernel := _kernel(inputs, pairs[path])) is not None}
    if isinstance(dialect, Plain):
        refuse_fused((dotted(path) for path in wanted), str(where))
    return Dense(wanted, kernels, len(pairs))


def _kernel(inputs: Inputs, sides: Sides) -> Kernel | None:
    if isinstance(inputs.dialect, Plain):
        return torch_kernel(inputs.dialect, sides.tuned, (inputs.base or inputs.checkpoint).config)
    return tree_kernel(inputs.dialect, sides.tuned)


def _wanted(request: ExtractRequest, inputs: Inputs, pairs: Mapping[KeyPath, Sides]) -> dict[KeyPath, Sides]:
    """What ``--include`` and ``--exclude`` choose."""
    names = {path: leaf_names(inputs.dialect, path) for path in pairs}
    for flag, globs in (("--include", request.include), ("--exclude", request.exclude)):
        for glob in globs:
            if not any(matches_any(found, (glob,)) for found in names.values()):
                raise UsageError(
                    f"{flag} {glob!r} matches no leaf",
                    expected=f"a glob for names such as {display(next(iter(names.values()))[-1])}",
                )
    return {
        path: sides
        for path, sides in pairs.items()
        if (not request.include or matches_any(names[path], request.include))
        and not matches_any(names[path], request.exclude)
    }


def extract_dense(
    prepared: PreparedExtraction, stage: Path, listener: Listener, pool: ThreadPoolExecutor
) -> ExtractReport:
    """Factors of what two dense checkpoints differ by, and what cannot be factored."""
    from lora_merge_cli.devices import find_device

    inputs, dense, request = prepared.inputs, prepared.dense, prepared.request
    assert dense is not None and inputs.base is not None, "there are two sides"
    device = find_device(request.device)
    listener.start(sum(sides.tuned.nbytes for sides in dense.pairs.values()))
    moved = []
    for path, sides in dense.pairs.items():
        if is_moved(inputs.checkpoint.source, inputs.base.source, sides, pool):
            moved.append(path)
        listener.advance(sides.tuned.name, sides.tuned.nbytes)
    if not moved:
        raise NothingToMerge(
            "nothing to extract: every leaf is the base's",
            where=inputs.checkpoint.source.path,
            hint="see that TUNED and BASE are two checkpoints",
        )
    shape = peft_shape(prepared, moved) if prepared.for_peft else tree_shape(prepared, moved)
    work = stage.parent / "factors"
    factored: dict[KeyPath, Factored] = {}
    listener.start(sum(dense.pairs[path].tuned.nbytes for path in shape.kernels))
    for number, path in enumerate(shape.kernels):
        sides, equation = dense.pairs[path], dense.kernels[path].equation
        delta = LeafDelta(inputs.checkpoint.source, inputs.base.source, sides, equation, pool)
        factored[path] = factor_leaf(delta, work / str(number), request.rank, request.energy, device)
        listener.advance(sides.tuned.name, sides.tuned.nbytes)
    sites = {
        path: dense_site(inputs, path, dense.kernels[path], found.rank, for_peft=prepared.for_peft)
        for path, found in factored.items()
    }
    tensors = [
        _factor_tensor(sites[path], found, role) for path, found in factored.items() for role in ("lora_a", "lora_b")
    ]
    whole = [
        carried(inputs.checkpoint.source, spec, dataclasses.replace(spec, path=key), Silent())
        for key, spec in shape.whole
        if not request.without_trained
    ]
    assert request.output is not None, "there is a place for it"
    check_space(request.output, sum(tensor.spec.nbytes for tensor in (*tensors, *whole)))
    write_adapter(stage, [*tensors, *whole], shape.config(sites, not request.without_trained), inputs.checkpoint)
    sources = dense.pairs
    report = prepared.said(
        tuple(_measured(sites[path], sources[path].tuned, found) for path, found in factored.items()),
        tuple(trained_record(spec, reason) for spec, reason in shape.reasons.items()),
        dense.total - len(moved),
        frozen_checked=True,
        warnings=shape.warnings,
        notes=shape.notes,
    )
    return dataclasses.replace(report, device=f"{device.device_kind} ({device.platform}:{device.id})")


def _factor_tensor(site: AdapterSite, found: Factored, role: str) -> AdapterTensor:
    spec = TensorSpec(site.factors[role].path, found.shape(role), FLOAT32)
    return AdapterTensor(spec, functools.partial(found.blocks, role))


def _measured(site: AdapterSite, spec: TensorSpec, found: Factored) -> ExtractedSite:
    size = sum(_factor_tensor(site, found, role).spec.nbytes for role in ("lora_a", "lora_b"))
    return dataclasses.replace(
        site_record(site, spec, found.rank, size),
        energy_kept=found.energy_kept,
        relative_error=found.relative_error,
        norm=found.norm,
    )
