"""What the tests of the safetensors format share: writing through the sink, and reading back with the library alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from lora_merge_cli.formats.interface import FLAT, Checkpoint, Destination, LeafData, Stored
from lora_merge_cli.formats.safetensors_dir import SafetensorsFormat
from lora_merge_cli.formats.safetensors_sink import SafetensorsSink
from lora_merge_cli.records import Array, Constant, KeyPath, Region, TensorSpec, full_region, grid

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}

Tree = Mapping[KeyPath, Array]


def random_array(rng: np.random.Generator, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """Any bits, but for booleans."""
    count = int(np.prod(shape, dtype=np.int64))
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(shape)


def specs_of(tree: Tree, scalars: frozenset[KeyPath] = frozenset()) -> list[TensorSpec]:
    return [
        TensorSpec(path, value.shape, value.dtype, "scalar" if path in scalars else "array")
        for path, value in tree.items()
    ]


def blocks(value: Array, block: Sequence[int]) -> Iterator[tuple[Region, Array]]:
    for region in grid(full_region(value.shape), block):
        yield region, value[region]


def pieces(value: Array, size: int) -> Stored:
    raw = value.tobytes()
    return Stored(FLAT, ((str(start), raw[start : start + size]) for start in range(0, len(raw), size)))


def like(metadata: Mapping[str, str] | None = None) -> Checkpoint:
    """Where the output comes from, as far as the sink looks at it."""
    return Checkpoint("memory", Path("x"), None, Path("x"), None, metadata=metadata or {})  # type: ignore[arg-type]


def write(
    directory: Path,
    tree: Tree,
    *,
    block: Sequence[int] | None = None,
    constants: Sequence[Constant] = (),
    scalars: frozenset[KeyPath] = frozenset(),
    metadata: Mapping[str, str] | None = None,
    **destination: Any,
) -> int:
    """Write a tree: as stored pieces, or in blocks of so many entries along each axis."""
    sink = SafetensorsFormat().sink(Destination(directory, **destination), like(metadata))
    assert isinstance(sink, SafetensorsSink)
    specs = specs_of(tree, scalars)
    leaves = (
        LeafData(
            spec,
            spec.shape,
            pieces(tree[spec.path], 7) if block is None else blocks(tree[spec.path], [*block, *[2] * len(spec.shape)]),
        )
        for spec in specs
    )
    return sink.write(specs, leaves, constants)


def library_reads(file: Path) -> dict[str, Array]:
    """The tensors of a file as the safetensors library finds them, bit for bit."""
    return {
        name: np.frombuffer(bytes(item["data"]), DTYPES[item["dtype"]]).reshape(item["shape"])
        for name, item in safetensors.deserialize(file.read_bytes())
    }


def library_writes(file: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> None:
    """A file of the safetensors library's own making."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    raw = assemble(
        {
            name: {"dtype": names[value.dtype], "shape": list(value.shape), "data": value.tobytes()}
            for name, value in tensors.items()
        },
        metadata,
    )
    safetensors.deserialize(raw)
    file.write_bytes(raw)


def assemble(tensors: Mapping[str, Mapping[str, Any]], metadata: dict[str, str] | None = None) -> bytes:
    """A file by the format's description, in the order given."""
    document: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, item in tensors.items():
        begin = len(data)
        data += item["data"]
        document[name] = {"dtype": item["dtype"], "shape": item["shape"], "data_offsets": [begin, len(data)]}
    return with_header(json.dumps(document).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def same_bits(left: Array, right: Array) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
