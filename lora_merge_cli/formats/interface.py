"""What a checkpoint format must do: open for reading, and write beside the target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from lora_merge_cli.records import Array, Constant, Index, KeyPath, Region, TensorSpec

FLAT = "flat"

PROVENANCE = "lora_merge.json"
"""The name of the file that says how a checkpoint was made; a suffix to the name of a checkpoint that is one file."""

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Stored:
    """A leaf's bytes as the format keeps them, to be copied without decoding."""

    encoding: str
    """The format's name for this way of keeping bytes; a sink takes only those that it names itself. `FLAT`: the entries in
    row-major order, little-endian, in pieces whose names do not matter."""
    values: Iterable[tuple[str, bytes | memoryview]]
    """Each stored value with its name inside the leaf, in pieces that follow one another under that name. A piece is good until the
    next one is asked for."""


Compression: TypeAlias = Literal["none", "zstd"]
"""How changed arrays are kept, in formats that can compress them."""


Blocks: TypeAlias = Iterator[tuple[Region, Array]]
"""A leaf's data from its first entry to its last: runs of entries in row-major order, each with where it lies."""


@dataclass(frozen=True)
class LeafData:
    """One leaf on its way into a sink."""

    spec: TensorSpec
    """What the leaf is to be."""
    chunk: tuple[int, ...]
    """What to keep in one piece, in formats that keep an array in several; a run of entries in row-major order."""
    data: Stored | Blocks
    """Its bytes, or its values."""
    same_as: KeyPath | None = None
    """An earlier leaf with the same values under another path: a format that can stores them once."""


class Source(Protocol):
    """A checkpoint's arrays, opened read-only."""

    @property
    def path(self) -> Path:
        """The directory or file that errors name."""
        ...

    def index(self) -> Index:
        """Every leaf's path, shape and dtype, from metadata alone.

        Raises:
            CorruptCheckpoint: The metadata cannot be read.
        """
        ...

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:
        """Read a leaf from front to back in little memory, whatever it is stored in.

        Args:
            path: The leaf.
            regions: What to read: runs of entries in row-major order (single indices, a part of one axis, whole axes), ascending
                and disjoint. What lies between them is skipped.
            pool: Where parts of the leaf may be decoded at the same time.

        Returns:
            The values of each region, in the stored dtype, on the host, as they are asked for.

        Raises:
            CorruptCheckpoint: A stored value is missing, truncated or damaged.
        """
        ...

    def read(self, path: KeyPath, region: Region) -> Array:
        """The values in any region at once; see `scan`."""
        ...

    def stored(self, path: KeyPath) -> Stored | None:
        """The leaf's bytes as they are kept, or None where only decoding shows that they are whole."""
        ...

    def fingerprint(self) -> str:
        """A digest of the metadata and of the names and sizes of all files: not of every byte."""
        ...


class Sink(Protocol):
    """Writes one checkpoint into an empty directory that nobody else looks at yet."""

    @property
    def encodings(self) -> frozenset[str]:
        """The `Stored.encoding` values that it takes as they are."""
        ...

    def write(self, specs: Sequence[TensorSpec], leaves: Iterable[LeafData], constants: Iterable[Constant]) -> int:
        """Pull every leaf, write it, and finish the checkpoint.

        Args:
            specs: What the leaves will be, in their order.
            leaves: The leaves.
            constants: The parts that are no arrays.

        Returns:
            The number of bytes handed to storage.

        Raises:
            DiskFull: The disk filled up.
            NotPermitted: The directory cannot be written.
        """
        ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its arrays, and what stands around them."""

    format: str
    """The format's name."""
    given: Path
    """The path as the user gave it."""
    source: Source
    """The arrays."""
    directory: Path
    """The directory that belongs to this checkpoint alone: a step, or the item itself."""
    item: str | None
    """The name of the arrays' folder inside `directory`; None when they are `directory` itself."""
    step: int | None = None
    """The training step, where the directory's name states it."""
    steps: tuple[int, ...] = ()
    """All steps of the run, when a run directory was given."""
    assets: Path | None = None
    """Files that serving needs beside the arrays."""
    provenance: Path | None = None
    """The provenance file of an earlier merge."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Names beside the arrays that a merge does not carry over, and why."""
    notes: tuple[str, ...] = ()
    """What was chosen where the path left a choice."""
    config: Mapping[str, Any] | None = None
    """The model's ``config.json``, or an adapter's ``adapter_config.json``, where it lies beside the arrays."""
    companions: tuple[str, ...] = ()
    """Names, relative to `directory`, of the files that belong to the checkpoint and hold no arrays; config.json is one."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Texts that the format keeps beside the arrays, for example those of a safetensors header."""


@dataclass(frozen=True)
class Destination:
    """Where, and as what, a checkpoint is written."""

    directory: Path
    """An empty directory."""
    file: str | None = None
    """The name of the one file to write in it; None for a checkpoint that is a directory."""
    item: str | None = None
    """The name of the folder for the arrays, in formats that have one."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    """The largest size of one file of arrays, in formats that split them."""
    compression: Compression = "none"
    """How to keep what is not copied as it is stored, in formats that can compress."""


class Format(Protocol):
    """A way of keeping a checkpoint on disk. Registered in `formats.FORMATS`."""

    @property
    def name(self) -> str:
        """The name that reports and errors use."""
        ...

    @property
    def compresses(self) -> bool:
        """Whether its sinks can compress arrays."""
        ...

    def open(self, path: Path, step: int | None) -> Checkpoint | None:
        """Open `path`, or return None if it is not of this format.

        Raises:
            InputError: It is of this format and cannot be read.
        """
        ...

    def open_adapter(self, path: Path) -> Checkpoint | None:
        """Open `path` as an adapter that lies beside its base, or return None if it is none of this format.

        Raises:
            InputError: It is one, and cannot be read.
        """
        ...

    def sink(self, destination: Destination, like: Checkpoint) -> Sink:
        """A sink that writes what `like`, a checkpoint of any format, becomes."""
        ...
