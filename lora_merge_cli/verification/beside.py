"""What stands beside the arrays of a result: normalisation statistics, configuration, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_merge_cli.assets import NORM_STATS, check_assets
from lora_merge_cli.dtypes import dtype_named, holds_all_values_of, is_float
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.records import ModelSummary
from lora_merge_cli.report import CheckRecord, CheckStatus
from lora_merge_cli.verification.expectation import Expectation

_MANY = 8
_CONFIG = "config.json"
_DECISIVE = ("tie_word_embeddings", "vocab_size")
"""What a loader builds the model by, so that a wrong value ruins what the arrays hold."""
_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_IDLE = ("transformers_version", "_name_or_path", "use_cache")


def check_assets_of(
    merged: Checkpoint, checkpoint: Checkpoint, summary: ModelSummary, expectation: Expectation
) -> CheckRecord:
    """What serving needs beside the arrays: present, sane, and what the merge makes of the checkpoint's."""
    if _CONFIG in checkpoint.companions or _CONFIG in merged.companions:
        return _companions(merged, checkpoint, expectation)
    if merged.directory.is_file() and checkpoint.assets is not None:
        return CheckRecord("assets", "warn", "the result is one file: the assets that a server needs are elsewhere")
    return assets(merged, checkpoint, summary)


def _companions(merged: Checkpoint, checkpoint: Checkpoint, expectation: Expectation) -> CheckRecord:
    """The other files of a model's directory, and what its configuration must say."""
    before, after = checkpoint.config or {}, merged.config
    wrong = list(_config_mistakes(after, expectation.config))
    if after is not None:
        # Writers leave out what is the model's default: only what is said can be wrong.
        kept = {key: value for key, value in _flat(before).items() if key.split(".")[-1] in _DECISIVE}
        said = {key for key in kept if key not in expectation.config and _said(after, key) is not None}
        wrong += _config_mistakes(after, {key: kept[key] for key in said})
        wrong += _dtype_mistakes(after, merged, expectation)
    missing = [name for name in checkpoint.companions if name not in merged.companions]
    figures = {"files": len(checkpoint.companions), "missing": len(missing)}
    if wrong:
        alone = merged.directory.is_file() and after is None
        status: CheckStatus = "warn" if alone else "fail"
        return CheckRecord("assets", status, "; ".join(wrong[:3]), figures, (_CONFIG,))
    if merged.directory.is_file():
        return CheckRecord("assets", "skip", "the result is one file: no config.json beside it", figures)
    doubts = (
        [f"{len(missing)} files of the base are not beside the result: {', '.join(missing[:3])}"] if missing else []
    )
    others = [] if after is None else sorted(_differing(before, after, expectation.config))
    if others:
        doubts.append(f"config.json says something else than the base's about {', '.join(others[:5])}")
    if doubts:
        return CheckRecord("assets", "warn", "; ".join(doubts), figures, tuple(missing[:_MANY]))
    message = f"all files of the base are there: {len(checkpoint.companions)}, config.json among them"
    return CheckRecord("assets", "pass", message, figures)


def _config_mistakes(config: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> Iterator[str]:
    for key, value in wanted.items():
        if config is None:
            yield f"config.json must say {key} = {json.dumps(value)}, and there is none"
        elif (found := _said(config, key)) != value:
            yield f"config.json says {key} = {json.dumps(found)}, and it must be {json.dumps(value)}"


def _dtype_mistakes(config: Mapping[str, Any], merged: Checkpoint, expectation: Expectation) -> Iterator[str]:
    """A loader casts to the dtype that the configuration states: it must hold what was merged."""
    stated = next((config[key] for key in _DTYPE_KEYS if isinstance(config.get(key), str)), None)
    changed = {leaf.change.path for leaf in expectation.leaves.values() if leaf.change.changes or leaf.change.asked}
    tensors = merged.source.index().tensors
    stored = {tensors[path].dtype for path in changed & tensors.keys() if is_float(tensors[path].dtype)}
    if stated not in _DTYPES:
        return
    # A base that is wider than its own configuration says is nobody's mistake here.
    stored -= {leaf.change.before.dtype for leaf in expectation.leaves.values() if leaf.change.before is not None}
    lost = [dtype.name for dtype in stored if not holds_all_values_of(dtype_named(stated), dtype)]
    if lost:
        yield f"config.json says dtype {stated}, which its loader casts to, and merged leaves are {lost[0]}"


def _differing(before: Mapping[str, Any], after: Mapping[str, Any], changed: Mapping[str, Any]) -> Iterator[str]:
    one, other = _flat(before), _flat(after)
    for key, value in one.items():
        last = key.split(".")[-1]
        if key in other and other[key] != value and key not in changed and last not in (*_DTYPE_KEYS, *_IDLE):
            yield key


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of a configuration and of its sections, by dotted key."""
    entries: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            entries |= _flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries


def _said(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def assets(merged: Checkpoint, checkpoint: Checkpoint, summary: ModelSummary) -> CheckRecord:
    """What serving needs beside the parameters: present, finite, sane, and the checkpoint's."""
    if merged.assets is None and checkpoint.assets is None and (merged.item is None or summary.item is None):
        return CheckRecord("assets", "skip", "neither the checkpoint nor the result has assets")
    after = check_assets(merged.assets, quantiles=summary.needs_quantiles)
    before = check_assets(checkpoint.assets, quantiles=summary.needs_quantiles)
    old = {_without_folder(problem, checkpoint.assets) for problem in before.problems}
    new = [problem for problem in after.problems if _without_folder(problem, merged.assets) not in old]
    figures = {"norm_stats": len(after.asset_ids)}
    if new:
        return CheckRecord("assets", "fail", "; ".join(new[:3]), figures)
    if after.problems:
        return CheckRecord("assets", "warn", f"as in the checkpoint: {'; '.join(after.problems[:3])}", figures)
    lost, changed = _compare_norm_stats(merged.assets, checkpoint.assets)
    if lost:
        message = f"norm stats of the checkpoint are missing: {', '.join(lost[:3])}"
        return CheckRecord("assets", "fail", message, figures, tuple(lost[:_MANY]))
    if changed:
        message = "norm stats are sane and not the checkpoint's: actions are scaled in another way"
        return CheckRecord("assets", "warn", message, figures, tuple(changed[:_MANY]))
    return CheckRecord("assets", "pass", f"norm stats of {', '.join(after.asset_ids)} are there and sane", figures)


def _without_folder(problem: str, folder: Path | None) -> str:
    return problem if folder is None else problem.replace(str(folder), "assets")


def _compare_norm_stats(after: Path | None, before: Path | None) -> tuple[list[str], list[str]]:
    """The norm stats of the checkpoint that the result lacks, by file and series, and the files that say something else."""
    lost: list[str] = []
    changed: list[str] = []
    if after is None or before is None:
        return lost, changed
    for file in sorted(before.rglob(NORM_STATS)):
        name = file.relative_to(before)
        if not (after / name).is_file():
            lost.append(str(name))
            continue
        old, new = _norm_stats(file), _norm_stats(after / name)
        lost += [f"{name}: {series}" for series in old if series not in new]
        if old != new:
            changed.append(str(name))
    return lost, changed


def _norm_stats(file: Path) -> dict[str, Any]:
    """The series of a file; none if it is no such file, which is another check's to say."""
    try:
        return dict(json.loads(file.read_text())["norm_stats"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
