"""All that a merge reads: the checkpoint that is merged into, the adapters beside it, and what they change together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli.dialects import (
    AdapterDialect,
    Dialect,
    ScaleOptions,
    Subject,
    Tree,
    detect_adapter_dialect,
    detect_dialect,
    looks_like_adapter,
)
from lora_merge_cli.errors import ConflictingAdapters, UsageError
from lora_merge_cli.formats import open_adapter, open_checkpoint
from lora_merge_cli.formats.interface import Checkpoint, Source
from lora_merge_cli.joining.method import Joining
from lora_merge_cli.records import Created, Dropped, KeyPath, Replacement, Survey, display


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter as the user names it."""

    path: Path
    """Its directory or file."""
    weight: float = 1.0
    """What its change is multiplied by; 1 is as trained."""

    def __post_init__(self) -> None:
        """Refuse a weight that is no number.

        Raises:
            UsageError: It is not finite.
        """
        if not math.isfinite(self.weight):
            raise UsageError("an adapter's weight must be a finite number", found=f"{self.path}@{self.weight}")


@dataclass(frozen=True)
class Adapter:
    """An opened adapter."""

    checkpoint: Checkpoint
    """Its arrays and its configuration."""
    dialect: AdapterDialect
    """Its trainer's conventions."""
    weight: float
    """What its change is multiplied by."""


@dataclass(frozen=True)
class FineTune:
    """One of several opened fine-tunes of one base."""

    inputs: Inputs
    """What it is made of: a checkpoint, with or without adapters inside, or the base with an adapter."""
    weight: float
    """What its difference from the base is multiplied by."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Where its changes come from: the adapter, where that lies beside the base."""
        return self.inputs.adapters[0].checkpoint if self.inputs.adapters else self.inputs.checkpoint

    @property
    def has_adapters(self) -> bool:
        """Whether its leaves are to be merged before they are anything."""
        return bool(self.inputs.adapters) or any(
            looks_like_adapter(path) for path in self.inputs.checkpoint.source.index().tensors
        )


@dataclass(frozen=True)
class Inputs:
    """Everything opened."""

    checkpoint: Checkpoint
    """What is merged into; with its own adapters inside where there are none beside it."""
    dialect: Dialect
    """The conventions of the model: those of the first adapter."""
    adapters: tuple[Adapter, ...] = ()
    """The adapters beside the checkpoint."""
    base: Checkpoint | None = None
    """The float32 checkpoint that a fine-tune with adapters inside started from."""
    joined: tuple[FineTune, ...] = ()
    """The fine-tunes that `checkpoint` is computed from, where it is none by itself."""
    joining: Joining | None = None
    """How it is computed from them."""
    declared: Mapping[KeyPath, np.dtype[Any]] = field(default_factory=dict)
    """What leaves of a computed checkpoint count as stored in."""
    warnings: tuple[str, ...] = ()
    """What should make a reader stop, of how a computed checkpoint is made."""

    def source(self, adapter: int | None) -> Source:
        """The arrays of an adapter, by its number, or of the checkpoint."""
        return (self.checkpoint if adapter is None else self.adapters[adapter].checkpoint).source

    @property
    def anchor(self) -> Source:
        """What an interpolation starts from: the base, or the checkpoint that adapters lie beside."""
        return (self.checkpoint if self.base is None else self.base).source

    @property
    def opened(self) -> tuple[tuple[str, Checkpoint], ...]:
        """Every input with its role."""
        found = [("tuned", part.checkpoint) for part in self.joined] or [("checkpoint", self.checkpoint)]
        if self.base is not None:
            found.append(("base", self.base))
        return (*found, *(("adapter", adapter.checkpoint) for adapter in self.adapters))

    @property
    def paths(self) -> tuple[Path, ...]:
        """The directories and files that must not be written to."""
        return tuple(path for _, opened in self.opened for path in (opened.given, opened.directory, opened.source.path))


def open_inputs(
    checkpoint: Path,
    adapters: Sequence[AdapterChoice] = (),
    *,
    base: Path | None = None,
    step: int | None = None,
    dialect: str | None = None,
) -> Inputs:
    """Open all that a merge reads.

    Args:
        checkpoint: What is merged into.
        adapters: The adapters beside it, if any.
        base: What a fine-tune with adapters inside started from.
        step: Which step of a run; the newest if None.
        dialect: The name of the adapters' dialect; detected if None.

    Raises:
        InputError: An input is missing, unreadable or of unknown format.
        UsageError: The dialect is unknown or ambiguous, or options do not go together.
        UnmatchedAdapter: No dialect knows an adapter.
    """
    opened = open_checkpoint(checkpoint, step)
    opened_base = None if base is None else open_checkpoint(base)
    if not adapters:
        return Inputs(opened, detect_dialect(tree_of(opened), dialect), (), opened_base)
    if base is not None:
        raise UsageError(
            "--base is for adapters inside a checkpoint", hint="with --adapter, the checkpoint is the base itself"
        )
    found = []
    for choice in adapters:
        adapter = open_adapter(choice.path)
        found.append(Adapter(adapter, detect_adapter_dialect(tree_of(adapter), dialect), choice.weight))
    return Inputs(opened, found[0].dialect, tuple(found))


def tree_of(checkpoint: Checkpoint) -> Tree:
    """What a dialect sees of an opened checkpoint."""
    return Tree(checkpoint.source.index(), str(checkpoint.source.path), checkpoint.config)


