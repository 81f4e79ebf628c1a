"""Writing one Orbax item: arrays through TensorStore into an OCDBT database, metadata as Orbax writes it.

TensorStore and three small JSON files, not Orbax's own save: that takes whole arrays, its streaming interface is not stable, and
importing it costs more than a small merge. What Orbax itself reads of the result is proven in ``tests/compat``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lora_merge_cli.errors import UnsupportedCheckpoint, storage_refusal
from lora_merge_cli.formats.interface import LeafData, Stored
from lora_merge_cli.formats.orbax_metadata import Entry, write_step, write_tree
from lora_merge_cli.formats.waiting import finished
from lora_merge_cli.records import Array, Constant, Region, TensorSpec, display

_BYTES_IN_FLIGHT = 384 * 2**20
_NUMBERS: dict[str, Callable[[str], Array]] = {
    "int": lambda text: np.asarray(int(text), np.int64),
    "float": lambda text: np.asarray(float(text), np.float64),
    "bool": lambda text: np.asarray(text == "True"),
}
_CODECS: dict[int, dict[str, Any]] = {
    2: {"compressor": {"id": "zstd", "level": 1}},
    3: {
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 1}},
        ]
    },
}
# Orbax's own values: metadata inline, nodes large enough for one per checkpoint.
_OCDBT = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}


class OrbaxSink:
    """Writes one item. See `Sink` for what each method promises."""

    def __init__(self, directory: Path, item: str | None, zarr_version: int) -> None:
        self._directory = directory
        self._item = item
        self._path = directory if item is None else directory / item
        self._zarr_version = zarr_version
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._started_ns = time.time_ns()

    @property
    def encodings(self) -> frozenset[str]:
        """See `Sink.encodings`."""
        return frozenset({f"orbax-zarr{self._zarr_version}"})

    def write(self, specs: Sequence[TensorSpec], leaves: Iterable[LeafData], constants: Iterable[Constant]) -> int:
        """See `Sink.write`."""
        numbers, constants = _numbers_as_leaves(constants)
        specs, leaves = [*specs, *(leaf.spec for leaf in numbers)], itertools.chain(leaves, numbers)
        with _storing(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
        pending: deque[tuple[int, ts.Future[Any]]] = deque()
        total = in_flight = 0
        try:
            for leaf in leaves:
                for size, start in self._writes(leaf):
                    with _storing(self._path):
                        while pending and in_flight + size > _BYTES_IN_FLIGHT:
                            in_flight -= _wait_for_first(pending)
                        future = start()
                        future.force()
                        pending.append((size, future))
                    in_flight += size
                    total += size
            with _storing(self._path):
                while pending:
                    _wait_for_first(pending)
        finally:
            # A write that still runs would bring back the directory that a failed run is about to remove.
            for _, future in pending:
                with contextlib.suppress(Exception):
                    finished(future)
        with _storing(self._path):
            write_tree(self._path, specs, constants, self._zarr_version)
            write_step(self._directory, self._item, self._started_ns)
        return total

    def _writes(self, leaf: LeafData) -> Iterator[tuple[int, Callable[[], ts.Future[Any]]]]:
        """The size of each value to be stored, and the call that starts storing it."""
        prefix = f"{Entry(leaf.spec.path, '', skipped=False).storage_name}/"
        if isinstance(leaf.data, Stored):
            with _storing(self._path):
                store = finished(ts.KvStore.open(self._kvstore(prefix), context=self._context))
            for name, value in leaf.data.values:
                yield len(value), functools.partial(store.write, name, value)
            return
        with _storing(self._path):
            opening = ts.open(
                {
                    "driver": "zarr3" if self._zarr_version == 3 else "zarr",
                    "kvstore": self._kvstore(prefix),
                    "metadata": _CODECS[self._zarr_version],
                    "store_data_equal_to_fill_value": True,
                },
                create=True,
                open=True,
                dtype=ts.dtype(leaf.spec.dtype),
                shape=leaf.spec.shape,
                chunk_layout=ts.ChunkLayout(chunk_shape=leaf.block),
                context=self._context,
            )
            array = finished(opening)
        for region, values in leaf.data:
            yield values.nbytes, functools.partial(_write_region, array, region, values)

    def _kvstore(self, prefix: str) -> dict[str, Any]:
        files = {"driver": "file", "path": f"{self._path}/"}
        return {"driver": "ocdbt", "base": files, "config": _OCDBT, "path": prefix}


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


def _wait_for_first(pending: deque[tuple[int, ts.Future[Any]]]) -> int:
    """Wait for the oldest write and return its size. It stays listed until it is done, whatever interrupts the wait."""
    size, future = pending[0]
    finished(future)
    pending.popleft()
    return size


def _write_region(array: ts.TensorStore, region: Region, values: Array) -> ts.Future[Any]:
    return array[region].write(values).commit


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise storage_refusal(path, error) from error
