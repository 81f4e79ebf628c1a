"""Safetensors files and the directories around them: which files hold the model, whatever the user named.

A directory as transformers writes it holds ``model.safetensors``, or shards with an index, beside ``config.json`` and a tokenizer;
a trainer's output holds such directories called ``checkpoint-N``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lora_merge_cli.errors import CorruptCheckpoint, InputNotFound, UsageError
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.hf_dir import (
    ADAPTER_CONFIG,
    ASSETS,
    CONFIG,
    companions,
    find_adapter,
    is_adapter_file,
    left_out,
    read_config,
    step_folders,
    step_number,
)
from lora_merge_cli.formats.interface import PROVENANCE, Checkpoint, Destination, Sink
from lora_merge_cli.formats.safetensors_header import looks_like_safetensors
from lora_merge_cli.formats.safetensors_sink import MODEL_STEM, TREE_STEM, SafetensorsSink
from lora_merge_cli.formats.safetensors_source import SafetensorsSource, read_weight_map
from lora_merge_cli.records import first_names

SUFFIX = ".safetensors"
INDEX_SUFFIX = f"{SUFFIX}.index.json"

_ADAPTER = "adapter_model.safetensors"
_OTHER_ADAPTER = "adapter_model.bin"
_SHARD = re.compile(rf".+-\d+-of-0*(\d+){re.escape(SUFFIX)}")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class _Choice:
    """The file to open in a directory, or the index, and what else it could have been."""

    name: str
    notes: tuple[str, ...] = ()


class SafetensorsFormat:
    """Safetensors: one file, or a directory with one or with shards and their index."""

    name = "safetensors"
    compresses = False

    def open(self, path: Path, step: int | None) -> Checkpoint | None:
        """See `Format.open`."""
        if path.is_file():
            if path.name.endswith(INDEX_SUFFIX):
                return _open_directory(_anchored(path).parent, path, step, _Choice(path.name))
            if is_adapter_file(path.name) or not _is_safetensors(path):
                return None
            return _open_file(path, step)
        if not path.is_dir():
            return None
        directory = _anchored(path)
        steps = {number: folder for number, folder in step_folders(directory).items() if _may_hold_model(folder)}
        choice = _choose(directory)
        if steps and (choice is None or step is not None):
            return _open_run(directory, path, step, steps)
        return None if choice is None else _open_directory(directory, path, step, choice)

    def open_adapter(self, path: Path) -> Checkpoint | None:
        """See `Format.open_adapter`."""
        if path.is_file():
            if not _is_safetensors(path):
                return None
            config = read_config(_anchored(path).parent, ADAPTER_CONFIG) if path.name == _ADAPTER else None
            source = SafetensorsSource(_anchored(path), [_anchored(path)])
            return Checkpoint(self.name, path, source, source.path, None, config=config, metadata=source.metadata)
        found = find_adapter(_anchored(path))
        if found is None:
            return None
        directory, notes = found
        names = {entry.name for entry in directory.iterdir()}
        if _ADAPTER not in names:
            if _OTHER_ADAPTER in names:
                return None
            raise CorruptCheckpoint(
                "an adapter's configuration without its weights",
                where=directory,
                expected=f"{_ADAPTER} or {_OTHER_ADAPTER}",
                found=first_names(sorted(names)),
            )
        source = SafetensorsSource(directory, [directory / _ADAPTER])
        return Checkpoint(
            format=self.name,
            given=path,
            source=source,
            directory=directory,
            item=None,
            step=step_number(directory),
            notes=notes,
            config=read_config(directory, ADAPTER_CONFIG),
            metadata=source.metadata,
        )

    def sink(self, destination: Destination, like: Checkpoint) -> Sink:
        """See `Format.sink`."""
        return SafetensorsSink(destination, like)


def _anchored(path: Path) -> Path:
    """The absolute path; a link stays one, and so keeps its own neighbours."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _is_safetensors(file: Path) -> bool:
    """Whether a file says so by its name, or begins like one: the hub's cache names files by their hashes."""
    return file.name.lower().endswith(SUFFIX) or looks_like_safetensors(FlatFile(file))


def _open_file(path: Path, step: int | None) -> Checkpoint:
    file = _anchored(path)
    if step is not None:
        raise UsageError(f"--step {step} needs a run directory", where=path)
    if _is_part(file.name):
        raise UsageError("one shard of several", where=path, hint=f"give its directory, {file.parent}, or the index")
    source = SafetensorsSource(file, [file])
    provenance = file.with_name(f"{file.name}.{PROVENANCE}")
    return Checkpoint(
        format=SafetensorsFormat.name,
        given=path,
        source=source,
        directory=file,
        item=None,
        provenance=provenance if provenance.is_file() else None,
        config=read_config(file.parent, CONFIG),
        metadata=source.metadata,
    )


