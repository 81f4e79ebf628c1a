"""Orbax directories: which one holds the arrays, whatever level of it the user named.

A run holds steps, a step holds items (``params``, ``train_state``, ...) beside ``assets``, an item holds the arrays. A checkpoint
that was saved without a manager is an item by itself.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from lora_merge_cli.errors import CorruptCheckpoint, InputNotFound, UnknownFormat, UsageError
from lora_merge_cli.formats.hf_dir import ASSETS, CONFIG, companions, read_config
from lora_merge_cli.formats.interface import PROVENANCE, Checkpoint, Destination, Sink
from lora_merge_cli.formats.orbax_metadata import STEP_FILE, TREE_FILE
from lora_merge_cli.formats.orbax_source import MANIFEST, OrbaxSource

_PREFERRED_ITEM = "params"
_OPTIMISER_ITEM = "train_state"
_OPTIMISER_REASON = "the optimiser's state does not fit the merged parameters"
_UNFINISHED = ".orbax-checkpoint-tmp"
_STEP_NAME = re.compile(r"(?:(.+)[_-])?(\d+)")
_BOOKKEEPING = frozenset({STEP_FILE, ASSETS, PROVENANCE, "commit_success.txt"})


class OrbaxFormat:
    """Orbax PyTree checkpoints: OCDBT or one zarr directory per array, zarr 2 or 3."""

    name = "orbax"
    compresses = True

    def open(self, path: Path, step: int | None) -> Checkpoint | None:
        """See `Format.open`."""
        if not path.is_dir():
            return None
        path = Path(os.path.abspath(path))  # noqa: PTH100  (a link keeps its own neighbours)
        if _UNFINISHED in path.name:
            raise CorruptCheckpoint("a checkpoint whose writing was never finished", where=path)
        if _is_item(path):
            return _open_item(path, given=path, step=step)
        if _items(path) or (path / STEP_FILE).exists():
            return _open_step(path, given=path, step=step)
        if _steps(path):
            return _open_run(path, step)
        if (path / "checkpoint").is_file():
            raise UnknownFormat(
                "a checkpoint of flax's or Orbax's old msgpack kind",
                where=path / "checkpoint",
                hint="restore it with the library that wrote it and save it again with Orbax",
            )
        return None

    def open_adapter(self, path: Path) -> Checkpoint | None:  # noqa: ARG002  (the same for every path)
        """See `Format.open_adapter`: no trainer keeps adapters apart in Orbax."""
        return None

    def sink(self, destination: Destination, like: Checkpoint) -> Sink:
        """See `Format.sink`."""
        from lora_merge_cli.formats.orbax_sink import OrbaxSink

        version = like.source.zarr_version if isinstance(like.source, OrbaxSource) else 2
        return OrbaxSink(destination.directory, destination.item, version, destination.compression)


def _is_item(path: Path) -> bool:
    return (path / TREE_FILE).exists() or (path / MANIFEST).exists()


def _items(path: Path) -> list[str]:
    return sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and _UNFINISHED not in entry.name and _is_item(entry)
    )


def _step_number(path: Path) -> int | None:
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[2]) if match else None


def _steps(run: Path) -> dict[int, Path]:
    """The finished steps by number: named by it alone, or after a prefix if their metadata says that they are steps."""
    found = {}
    for entry in run.iterdir():
        number = _step_number(entry)
        if number is None or not entry.is_dir() or _UNFINISHED in entry.name:
            continue
        if _items(entry) and (entry.name.isdigit() or (entry / STEP_FILE).exists()):
            found[number] = entry
    return found


def _open_run(path: Path, step: int | None) -> Checkpoint:
    steps = _steps(path)
    if step is not None and step not in steps:
        raise InputNotFound(f"the run has no step {step}", where=path, found=", ".join(map(str, sorted(steps))))
    chosen = max(steps) if step is None else step
    how = "as asked" if step is not None else "the newest"
    notes = [f"step {chosen} of {len(steps)} ({how}): {steps[chosen]}"]
    unusable = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.is_dir() and (_step_number(entry) or -1) > chosen and entry not in steps.values()
    )
    if unusable and step is None:
        notes.append(f"passed over, since they hold no finished arrays: {', '.join(unusable)}")
    return _open_step(steps[chosen], given=path, step=None, steps=tuple(sorted(steps)), notes=tuple(notes))


def _open_step(
    path: Path,
    *,
    given: Path,
    step: int | None,
    steps: tuple[int, ...] = (),
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    items = [item for item in _items(path) if item != _OPTIMISER_ITEM]
    if _PREFERRED_ITEM not in items and (path / _PREFERRED_ITEM).exists():
        raise CorruptCheckpoint(
            "params without metadata",
            where=path / _PREFERRED_ITEM,
            expected=f"{TREE_FILE} in it",
            hint="copy the checkpoint again from where it was written",
        )
    if not items:
        raise CorruptCheckpoint("a step without arrays", where=path, expected="an item folder such as params")
    if _PREFERRED_ITEM in items:
        item = _PREFERRED_ITEM
    elif len(items) == 1:
        item = items[0]
    else:
        raise UsageError(
            "several items could be meant",
            where=path,
            found=", ".join(items),
            hint=f"name one, for example {path / items[0]}",
        )
    return _open_item(path / item, given=given, step=step, item=item, steps=steps, notes=notes)


def _open_item(
    path: Path,
    *,
    given: Path,
    step: int | None,
    item: str | None = None,
    steps: tuple[int, ...] = (),
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    if item is None and _belongs_to_step(path):
        item = path.name
        notes += (f"{item}/ of {path.parent}",)
    directory = path if item is None else path.parent
    number = None if item is None else _step_number(directory)
    if step is not None and step != number:
        raise UsageError(f"--step {step} needs a run directory", where=given)
    assets, provenance = directory / ASSETS, directory / PROVENANCE
    config = None if item is None else read_config(directory, CONFIG)
    # A model of another format's making keeps its configuration and tokenizer beside the item.
    own = {f"{folder}/" for folder in (*_items(directory), ASSETS)} if config is not None else set()
    beside_it = (
        [] if config is None else [n for n in companions(directory, _BOOKKEEPING) if not n.startswith(tuple(own))]
    )
    beside = [] if item is None else sorted(entry.name for entry in directory.iterdir())
    left_out = {
        name: _OPTIMISER_REASON if name == _OPTIMISER_ITEM else "not part of the parameters"
        for name in beside
        if name not in _BOOKKEEPING | {item} | {companion.split("/")[0] for companion in beside_it}
    }
    return Checkpoint(
        format=OrbaxFormat.name,
        given=given,
        source=OrbaxSource(path),
        directory=directory,
        item=item,
        step=number,
        steps=steps,
        assets=assets if item is not None and assets.is_dir() else None,
        provenance=provenance if provenance.is_file() else None,
        left_out=left_out,
        notes=notes,
        config=config,
        companions=tuple(beside_it),
    )


def _belongs_to_step(item: Path) -> bool:
    """Whether the folder around an item is its step's, and not just any folder."""
    if item.name == _PREFERRED_ITEM:
        return True
    try:
        handlers = json.loads((item.parent / STEP_FILE).read_text())["item_handlers"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(handlers, dict) and item.name in handlers
