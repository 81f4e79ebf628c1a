"""Writing one Orbax item: an OCDBT database of zarr arrays, with the metadata as Orbax writes them.

Not Orbax's own save: that takes whole arrays, its streaming interface is not stable, and importing it costs more than a small
merge. Nor TensorStore: it copies what it stores several times. What both read of the result is proven in ``tests/compat``.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint, storage_refusal
from lora_merge_cli.formats.file_writer import FileWriter
from lora_merge_cli.formats.flat import pieces_of
from lora_merge_cli.formats.interface import Compression, LeafData, Stored
from lora_merge_cli.formats.ocdbt_writer import OcdbtWriter
from lora_merge_cli.formats.orbax_metadata import Entry, write_step, write_tree
from lora_merge_cli.formats.zarr_array import ZarrArray
from lora_merge_cli.formats.zarr_encoding import chunks_of, metadata_of
from lora_merge_cli.records import Array, Constant, TensorSpec, display

_NUMBERS: dict[str, Callable[[str], Array]] = {
    "int": lambda text: np.asarray(int(text), np.int64),
    "float": lambda text: np.asarray(float(text), np.float64),
    "bool": lambda text: np.asarray(text == "True"),
}


class OrbaxSink:
    """Writes one item. See `Sink` for what each method promises."""

    def __init__(self, directory: Path, item: str | None, zarr_version: int, compression: Compression = "none") -> None:
        self._directory = directory
        self._item = item
        self._path = directory if item is None else directory / item
        self._zarr_version = zarr_version
        self._compression: Compression = compression
        self._started_ns = time.time_ns()

    @property
    def encodings(self) -> frozenset[str]:
        """See `Sink.encodings`."""
        return frozenset({f"orbax-zarr{self._zarr_version}"})

    def write(self, specs: Sequence[TensorSpec], leaves: Iterable[LeafData], constants: Iterable[Constant]) -> int:
        """See `Sink.write`.

        Raises:
            CorruptCheckpoint: A leaf was not given in full.
        """
        numbers, constants = _numbers_as_leaves(constants)
        specs, leaves = [*specs, *(leaf.spec for leaf in numbers)], itertools.chain(leaves, numbers)
        with _storing(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            # First, since it refuses keys that would share a name.
            write_tree(self._path, specs, constants, self._zarr_version)
        total = 0
        with contextlib.ExitStack() as held:
            database = OcdbtWriter(self._path, lambda path: held.enter_context(FileWriter(path)))
            for leaf in leaves:
                for name, pieces in self._values(leaf):
                    with _storing(self._path):
                        total += database.add(name, pieces)
            with _storing(self._path):
                database.finish()
        with _storing(self._path):
            write_step(self._directory, self._item, self._started_ns)
        return total

    def _values(self, leaf: LeafData) -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
        """Each value to be stored, with its key and its bytes; to be taken in turn."""
        folder = Entry(leaf.spec.path, "", skipped=False).storage_name
        if isinstance(leaf.data, Stored):
            for name, group in itertools.groupby(leaf.data.values, key=lambda value: value[0]):
                yield f"{folder}/{name}", (piece for _, piece in group)
            return
        array = ZarrArray(
            leaf.spec.shape,
            leaf.chunk,
            leaf.spec.dtype,
            "raw" if self._compression == "none" else "zstd",
            *((".", ()) if self._zarr_version == 2 else ("/", ("c",))),
        )
        try:
            name, document = metadata_of(array, self._zarr_version)
        except ValueError as error:
            raise UnsupportedCheckpoint(
                "a dtype that Orbax cannot keep",
                where=f"{self._path} :: {leaf.spec.name}",
                found=leaf.spec.dtype.name,
                hint="pass --to safetensors",
            ) from error
        yield f"{folder}/{name}", [document]
        given = 0

        def counted() -> Iterator[memoryview]:
            nonlocal given
            for piece in pieces_of(leaf, leaf.spec.dtype):
                given += len(piece)
                yield piece

        stream = counted()
        for name, pieces in chunks_of(array, stream):
            yield f"{folder}/{name}", pieces
        # Pulled to its end, so that whoever makes the leaf sees that it is done.
        for _ in stream:
            pass
        if given != leaf.spec.nbytes:
            raise CorruptCheckpoint(
                "a leaf that was not given in full",
                where=f"{self._path} :: {leaf.spec.name}",
                expected=f"{leaf.spec.nbytes} bytes",
                found=given,
            )


def _numbers_as_leaves(constants: Iterable[Constant]) -> tuple[list[LeafData], list[Constant]]:
    """Python numbers, which Orbax stores as arrays without axes, and the constants that are none."""
    numbers: list[LeafData] = []
    others: list[Constant] = []
    for constant in constants:
        number = _NUMBERS.get(constant.kind)
        if number is None or constant.value is None:
            others.append(constant)
            continue
        try:
            value = number(constant.value)
        except OverflowError as error:
            raise UnsupportedCheckpoint(
                "a number that Orbax cannot hold", where=display(constant.path), found=constant.value
            ) from error
        numbers.append(LeafData(TensorSpec(constant.path, (), value.dtype, "scalar"), (), iter([((), value)])))
    return numbers, others


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_refusal(path, error) from error
