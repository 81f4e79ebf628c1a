"""Names of tensors, and the key paths that they stand for.

Where a tree is deeper than one level, a name joins the path's parts with ``/``, and the file's metadata keep what this loses: the
exact parts, which leaves are Python numbers, and what is no array at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats.safetensors_header import Header, strict_json
from lora_merge_cli.records import Constant, KeyPath, TensorSpec, display, first_names

PREFIX = "lora_merge."

_KEY_PATHS = f"{PREFIX}key_paths"
_CONSTANTS = f"{PREFIX}constants"


@dataclass(frozen=True)
class Tables:
    """What a file's metadata say about its names."""

    specs: Mapping[str, TensorSpec]
    """What each tensor is, by name, in the order of their bytes."""
    constants: tuple[Constant, ...]


def is_flat(specs: Iterable[TensorSpec]) -> bool:
    """Whether every path is a single name, as in a state dict."""
    return all(len(spec.path) == 1 and isinstance(spec.path[0], str) for spec in specs)


def name_of(path: KeyPath) -> str:
    """The name that a leaf is stored under: its only part, or all of them joined with ``/``."""
    return display(path)


def refuse_collisions(specs: Iterable[TensorSpec]) -> None:
    """Refuse two key paths of one name.

    Raises:
        UnsupportedCheckpoint: There are two.
    """
    seen: dict[str, KeyPath] = {}
    for spec in specs:
        name = name_of(spec.path)
        if name in seen:
            raise UnsupportedCheckpoint(
                "two key paths that safetensors would store under one name",
                where=name,
                found=f"{seen[name]} and {spec.path}",
            )
        seen[name] = spec.path


def encode_tables(specs: Sequence[TensorSpec], constants: Sequence[Constant]) -> dict[str, str]:
    """The metadata that `decode_tables` reads; nothing where the names say it all."""
    texts = {}
    if not is_flat(specs) or any(spec.kind != "array" for spec in specs):
        paths = {name_of(spec.path): _described(spec) for spec in specs}
        texts[_KEY_PATHS] = json.dumps(paths, ensure_ascii=False)
    if constants:
        listed = [[list(constant.path), constant.kind, constant.value] for constant in constants]
        texts[_CONSTANTS] = json.dumps(listed, ensure_ascii=False)
    return texts


def decode_tables(file: Path, header: Header) -> Tables:
    """The exact key paths of a file's tensors, and its constants. Without a table each name is a path of one part.

    Raises:
        CorruptCheckpoint: A table is not what `encode_tables` writes, or is another file's.
    """
    names = {entry.name: entry for entry in header.entries}
    described: Mapping[str, tuple[KeyPath, bool]] = {name: ((name,), False) for name in names}
    constants: tuple[Constant, ...] = ()
    try:
        if _KEY_PATHS in header.metadata:
            table = strict_json(header.metadata[_KEY_PATHS])
            described = {name: (_path(item["path"]), item.get("kind") == "scalar") for name, item in table.items()}
        if _CONSTANTS in header.metadata:
            constants = tuple(_constant(*item) for item in strict_json(header.metadata[_CONSTANTS]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(
            "a table of key paths that lora-merge did not write", where=file, found=repr(error)
        ) from error
    strangers = described.keys() ^ names.keys()
    if strangers:
        raise CorruptCheckpoint(
            "a table of key paths that does not fit the tensors", where=file, found=first_names(sorted(strangers))
        )
    specs = {}
    for entry in header.entries:
        path, scalar = described[entry.name]
        specs[entry.name] = TensorSpec(path, entry.shape, entry.dtype, "scalar" if scalar else "array")
    return Tables(specs, constants)


def _described(spec: TensorSpec) -> dict[str, Any]:
    path = {"path": list(spec.path)}
    return path if spec.kind == "array" else {**path, "kind": spec.kind}


def _path(parts: Any) -> KeyPath:
    if not (isinstance(parts, list) and all(type(part) in (str, int) for part in parts)):
        raise TypeError(f"{parts!r} is no key path")
    return tuple(parts)


def _constant(path: Any, kind: Any, value: Any) -> Constant:
    if not (isinstance(kind, str) and isinstance(value, str | None)):
        raise TypeError(f"{kind!r} and {value!r} are no constant")
    return Constant(_path(path), kind, value)
