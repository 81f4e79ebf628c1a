"""Reading the tensors of torch's files: lazily, from where their storages lie, whatever their strides."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.interface import FLAT, Stored
from lora_merge_cli.formats.torch_archive import open_archive
from lora_merge_cli.formats.torch_tree import flatten
from lora_merge_cli.formats.torch_values import TensorView
from lora_merge_cli.formats.torch_zip import Archive
from lora_merge_cli.records import (
    Array,
    Constant,
    Index,
    KeyPath,
    Region,
    TensorSpec,
    display,
    first_names,
    region_shape,
)

_PIECE_BYTES = 32 * 2**20
_WORTH_SKIPPING = 64 * 2**10


@dataclass(frozen=True)
class _Leaf:
    """A tensor, located."""

    file: FlatFile
    first_byte: int
    view: TensorView


class TorchSource:
    """The state dict of one file, or of a checkpoint's shards together. See `Source` for what each method promises.

    Args:
        path: What errors name: the file, or the directory of the shards.
        files: The files, in their order.
        weight_map: For shards: for each key the name of the file that holds it.
        opened: The one file, where that was opened already.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        weight_map: Mapping[str, str] | None = None,
        opened: Archive | None = None,
    ) -> None:
        self._path = path
        self._files = tuple(files)
        self._weight_map = weight_map
        self._opened = opened
        self._leaves: dict[KeyPath, _Leaf] = {}
        self._digest = hashlib.sha256()
        self._index: Index | None = None
        self.containers: dict[KeyPath, type[Any]] = {}
        """What each container of the tree is, once `index` was called: a sink can restore it."""
        self.order: dict[KeyPath, None] = {}
        """All leaves and constants in the order of the files, likewise."""

    @property
    def path(self) -> Path:
        """The file, or the directory of the shards."""
        return self._path

    def index(self) -> Index:
        """See `Source.index`."""
        if self._index is None:
            constants: list[Constant] = []
            for file in self._files:
                constants += self._add(file)
            if self._weight_map is not None:
                self._check_shards(self._weight_map)
            specs = {path: TensorSpec(path, leaf.view.shape, leaf.view.dtype) for path, leaf in self._leaves.items()}
            self._index = Index(specs, tuple(constants), self._shared())
        return self._index

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:  # noqa: ARG002
        """See `Source.scan`: plain bytes need no decoding."""
        return (self.read(path, region) for region in regions)

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`."""
        leaf = self._leaf(path)
        view = leaf.view
        with _naming(leaf, path):
            if view.is_contiguous:
                return leaf.file.read_region(leaf.first_byte, view.shape, view.dtype, region)
            result = np.empty(region_shape(region), view.dtype)
            if result.size:
                first = sum(part.start * stride for part, stride in zip(region, view.strides, strict=True))
                _read_strided(leaf.file, leaf.first_byte + first * view.dtype.itemsize, view.strides, result)
            return result

    def stored(self, path: KeyPath) -> Stored | None:
        """See `Source.stored`."""
        leaf = self._leaf(path)
        if not leaf.view.is_contiguous:
            return None
        size = math.prod(leaf.view.shape) * leaf.view.dtype.itemsize
        return Stored(FLAT, _pieces(leaf, path, size))

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        self.index()
        return f"sha256:{self._digest.hexdigest()}"

    def _leaf(self, path: KeyPath) -> _Leaf:
        self.index()
        return self._leaves[path]

    def _add(self, path: Path) -> list[Constant]:
        """Take over one file's leaves, and return its constants."""
        archive, self._opened = self._opened or open_archive(path), None
        if archive is None:
            raise CorruptCheckpoint("not a file that torch.save wrote", where=path)
        self._digest.update(f"{path.name}\0{archive.file.size}\0".encode(errors="surrogateescape"))
        self._digest.update(archive.described)
        tree = flatten(archive.value, path)
        again = [display(leaf) for leaf in tree.order if leaf in self.order]
        if again:
            raise CorruptCheckpoint("keys that an earlier shard holds as well", where=path, found=first_names(again))
        for leaf, view in tree.tensors.items():
            self._leaves[leaf] = _Leaf(archive.file, _locate(archive, leaf, view), view)
        self.containers.update(tree.containers)
        self.order.update(tree.order)
        return tree.constants

    def _check_shards(self, weight_map: Mapping[str, str]) -> None:
        held = {path: leaf.file.path.name for path, leaf in self._leaves.items()}
        stated: dict[KeyPath, str] = {(key,): name for key, name in weight_map.items()}
        moved = [path for path in held.keys() & stated.keys() if held[path] != stated[path]]
        for what, paths in (
            ("the index names keys that the shards do not hold", stated.keys() - held.keys()),
            ("the shards hold keys that the index does not name", held.keys() - stated.keys()),
            ("keys lie in other shards than the index says", moved),
        ):
            if paths:
                raise CorruptCheckpoint(what, where=self._path, found=first_names(sorted(map(display, paths))))

    def _shared(self) -> dict[KeyPath, KeyPath]:
        first: dict[object, KeyPath] = {}
        shared = {}
        for path, leaf in self._leaves.items():
            if 0 in leaf.view.shape:
                continue
            # An extent of one has no stride that matters.
            strides = tuple(s for s, n in zip(leaf.view.strides, leaf.view.shape, strict=True) if n > 1)
            same = (id(leaf.file), leaf.first_byte, leaf.view.shape, strides, leaf.view.dtype)
            if first.setdefault(same, path) != path:
                shared[path] = first[same]
        return shared


def _pieces(leaf: _Leaf, path: KeyPath, size: int) -> Iterator[tuple[str, memoryview]]:
    with _naming(leaf, path):
        yield from leaf.file.pieces(leaf.first_byte, size)


@contextlib.contextmanager
def _naming(leaf: _Leaf, path: KeyPath) -> Iterator[None]:
    """Let an error name the leaf as well as the file."""
    try:
        yield
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(
            error.what,
            where=f"{leaf.file.path} :: {display(path)}",
            expected=error.expected,
            found=error.found,
            hint=error.hint,
        ) from error


def _locate(archive: Archive, path: KeyPath, view: TensorView) -> int:
    """Where the first entry of a tensor lies in its file."""
    where = f"{archive.file.path} :: {display(path)}"
    storage = view.storage
    if storage.key not in archive.storages:
        raise CorruptCheckpoint("a storage is missing", where=where, found=f"none with the key {storage.key[:100]!r}")
    offset, size = archive.storages[storage.key]
    if storage.root_nbytes > size:
        raise CorruptCheckpoint(
            "a storage is smaller than the pickle states",
            where=where,
            expected=f"{storage.root_nbytes} bytes",
            found=f"{size}",
        )
    return offset + view.first_byte


def _read_strided(file: FlatFile, first_byte: int, strides: Sequence[int], result: Array) -> None:
    """Fill `result` with entries that lie apart.

    What lies between the first and the last of them is read at once, unless it is much more than they are or too much to hold:
    then each half of the axis that reaches furthest is read by itself.
    """
    reaches = [(extent - 1) * stride for extent, stride in zip(result.shape, strides, strict=True)]
    itemsize = result.dtype.itemsize
    span = (1 + sum(reaches)) * itemsize
    if span <= max(min(2 * result.nbytes, _PIECE_BYTES), _WORTH_SKIPPING):
        raw = np.frombuffer(file.read_bytes(first_byte, span), result.dtype)
        result[...] = np.lib.stride_tricks.as_strided(raw, result.shape, [s * itemsize for s in strides])
        return
    axis = int(np.argmax(reaches))
    half = result.shape[axis] // 2
    lower = (slice(None),) * axis
    _read_strided(file, first_byte, strides, result[(*lower, slice(None, half))])
    _read_strided(file, first_byte + half * strides[axis] * itemsize, strides, result[(*lower, slice(half, None))])
