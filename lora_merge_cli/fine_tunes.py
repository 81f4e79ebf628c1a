"""Opens several fine-tunes of one base side by side: what a method joins, and what its judge reads. Computes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from lora_merge_cli.dialects import ScaleOptions, detect_dialect, looks_like_adapter
from lora_merge_cli.errors import UnknownFormat, UsageError
from lora_merge_cli.formats import open_adapter, open_checkpoint
from lora_merge_cli.formats.interface import Checkpoint, Source
from lora_merge_cli.inputs import AdapterChoice, FineTune, Inputs, open_inputs, tree_of
from lora_merge_cli.joining.method import Joining
from lora_merge_cli.options import MergeOptions
from lora_merge_cli.records import KeyPath
from lora_merge_cli.rounding import Rounding

Declared: TypeAlias = Mapping[KeyPath, np.dtype[Any]]
"""What a merge would store leaves in."""


class Fused(Source, Protocol):
    """A fine-tune whose adapters are merged as it is read."""

    @property
    def declared(self) -> Declared:
        """What a merge would store each leaf in by default."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should make a reader of such a merge stop."""
        ...


@dataclass(frozen=True)
class JoinRequest:
    """Which fine-tunes of one base to join, and how."""

    tuned: tuple[AdapterChoice, ...]
    """Each with its weight: a run, step or item directory, a dense checkpoint, or an adapter of the base."""
    joining: Joining
    """How."""


def open_fine_tunes(base: Path, request: JoinRequest, step: int | None, dialect: str | None) -> Inputs:
    """Open a base and several fine-tunes of it: inputs that have them all, and as their checkpoint the first one.

    Raises:
        InputError: An input is missing, unreadable or of unknown format.
    """
    anchor = open_checkpoint(base)
    parts = tuple(
        _on_base(FineTune(_open(base, choice.path, step, dialect), choice.weight), anchor) for choice in request.tuned
    )
    first = parts[0].inputs
    # What adapters become is a checkpoint without any, which the dialect of adapters beside a base knows nothing of.
    conventions = detect_dialect(tree_of(first.checkpoint)) if first.adapters else first.dialect
    return Inputs(first.checkpoint, conventions, base=anchor, joined=parts, joining=request.joining)


def _on_base(part: FineTune, base: Checkpoint) -> FineTune:
    """The fine-tune with its deltas on the base's own values: what its kernels lost by rounding is no change that it made."""
    if part.inputs.adapters or not part.has_adapters:
        return part
    return dataclasses.replace(part, inputs=dataclasses.replace(part.inputs, base=base))


def joint_inputs(
    inputs: Inputs,
    fused: Callable[[FineTune], Fused],
    joined: Callable[[Inputs, Sequence[Source]], Source],
) -> Inputs:
    """The inputs of an interpolation towards what fine-tunes are joined into.

    Args:
        inputs: The fine-tunes and their base, see `open_fine_tunes`.
        fused: Merges a fine-tune's adapters.
        joined: Makes one source of all of them.
    """
    merged = [fused(part) if part.has_adapters else None for part in inputs.joined]
    sources: list[Source] = [
        part.inputs.checkpoint.source if one is None else one for part, one in zip(inputs.joined, merged, strict=True)
    ]
    declared: Declared = {} if merged[0] is None else merged[0].declared
    stored = {path: declared.get(path, spec.dtype) for path, spec in sources[0].index().tensors.items()}
    return dataclasses.replace(
        inputs,
        checkpoint=dataclasses.replace(inputs.checkpoint, source=joined(inputs, sources)),
        declared=stored,
        warnings=tuple(f"{one.path}: {warning}" for one in merged if one is not None for warning in one.warnings),
    )


def of_fine_tune(inputs: Inputs, options: MergeOptions) -> MergeOptions:
    """What of an interpolation's options is for the adapters of one of several fine-tunes.

    An adapter beside the base states its scales; what is said of them is for those inside checkpoints.
    """
    scales = ScaleOptions() if inputs.adapters else options.scales
    return dataclasses.replace(
        options, scales=scales, dtype="auto", dtype_untouched="keep", mixing=None, rounding=Rounding()
    )


def of_all(inputs: Inputs, options: MergeOptions) -> MergeOptions:
    """What of them is left for the joint fine-tune, which has no adapters any more; all of them where no part had any."""
    if not any(part.has_adapters for part in inputs.joined):
        return options
    return dataclasses.replace(options, scales=ScaleOptions(), multiplier=1.0, include=(), exclude=())


def _open(base: Path, path: Path, step: int | None, dialect: str | None) -> Inputs:
    """Open one fine-tune: a checkpoint, or the base with an adapter."""
    try:
        found = open_inputs(path, step=step, dialect=dialect)
    except UnknownFormat:
        open_adapter(path)
        return open_inputs(base, [AdapterChoice(path)], dialect=dialect)
    except UsageError:
        # The dialect that the user names may be that of adapters beside the base.
        if dialect is None:
            raise
        found = open_inputs(path, step=step)
    if all(map(looks_like_adapter, found.checkpoint.source.index().tensors)):
        return open_inputs(base, [AdapterChoice(path)], dialect=dialect)
    return found
