"""Orbax's ``_METADATA`` and ``_CHECKPOINT_METADATA`` files: key paths, value types, and which zarr the arrays are in.

Source of the format: ``orbax/checkpoint/_src/metadata/tree.py`` and ``step_metadata_serialization.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge_cli.errors import CorruptCheckpoint, NotPermitted, UnsupportedCheckpoint
from lora_merge_cli.records import Constant, KeyPath, TensorSpec, display

TREE_FILE = "_METADATA"
STEP_FILE = "_CHECKPOINT_METADATA"
STRINGS_FILE = "_strings.json"
PYTREE_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"

_SEQUENCE, _DICT = 1, 2
_ARRAY_TYPES = frozenset({"jax.Array", "np.ndarray"})


@dataclass(frozen=True)
class Entry:
    """One leaf of the tree as ``_METADATA`` lists it."""

    path: KeyPath
    value_type: str
    skipped: bool
    """Nothing is stored for it: an empty container or None."""

    @property
    def storage_name(self) -> str:
        """The name that its bytes are stored under: Orbax joins the parts with dots, whatever they hold."""
        return ".".join(map(str, self.path))


@dataclass(frozen=True)
class TreeMetadata:
    """A parsed ``_METADATA``."""

    entries: tuple[Entry, ...]
    zarr_version: int
    fill_values_stored: bool
    """Whether a chunk that holds nothing but the fill value is stored all the same, so that a missing one is a loss."""
    strings: Mapping[str, str]
    """The texts of string leaves, by storage name."""


def read_tree(directory: Path) -> TreeMetadata:
    """Parse ``directory/_METADATA``.

    Raises:
        CorruptCheckpoint: It is missing, no JSON, or not shaped as Orbax writes it.
    """
    file = directory / TREE_FILE
    raw = _load_json(file)
    try:
        entries = tuple(_entry(item) for item in raw["tree_metadata"].values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpoint("the tree metadata is not what Orbax writes", where=file, found=repr(error)) from error
    strings: Mapping[str, str] = {}
    if any(entry.value_type == "string" for entry in entries):
        strings = _load_json(directory / STRINGS_FILE)
    return TreeMetadata(
        entries=entries,
        zarr_version=3 if raw.get("use_zarr3") else 2,
        fill_values_stored=bool(raw.get("store_array_data_equal_to_fill_value")),
        strings=strings,
    )


def write_tree(directory: Path, specs: Iterable[TensorSpec], constants: Iterable[Constant], zarr_version: int) -> None:
    """Write ``_METADATA``, and ``_strings.json`` where there are strings.

    Arrays are written as ``np.ndarray``: a reader then needs neither a sharding file nor the devices of the writer.

    Raises:
        UnsupportedCheckpoint: Two key paths have one storage name.
    """
    entries = [Entry(spec.path, "scalar" if spec.kind == "scalar" else "np.ndarray", skipped=False) for spec in specs]
    strings = {}
    for constant in constants:
        is_string = constant.kind == "string"
        entry = Entry(constant.path, constant.kind, skipped=not is_string)
        entries.append(entry)
        if is_string:
            strings[entry.storage_name] = constant.value
    _refuse_collisions(directory, entries)
    document = {
        "tree_metadata": {
            str(tuple(map(str, entry.path))): {
                "key_metadata": [
                    {"key": str(part), "key_type": _SEQUENCE if isinstance(part, int) else _DICT} for part in entry.path
                ],
                "value_metadata": {
                    "value_type": entry.value_type,
                    "skip_deserialize": entry.skipped,
                },
            }
            for entry in entries
        },
        "use_ocdbt": True,
        "use_zarr3": zarr_version == 3,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (directory / TREE_FILE).write_text(json.dumps(document))
    if strings:
        (directory / STRINGS_FILE).write_text(json.dumps(strings))


def write_step(directory: Path, item: str | None, started_ns: int) -> None:
    """Write ``_CHECKPOINT_METADATA``: of a step that holds only `item`, or of a bare item if None."""
    document = {
        "item_handlers": PYTREE_HANDLER if item is None else {item: PYTREE_HANDLER},
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": started_ns,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }
    (directory / STEP_FILE).write_text(json.dumps(document))


def constant_of(entry: Entry, tree: TreeMetadata, directory: Path) -> Constant | None:
    """What the entry is if it is no array, else None.

    Raises:
        CorruptCheckpoint: A string's text is missing.
        UnsupportedCheckpoint: It is a leaf of a type that only its own Orbax handler understands.
    """
    if entry.skipped:
        return Constant(entry.path, entry.value_type)
    if entry.value_type == "string":
        if entry.storage_name not in tree.strings:
            raise CorruptCheckpoint(
                "a string's text is missing",
                where=f"{directory / STRINGS_FILE} :: {display(entry.path)}",
            )
        return Constant(entry.path, "string", tree.strings[entry.storage_name])
    if not entry.path:
        raise UnsupportedCheckpoint("a single array, and no tree of them", where=directory)
    if entry.value_type not in _ARRAY_TYPES | {"scalar"}:
        raise UnsupportedCheckpoint(
            "a leaf of a type that cannot be carried over",
            where=f"{directory} :: {display(entry.path)}",
            expected="an array, a number, a string or an empty container",
            found=entry.value_type,
        )
    return None


def refuse_extended_types(directory: Path) -> None:
    """Refuse arrays that stand for more than their numbers, such as random keys.

    Raises:
        UnsupportedCheckpoint: There is one.
    """
    for file in sorted(directory.glob("array_metadatas/process_*")):
        for item in _load_json(file).get("array_metadatas", ()):
            array = item.get("array_metadata", {})
            if array.get("ext_metadata"):
                raise UnsupportedCheckpoint(
                    "a leaf of a type that cannot be carried over",
                    where=f"{directory} :: {array.get('param_name')}",
                    expected="plain numbers",
                    found=array["ext_metadata"],
                )


def _entry(item: Mapping[str, Any]) -> Entry:
    path: KeyPath = tuple(
        int(part["key"]) if part["key_type"] == _SEQUENCE else str(part["key"]) for part in item["key_metadata"]
    )
    value = item["value_metadata"]
    return Entry(path, str(value["value_type"]), bool(value.get("skip_deserialize", False)))


def _refuse_collisions(directory: Path, entries: Iterable[Entry]) -> None:
    seen: dict[str, KeyPath] = {}
    for entry in entries:
        other = seen.setdefault(entry.storage_name, entry.path)
        if other != entry.path:
            raise UnsupportedCheckpoint(
                "two key paths that Orbax would store under one name",
                where=f"{directory} :: {entry.storage_name}",
                found=f"{other} and {entry.path}",
            )


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CorruptCheckpoint("a metadata file is missing", where=file) from error
    except OSError as error:
        raise NotPermitted("a metadata file cannot be read", where=file, found=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint("a metadata file is not JSON", where=file, found=error) from error
