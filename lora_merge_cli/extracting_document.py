"""What an adapter for any tree says of the checkpoints that it came from; see `dialects.detached_document`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_merge_cli import __version__
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.inputs import Inputs
from lora_merge_cli.pairing import by_canonical_path
from lora_merge_cli.records import KeyPath, TensorSpec


def kept_dtypes(inputs: Inputs, specs: Sequence[TensorSpec]) -> dict[KeyPath, Any]:
    """What the fine-tune keeps leaves in, where that is not what the base does; of all leaves where there is no base."""
    if inputs.base is None:
        return {spec.path: spec.dtype for spec in specs if is_float(spec.dtype)}
    bases = by_canonical_path(inputs.dialect, inputs.base.source.index().tensors.values())
    found = {}
    for spec in specs:
        base = bases.get(inputs.dialect.canonical(spec.path))
        if base is not None and base.dtype != spec.dtype:
            found[spec.path] = spec.dtype
    return found


def base_record(inputs: Inputs) -> dict[str, str] | None:
    """The base's path and fingerprint; None where there is no base."""
    if inputs.base is None:
        return None
    source = inputs.base.source
    return {"path": str(source.path), "fingerprint": source.fingerprint()}


def made_by(inputs: Inputs) -> dict[str, str]:
    """Which tool made the adapter, out of what."""
    source = inputs.checkpoint.source
    return {"tool": f"lora-merge {__version__}", "tuned": str(source.path), "fingerprint": source.fingerprint()}
