"""Where a merge writes, in which format, and what stands beside the arrays there."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli.dtypes import is_float, mantissa_bits
from lora_merge_cli.errors import UsageError
from lora_merge_cli.formats import FORMATS, format_named
from lora_merge_cli.formats.interface import DEFAULT_SHARD_BYTES, Checkpoint, Compression, Destination, Format
from lora_merge_cli.plan import MergePlan
from lora_merge_cli.staging import filesystem

AUTO = "auto"

_SUFFIXES = {".safetensors": "safetensors", ".pth": "pth", ".pt": "pth", ".bin": "pth"}
_CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")
_ITEM = "params"


@dataclass(frozen=True)
class Placement:
    """The form of an output."""

    format: Format
    """What it is written as."""
    is_file: bool
    """Whether it is one file, and no directory."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    """The largest size of one file of arrays."""
    compression: Compression = "none"
    """How changed arrays are kept."""

    def destination(self, stage: Path, output: Path, checkpoint: Checkpoint, plan: MergePlan) -> Destination:
        """Where a sink writes in the staging directory."""
        item = checkpoint.item or plan.model.item
        if item is None and checkpoint.format != self.format.name:
            item = _ITEM
        file = output.name if self.is_file else None
        return Destination(stage, file, item, self.max_shard_bytes, self.compression)

    def staged(self, stage: Path, output: Path) -> Path:
        """Where the result is while it is staged."""
        return stage / output.name if self.is_file else stage


def placement(
    output: Path | None,
    to: str,
    checkpoint: Checkpoint,
    shard: int = DEFAULT_SHARD_BYTES,
    compression: Compression = "none",
) -> Placement:
    """The form that an output has, by its name and what the user asks for.

    Args:
        output: Where it goes; None if nobody says.
        to: The name of a format, or ``auto`` for that of the suffix, else that of the checkpoint.
        checkpoint: What is merged into.
        shard: The largest size of one file of arrays.
        compression: How changed arrays are kept.

    Raises:
        UsageError: There is no such format, the suffix says another, a file is to be split, or the format cannot compress.
    """
    known = [fmt.name for fmt in FORMATS]
    if to not in (AUTO, *known):
        raise UsageError("--to has no such value", expected=", ".join((AUTO, *known)), found=to)
    if shard < 1:
        raise UsageError("--max-shard-size must be positive", found=shard)
    suffix = None if output is None else _SUFFIXES.get(output.suffix.lower())
    if suffix is not None and to not in (AUTO, suffix):
        raise UsageError(
            f"--to {to} and an output that is a {suffix} file", where=output, hint="give a directory, or leave --to out"
        )
    chosen = format_named(suffix or (checkpoint.format if to == AUTO else to))
    if compression != "none" and not chosen.compresses:
        raise UsageError(f"--compression {compression}, and {chosen.name} keeps plain arrays", hint="leave it out")
    return Placement(chosen, suffix is not None, shard, compression)


def copy_companions(checkpoint: Checkpoint, plan: MergePlan, stage: Path) -> None:
    """Copy what belongs beside the arrays, config.json with what the merge changes in it.

    Raises:
        ResourceError: The operating system refuses.
    """
    for name in checkpoint.companions:
        source, target = checkpoint.directory / name, stage / name
        with filesystem(source):
            target.parent.mkdir(parents=True, exist_ok=True)
            changes = config_corrections(checkpoint, plan) if name == _CONFIG else {}
            if changes and checkpoint.config is not None:
                corrected = corrected_config(checkpoint.config, changes)
                target.write_text(json.dumps(corrected, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(source, target)
    if checkpoint.assets is not None:
        with filesystem(checkpoint.assets):
            shutil.copytree(checkpoint.assets, stage / checkpoint.assets.name, ignore_dangling_symlinks=True)


def companions_size(checkpoint: Checkpoint) -> int:
    """The bytes of what is copied beside the arrays."""
    files = [checkpoint.directory / name for name in checkpoint.companions]
    if checkpoint.assets is not None:
        files += [file for file in checkpoint.assets.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def config_corrections(checkpoint: Checkpoint, plan: MergePlan) -> Mapping[str, Any]:
    """What the merge changes in config.json, by dotted key: what the adapters say, and the dtype where leaves have another."""
    return {**plan.config, **dict(_dtype_changes(checkpoint.config or {}, plan))}


def corrected_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the changes in it, all other keys in place."""
    corrected: dict[str, Any] = copy.deepcopy(dict(config))
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = corrected
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return corrected


def lost_config(checkpoint: Checkpoint, plan: MergePlan, *, is_file: bool) -> tuple[str, ...]:
    """Warnings of what a configuration must say and that no config.json is written to say."""
    if _CONFIG in checkpoint.companions and not is_file:
        return ()
    said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in plan.config.items())
    return (f"no config.json is written: whoever loads this must set {said}",) if said else ()


def _dtype_changes(config: Mapping[str, Any], plan: MergePlan) -> Iterator[tuple[str, str]]:
    """A loader casts to the dtype that the configuration states: it must hold what is stored."""
    recast = any(
        step.before is not None and step.output.dtype != (step.declared or step.before.dtype) for step in plan.steps
    )
    stored = {step.output.dtype for step in plan.steps if is_float(step.output.dtype)}
    if not recast or not stored:
        return
    widest = max(stored, key=_width).name
    sections = [("", config), *((f"{key}.", value) for key, value in config.items() if isinstance(value, dict))]
    for prefix, section in sections:
        for key in _DTYPE_KEYS:
            if isinstance(section.get(key), str) and section[key] != widest:
                yield f"{prefix}{key}", widest


def _width(dtype: np.dtype[Any]) -> tuple[int, int]:
    return dtype.itemsize, mantissa_bits(dtype)