def _open_run(directory: Path, given: Path, step: int | None, steps: dict[int, Path]) -> Checkpoint:
    if step is not None and step not in steps:
        raise InputNotFound(f"the run has no step {step}", where=given, found=", ".join(map(str, steps)))
    chosen = max(steps) if step is None else step
    how = "as asked" if step is not None else "the newest"
    notes = [f"step {chosen} of {len(steps)} ({how}): {steps[chosen]}"]
    unusable = [folder.name for number, folder in step_folders(directory).items() if number > max(steps)]
    if unusable and step is None:
        notes.append(f"passed over, since they hold no safetensors model: {', '.join(unusable)}")
    choice = _choose(steps[chosen])
    if choice is None:
        raise CorruptCheckpoint("a step without a model", where=steps[chosen], expected=f"model{SUFFIX} or an index")
    return _open_directory(steps[chosen], given, None, choice, tuple(steps), tuple(notes))


def _open_directory(
    directory: Path,
    given: Path,
    step: int | None,
    choice: _Choice,
    steps: tuple[int, ...] = (),
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    number = step_number(directory)
    if step is not None and step != number:
        raise UsageError(f"--step {step} needs a run directory", where=given)
    arrays = {choice.name}
    weight_map = None
    if choice.name.endswith(INDEX_SUFFIX):
        weight_map = read_weight_map(directory / choice.name)
        files = sorted(set(map(os.path.normpath, weight_map.values())))
        arrays |= set(files)
    else:
        files = [choice.name]
    source = SafetensorsSource(directory, [directory / name for name in files], weight_map)
    # An OpenPI tree's assets are looked at and carried over as a whole; elsewhere such a folder is one like any other.
    assets = directory / ASSETS
    holds_tree = choice.name.startswith(f"{TREE_STEM}.") and assets.is_dir()
    beside = (name for name in companions(directory, arrays) if not (holds_tree and name.startswith(f"{ASSETS}/")))
    provenance = directory / PROVENANCE
    return Checkpoint(
        format=SafetensorsFormat.name,
        given=given,
        source=source,
        directory=directory,
        item=None,
        step=number,
        steps=steps,
        assets=assets if holds_tree else None,
        provenance=provenance if provenance.is_file() else None,
        left_out=left_out(directory, arrays),
        notes=notes + choice.notes,
        config=read_config(directory, CONFIG),
        companions=tuple(beside),
        metadata=source.metadata,
    )


def _choose(directory: Path) -> _Choice | None:
    """Which file of a directory, or which index, holds a model; None if none does.

    Raises:
        UsageError: Several could be meant.
        CorruptCheckpoint: There are shards, and no index.
    """
    names = sorted(entry.name for entry in directory.iterdir() if not entry.is_dir())
    stock = [
        name
        for stem in (MODEL_STEM, TREE_STEM)
        for name in (f"{stem}{SUFFIX}", f"{stem}{INDEX_SUFFIX}")
        if name in names
    ]
    if len({name.partition(".")[0] for name in stock}) > 1:
        raise _ambiguous(directory, stock)
    if stock:
        notes = (f"{stock[0]}, and not {stock[1]}, as transformers chooses",) if len(stock) > 1 else ()
        return _Choice(stock[0], notes)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise _ambiguous(directory, indexes)
    if indexes:
        return _Choice(indexes[0])
    others = [name for name in names if _may_be_model(name)]
    parts = [name for name in others if _is_part(name)]
    if parts:
        raise CorruptCheckpoint(
            "shards without their index",
            where=directory,
            expected=f"{parts[0].rsplit('-', 3)[0]}{INDEX_SUFFIX}",
            found=first_names(parts, 3),
            hint="copy or download the checkpoint again",
        )
    if not others or any(name in names for name in _TORCH):
        return None
    if len(others) > 1:
        raise _ambiguous(directory, others)
    return _Choice(others[0])


def _may_hold_model(directory: Path) -> bool:
    return any(_may_be_model(entry.name) or entry.name.endswith(INDEX_SUFFIX) for entry in directory.iterdir())


def _may_be_model(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".") and not is_adapter_file(name)


def _is_part(name: str) -> bool:
    """Whether a file's name says that it is one shard of several."""
    match = _SHARD.fullmatch(name)
    return match is not None and int(match[1]) > 1


def _ambiguous(directory: Path, names: Collection[str]) -> UsageError:
    listed = list(names)
    return UsageError(
        "several files could be meant",
        where=directory,
        found=first_names(listed),
        hint=f"name one, for example {directory / listed[0]}",
    )
