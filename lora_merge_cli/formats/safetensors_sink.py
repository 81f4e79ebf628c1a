"""Writing safetensors: one file, or shards with an index, each byte at its final place as soon as it is there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_merge_cli.errors import CorruptCheckpoint, storage_refusal
from lora_merge_cli.formats.flat import WriteBehind, write_all, write_region
from lora_merge_cli.formats.interface import FLAT, Checkpoint, Destination, LeafData, Stored
from lora_merge_cli.formats.safetensors_header import Entry, build_header
from lora_merge_cli.formats.safetensors_paths import PREFIX, encode_tables, is_flat, name_of, refuse_collisions
from lora_merge_cli.records import Array, Constant, KeyPath, Region, TensorSpec

MODEL_STEM = "model"
"""What files are called that hold a state dict, for any library to load."""
TREE_STEM = "params"
"""What they are called otherwise: servers take a ``model.safetensors`` for a PyTorch state dict."""


@dataclass(frozen=True)
class _Place:
    """Where a leaf goes."""

    file: Path
    entry: Entry


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
        places, total = self._begin(shards, tuple(constants))
        given: set[KeyPath] = set()
        # Closed last: whatever is still being written needs its file.
        with contextlib.ExitStack() as held, WriteBehind() as behind:
            current: Path | None = None
            descriptor = -1
            for leaf in leaves:
                place = places[leaf.spec.path]
                if place.file != current:
                    behind.drain()
                    held.close()
                    descriptor = _open(place.file, os.O_WRONLY)
                    held.callback(os.close, descriptor)
                    current = place.file
                total += _write_leaf(descriptor, place, leaf, behind)
                given.add(leaf.spec.path)
        for path in places.keys() - given:
            raise _incomplete(places[path], 0)
        if len(shards) > 1:
            self._write_index(shards)
        return total

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

    def _begin(
        self, shards: dict[str, list[TensorSpec]], constants: tuple[Constant, ...]
    ) -> tuple[dict[KeyPath, _Place], int]:
        """Create every file with its header: where each leaf goes, and the bytes written."""
        everything = [spec for group in shards.values() for spec in group]
        metadata = self._metadata or ({"format": "pt"} if is_flat(everything) else {})
        places: dict[KeyPath, _Place] = {}
        total = 0
        for name, group in shards.items():
            file = self._destination.directory / name
            # Wider entries first: without gaps, every tensor is then aligned to its own entries.
            ordered = sorted(group, key=lambda spec: -spec.dtype.itemsize)
            header, entries = build_header(
                [(name_of(spec.path), spec.shape, spec.dtype) for spec in ordered],
                metadata | encode_tables(group, constants),
            )
            places |= {spec.path: _Place(file, entry) for spec, entry in zip(ordered, entries, strict=True)}
            descriptor = _open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                with _storing(file):
                    write_all(descriptor, 0, memoryview(header))
            finally:
                os.close(descriptor)
            total += len(header)
        return places, total

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


def _write_leaf(descriptor: int, place: _Place, leaf: LeafData, behind: WriteBehind) -> int:
    """Write a leaf to its place, blocks while the next one is computed, and return its size."""
    entry = place.entry
    done = 0
    if isinstance(leaf.data, Stored):
        for _, value in leaf.data.values:
            with _storing(place.file):
                write_all(descriptor, entry.offset + done, memoryview(value))
            done += len(value)
    else:
        for region, values in leaf.data:
            if values.dtype != entry.dtype:
                raise _incomplete(place, f"values in {values.dtype}")
            behind.submit(_write_block, descriptor, place, region, values)
            done += values.nbytes
    if done != entry.nbytes:
        raise _incomplete(place, done)
    return done


def _write_block(descriptor: int, place: _Place, region: Region, values: Array) -> None:
    with _storing(place.file):
        write_region(descriptor, place.entry.offset, place.entry.shape, region, values)


def _open(file: Path, flags: int) -> int:
    with _storing(file):
        return os.open(file, flags, 0o666)


def _incomplete(place: _Place, found: object) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "a leaf that was not given in full",
        where=f"{place.file} :: {place.entry.name}",
        expected=f"{place.entry.nbytes} bytes in {place.entry.dtype}",
        found=found,
    )


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_refusal(path, error) from error
