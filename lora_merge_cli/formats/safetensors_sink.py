"""Writing safetensors: one file, or shards with an index, each byte at its final place as soon as it is there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_merge_cli.errors import CorruptCheckpoint, storage_refusal
from lora_merge_cli.formats.file_writer import FileWriter
from lora_merge_cli.formats.flat import pieces_of
from lora_merge_cli.formats.interface import FLAT, Checkpoint, Destination, LeafData
from lora_merge_cli.formats.safetensors_header import Entry, build_header
from lora_merge_cli.formats.safetensors_paths import PREFIX, encode_tables, is_flat, name_of, refuse_collisions
from lora_merge_cli.records import Constant, KeyPath, TensorSpec

MODEL_STEM = "model"
"""What files are called that hold a state dict, for any library to load."""
TREE_STEM = "params"
"""What they are called otherwise: servers take a ``model.safetensors`` for a PyTorch state dict."""


@dataclass(frozen=True)
class _File:
    """One file to be."""

    path: Path
    header: bytes
    entries: Mapping[KeyPath, Entry]
    """Where in the file each leaf goes."""

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.entries.values())


class SafetensorsSink:
    """Writes one file, or as many as the largest size of a shard asks for. See `Sink` for what each method promises."""

    def __init__(self, destination: Destination, like: Checkpoint) -> None:
        self._destination = destination
        self._metadata = {key: text for key, text in like.metadata.items() if not key.startswith(PREFIX)}

    @property
    def encodings(self) -> frozenset[str]:
        """See `Sink.encodings`."""
        return frozenset({FLAT})

    def write(self, specs: Sequence[TensorSpec], leaves: Iterable[LeafData], constants: Iterable[Constant]) -> int:
        """See `Sink.write`.

        Raises:
            UnsupportedCheckpoint: A leaf cannot be kept in this format, or two have one name.
            CorruptCheckpoint: A leaf was not given in full.
        """
        directory = self._destination.directory
        with _storing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        refuse_collisions(specs)
        shards = self._shards(specs)
        files = [self._file(name, group, tuple(constants)) for name, group in shards.items()]
        places = {path: file for file in files for path in file.entries}
        given: set[KeyPath] = set()
        with contextlib.ExitStack() as held:
            current: _File | None = None
            for leaf in leaves:
                file = places[leaf.spec.path]
                if file is not current:
                    held.close()
                    current, writer = file, held.enter_context(_begun(file))
                _write_leaf(writer, file, leaf)
                given.add(leaf.spec.path)
            if not places:
                held.enter_context(_begun(files[0]))
        for path in places.keys() - given:
            raise _incomplete(places[path], places[path].entries[path], 0)
        if len(shards) > 1:
            self._write_index(shards)
        return sum(file.nbytes for file in files)

    def _shards(self, specs: Sequence[TensorSpec]) -> dict[str, list[TensorSpec]]:
        """What goes into which file. A shard ends where the next leaf would make it too large."""
        if self._destination.file is not None:
            return {self._destination.file: list(specs)}
        groups: list[list[TensorSpec]] = [[]]
        size = 0
        for spec in specs:
            if groups[-1] and size + spec.nbytes > self._destination.max_shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(spec)
            size += spec.nbytes
        stem = _stem(specs)
        if len(groups) == 1:
            return {f"{stem}.safetensors": groups[0]}
        return {
            f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors": group
            for number, group in enumerate(groups, start=1)
        }

    def _file(self, name: str, group: Sequence[TensorSpec], constants: tuple[Constant, ...]) -> _File:
        """A file's header, and where in it each leaf goes."""
        metadata = self._metadata or ({"format": "pt"} if is_flat(group) else {})
        # Wider entries first: without gaps, every tensor is then aligned to its own entries.
        ordered = sorted(group, key=lambda spec: -spec.dtype.itemsize)
        header, entries = build_header(
            [(name_of(spec.path), spec.shape, spec.dtype) for spec in ordered],
            metadata | encode_tables(group, constants),
        )
        return _File(
            self._destination.directory / name,
            header,
            {spec.path: entry for spec, entry in zip(ordered, entries, strict=True)},
        )

    def _write_index(self, shards: dict[str, list[TensorSpec]]) -> None:
        everything = [spec for group in shards.values() for spec in group]
        document = {
            "metadata": {"total_size": sum(spec.nbytes for spec in everything)},
            "weight_map": {name_of(spec.path): name for name, group in shards.items() for spec in group},
        }
        file = self._destination.directory / f"{_stem(everything)}.safetensors.index.json"
        with _storing(file):
            file.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _stem(specs: Sequence[TensorSpec]) -> str:
    return MODEL_STEM if is_flat(specs) else TREE_STEM


@contextlib.contextmanager
def _begun(file: _File) -> Iterator[FileWriter]:
    """A file with its header, for the leaves to be written to."""
    with _storing(file.path), FileWriter(file.path) as writer:
        writer.append(file.header)
        yield writer


def _write_leaf(writer: FileWriter, file: _File, leaf: LeafData) -> None:
    """Write a leaf to its place."""
    entry = file.entries[leaf.spec.path]
    done = 0
    for piece in pieces_of(leaf, entry.dtype):
        with _storing(file.path):
            writer.write(entry.offset + done, piece)
        done += len(piece)
    if done != entry.nbytes:
        raise _incomplete(file, entry, done)


def _incomplete(file: _File, entry: Entry, found: int) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "a leaf that was not given in full",
        where=f"{file.path} :: {entry.name}",
        expected=f"{entry.nbytes} bytes in {entry.dtype}",
        found=found,
    )


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_refusal(path, error) from error