def survey_inputs(inputs: Inputs, scales: ScaleOptions, *, residual_base: bool = False) -> Survey:
    """What all adapters change, each site and replacement with its adapter's number and weight.

    Problems of a single adapter are in the survey; what two adapters cannot both be is one of them.
    """
    checkpoint = tree_of(inputs.checkpoint)
    if not inputs.adapters:
        return inputs.dialect.survey(Subject(checkpoint), scales)
    surveys = [
        _numbered(
            adapter.dialect.survey(Subject(checkpoint, tree_of(adapter.checkpoint), residual_base), scales),
            number,
            adapter.weight,
        )
        for number, adapter in enumerate(inputs.adapters)
    ]
    if len(surveys) == 1:
        return surveys[0]
    surveys, copies = _without_copies(surveys)
    problems = [problem for survey in surveys for problem in survey.problems]
    try:
        created = _joint_creations(surveys)
        config = _joint_config(surveys)
        _refuse_rivals(inputs, surveys)
    except ConflictingAdapters as conflict:
        created, config = (), {}
        problems.append(conflict)
    return Survey(
        sites=tuple(site for survey in surveys for site in survey.sites),
        dropped=tuple(leaf for survey in surveys for leaf in survey.dropped),
        problems=tuple(problems),
        notes=tuple(dict.fromkeys(note for survey in surveys for note in survey.notes)),
        warnings=tuple(dict.fromkeys(warning for survey in surveys for warning in survey.warnings)),
        replacements=tuple(found for survey in surveys for found in survey.replacements),
        created=created,
        copies=copies,
        equal=tuple(dict.fromkeys(pair for survey in surveys for pair in survey.equal)),
        config=config,
        dtypes=_joint_dtypes(surveys),
    )


def _without_copies(surveys: Sequence[Survey]) -> tuple[list[Survey], tuple[Replacement, ...]]:
    """The surveys without the copies of a leaf's own values that several adapters bring; and those copies."""
    brought: dict[KeyPath, list[Replacement]] = {}
    for survey in surveys:
        for found in survey.replacements:
            brought.setdefault(found.target, []).append(found)
    copies = [each for rivals in brought.values() if len(rivals) > 1 for each in rivals if each.is_copy]

    def without(survey: Survey) -> Survey:
        gone = [found for found in survey.replacements if found in copies]
        dropped = [
            Dropped(found.path, "the base's own values, which other adapters bring too", found.adapter)
            for found in gone
        ]
        kept = tuple(found for found in survey.replacements if found not in gone)
        return dataclasses.replace(survey, replacements=kept, dropped=(*survey.dropped, *dropped))

    return list(map(without, surveys)), tuple(copies)


def _numbered(survey: Survey, number: int, weight: float) -> Survey:
    return dataclasses.replace(
        survey,
        sites=tuple(dataclasses.replace(site, adapter=number, weight=weight) for site in survey.sites),
        replacements=tuple(dataclasses.replace(found, adapter=number, weight=weight) for found in survey.replacements),
        dropped=tuple(Dropped(leaf.path, leaf.reason, number) for leaf in survey.dropped),
    )


def _joint_creations(surveys: Iterable[Survey]) -> tuple[Created, ...]:
    """The leaves that the output has besides; whoever changes what one starts as must mean them to part."""
    surveys = list(surveys)
    created = {leaf.path: leaf for survey in surveys for leaf in survey.created}
    for leaf in created.values():
        for survey in surveys:
            touched = {target for site in survey.sites for target in site.targets}
            touched |= {found.target for found in survey.replacements}
            if leaf.source in touched and leaf.path not in {other.path for other in survey.created}:
                raise ConflictingAdapters(
                    "one adapter keeps two leaves tied that another one parts",
                    where=f"{display(leaf.source)} and {display(leaf.path)}",
                    hint="merge them one after the other",
                )
    return tuple(created.values())


def _joint_config(surveys: Iterable[Survey]) -> Mapping[str, Any]:
    joint: dict[str, Any] = {}
    for survey in surveys:
        for key, value in survey.config.items():
            if joint.setdefault(key, value) != value:
                raise ConflictingAdapters(
                    f"two adapters want another {key} in config.json", found=f"{joint[key]} and {value}"
                )
    return joint


def _joint_dtypes(surveys: Sequence[Survey]) -> Mapping[KeyPath, np.dtype[Any]]:
    """What the fine-tunes keep leaves in, where those that say so agree."""
    said: dict[KeyPath, set[np.dtype[Any]]] = {}
    for survey in surveys:
        for path, dtype in survey.dtypes.items():
            said.setdefault(path, set()).add(dtype)
    return {path: next(iter(dtypes)) for path, dtypes in said.items() if len(dtypes) == 1}


def _refuse_rivals(inputs: Inputs, surveys: Sequence[Survey]) -> None:
    """Refuse two replacements of one tensor, or of one row of it."""
    taken: dict[KeyPath, list[Replacement]] = {}
    for survey in surveys:
        for found in survey.replacements:
            rivals = taken.setdefault(found.target, [])
            for rival in rivals:
                if found.rows is None or rival.rows is None or set(found.rows) & set(rival.rows):
                    names = [inputs.source(other.adapter).path for other in (rival, found)]
                    raise ConflictingAdapters(
                        "two adapters bring the same tensor",
                        where=display(found.target),
                        found=f"{names[0]} and {names[1]}",
                        hint="one of them must go: both cannot be kept",
                    )
            rivals.append(found)
