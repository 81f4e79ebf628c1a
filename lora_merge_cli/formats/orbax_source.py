"""Reading the arrays of one Orbax item, always to the host."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.interface import Stored
from lora_merge_cli.formats.ocdbt_reader import Value, read_database
from lora_merge_cli.formats.orbax_metadata import (
    TREE_FILE,
    Entry,
    TreeMetadata,
    constant_of,
    read_tree,
    refuse_extended_types,
)
from lora_merge_cli.formats.zarr_array import ZarrArray
from lora_merge_cli.formats.zarr_scan import scan
from lora_merge_cli.records import Array, Index, KeyPath, Region, TensorSpec, display, first_names, relative, run_around

if TYPE_CHECKING:
    from lora_merge_cli.formats.orbax_tensorstore import TensorStoreArray

MANIFEST = "manifest.ocdbt"

_ARRAY_METADATA = {2: ".zarray", 3: "zarr.json"}
_STORED_NAME = {2: re.compile(r"\.zarray|\d+([./]\d+)*"), 3: re.compile(r"zarr\.json|c([./]\d+)*")}
_FIRST_LINE = 300
_COPY_AGAIN = "a file is missing or damaged: copy the checkpoint again from where it was written"


class OrbaxSource:
    """One Orbax item, opened read-only. See `Source` for what each method promises."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ocdbt = (path / MANIFEST).exists()
        self._entries: dict[KeyPath, Entry] = {}
        self._arrays: dict[KeyPath, ZarrArray | TensorStoreArray] = {}
        # A file is opened once, not once per chunk.
        self._opened = functools.lru_cache(8)(FlatFile)

    @property
    def path(self) -> Path:
        """The item's directory."""
        return self._path

    @property
    def zarr_version(self) -> int:
        """2 or 3."""
        return self._tree.zarr_version

    def index(self) -> Index:
        """See `Source.index`."""
        return self._index

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:
        """See `Source.scan`."""
        array = self._array(path)
        with self._naming(path):
            if isinstance(array, ZarrArray):
                prefix = self._entries[path].storage_name
                yield from scan(array, lambda name: self._values[f"{prefix}/{name}"], regions, self._opened, pool)
            else:
                yield from array.scan(regions)

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`."""
        around = run_around(region, self._index.tensors[path].shape)
        return next(self.scan(path, [around]))[relative(region, around)]

    def stored(self, path: KeyPath) -> Stored | None:
        """See `Source.stored`.

        Only an OCDBT database keeps the length of each value, so only there is a copy a check. Where chunks of zeros were left
        out, a copy would have to leave them out too, which the output's metadata denies.
        """
        if not (self._ocdbt and self._tree.fill_values_stored):
            return None
        return Stored(f"orbax-zarr{self.zarr_version}", self._stored_values(path))

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        digest = hashlib.sha256()
        for folder, folders, files in os.walk(self._path):
            folders.sort()
            for name in sorted(files):
                file = Path(folder, name)
                relative = file.relative_to(self._path).as_posix()
                digest.update(f"{relative}\0{file.lstat().st_size}\0".encode())
                if name in (TREE_FILE, MANIFEST):
                    digest.update(file.read_bytes())
        return f"sha256:{digest.hexdigest()}"

    @functools.cached_property
    def _tree(self) -> TreeMetadata:
        tree = read_tree(self._path)
        refuse_extended_types(self._path)
        return tree

    @functools.cached_property
    def _values(self) -> Mapping[str, Value]:
        """Where each stored value lies."""
        if self._ocdbt:
            return read_database(self._path)
        files = (Path(folder, name) for folder, _, names in os.walk(self._path) for name in names)
        return {file.relative_to(self._path).as_posix(): Value(file.stat().st_size, None, file) for file in files}

    @functools.cached_property
    def _index(self) -> Index:
        tree = self._tree
        constants, tensors = [], {}
        for entry in tree.entries:
            constant = constant_of(entry, tree, self._path)
            if constant is not None:
                constants.append(constant)
                continue
            self._entries[entry.path] = entry
            with self._naming(entry.path):
                array = self._open_array(entry)
            self._arrays[entry.path] = array
            tensors[entry.path] = TensorSpec(
                entry.path, array.shape, array.dtype, "scalar" if entry.value_type == "scalar" else "array"
            )
            if tree.fill_values_stored and tensors[entry.path].size:
                self._refuse_missing_chunks(entry, array)
        return Index(tensors, tuple(constants))

    def _open_array(self, entry: Entry) -> ZarrArray | TensorStoreArray:
        name = f"{entry.storage_name}/{_ARRAY_METADATA[self.zarr_version]}"
        if name not in self._values:
            raise CorruptCheckpoint("an array without metadata", found=f"no {name}", hint=_COPY_AGAIN)
        array = ZarrArray.parse(self._bytes(self._values[name]), self.zarr_version)
        # A reader of its own would have to make up the chunks that were left out.
        if array is not None and self._tree.fill_values_stored:
            return array
        from lora_merge_cli.formats.orbax_tensorstore import TensorStoreArray

        return TensorStoreArray(self._path, entry.storage_name, self.zarr_version, ocdbt=self._ocdbt)

    def _array(self, path: KeyPath) -> ZarrArray | TensorStoreArray:
        self.index()
        return self._arrays[path]

    def _bytes(self, value: Value) -> bytes:
        if value.inline is not None:
            return value.inline
        assert value.file is not None, "a value is inline or in a file"
        return self._opened(value.file).read_bytes(value.offset, value.size)

    def _refuse_missing_chunks(self, entry: Entry, array: ZarrArray | TensorStoreArray) -> None:
        names = list(array.names())
        missing = [name for name in names if f"{entry.storage_name}/{name}" not in self._values]
        if missing:
            raise CorruptCheckpoint(
                "chunks are missing",
                where=f"{self._path} :: {display(entry.path)}",
                expected=f"{len(names)} chunks",
                found=f"none at {first_names(missing, 3)}",
                hint="copy the checkpoint again from where it was written",
            )

    @functools.cached_property
    def _names(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the stored values inside each array."""
        names: dict[str, list[str]] = {}
        folders = {entry.storage_name for entry in self._entries.values()}
        for full in self._values:
            head, _, name = full.partition("/")
            while head not in folders and name:
                more, _, name = name.partition("/")
                head = f"{head}/{more}"
            names.setdefault(head, []).append(name)
        return {folder: tuple(found) for folder, found in names.items()}

    def _stored_values(self, path: KeyPath) -> Iterator[tuple[str, bytes | memoryview]]:
        self.index()
        folder = self._entries[path].storage_name
        pattern = _STORED_NAME[self.zarr_version]
        with self._naming(path):
            for name in filter(pattern.fullmatch, self._names[folder]):
                value = self._values[f"{folder}/{name}"]
                if not value.size:
                    raise CorruptCheckpoint("a stored chunk is empty", found=f"no bytes for {name}", hint=_COPY_AGAIN)
                if value.inline is not None or value.file is None:
                    yield name, value.inline or b""
                else:
                    for _, piece in self._opened(value.file).pieces(value.offset, value.size):
                        yield name, piece

    @contextlib.contextmanager
    def _naming(self, path: KeyPath) -> Iterator[None]:
        """Let an error name the leaf."""
        where = f"{self._path} :: {display(path)}"
        try:
            yield
        except CorruptCheckpoint as error:
            if error.where is not None and "::" in str(error.where):
                raise
            raise CorruptCheckpoint(
                error.what,
                where=where,
                expected=error.expected,
                found=error.found,
                hint=error.hint or _COPY_AGAIN,
            ) from error
        except (ValueError, OSError) as error:
            reason = str(error).split(" [")[0][:_FIRST_LINE]
            raise CorruptCheckpoint("cannot be read", where=where, found=reason, hint=_COPY_AGAIN) from error
