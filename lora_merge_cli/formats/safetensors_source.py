"""Reading tensors from one safetensors file, or from the shards that an index names."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.hf_dir import refuse_dangling
from lora_merge_cli.formats.interface import FLAT, Stored
from lora_merge_cli.formats.safetensors_header import Entry, read_header, strict_json
from lora_merge_cli.formats.safetensors_paths import decode_tables
from lora_merge_cli.records import Array, Constant, Index, KeyPath, Region, TensorSpec, display, first_names

# A checkpoint may have more shards than a process may have files open.
_FILES_OPEN = 32


@dataclass(frozen=True)
class _Place:
    """Where a leaf is."""

    file: Path
    entry: Entry


class SafetensorsSource:
    """Tensors of one file or several, opened read-only. See `Source` for what each method promises.

    Args:
        path: The directory or file that stands for all of them.
        files: Where they are, in the order of their names.
        weight_map: Which file each tensor should be in, by the file's name relative to `path`; nothing is checked if None.

    Raises:
        CorruptCheckpoint: A header is damaged, or the files are not what the map says.
        UnsupportedCheckpoint: A tensor's dtype is not supported.
    """

    def __init__(self, path: Path, files: Sequence[Path], weight_map: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._opened = functools.lru_cache(maxsize=_FILES_OPEN)(FlatFile)
        self._places: dict[KeyPath, _Place] = {}
        self._digest = hashlib.sha256()
        self._metadata: list[Mapping[str, str]] = []
        specs: dict[KeyPath, TensorSpec] = {}
        constants: dict[KeyPath, Constant] = {}
        for file in files:
            refuse_dangling(file)
            opened = self._opened(file)
            header = read_header(opened)
            relative = file.name if file == path else file.relative_to(path).as_posix()
            self._digest.update(f"{relative}\0{opened.size}\0{header.digest}\0".encode())
            self._metadata.append(header.metadata)
            if weight_map is not None:
                _refuse_strangers(file, relative, {entry.name for entry in header.entries}, weight_map)
            tables = decode_tables(file, header)
            for entry in header.entries:
                spec = tables.specs[entry.name]
                if spec.path in specs:
                    other = self._places[spec.path].file
                    raise CorruptCheckpoint(
                        "a leaf that occurs twice", where=f"{file} :: {spec.name}", found=f"it in {other} too"
                    )
                specs[spec.path] = spec
                self._places[spec.path] = _Place(file, entry)
            constants |= {constant.path: constant for constant in tables.constants}
        self._index = Index(specs, tuple(constants.values()))

    @property
    def path(self) -> Path:
        """The directory or file."""
        return self._path

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts in the headers; of several files, those on which all agree."""
        first, *others = self._metadata or [{}]
        return {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}

    def index(self) -> Index:
        """See `Source.index`."""
        return self._index

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:  # noqa: ARG002
        """See `Source.scan`: plain bytes need no decoding."""
        return (self.read(path, region) for region in regions)

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`."""
        place = self._places[path]
        with self._naming(path):
            return self._opened(place.file).read_region(
                place.entry.offset, place.entry.shape, place.entry.dtype, region
            )

    def stored(self, path: KeyPath) -> Stored:
        """See `Source.stored`: the bytes are the values."""
        return Stored(FLAT, self._pieces(path))

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return f"sha256:{self._digest.hexdigest()}"

    def _pieces(self, path: KeyPath) -> Iterator[tuple[str, memoryview]]:
        place = self._places[path]
        with self._naming(path):
            yield from self._opened(place.file).pieces(place.entry.offset, place.entry.nbytes)

    @contextlib.contextmanager
    def _naming(self, path: KeyPath) -> Iterator[None]:
        """Let an error name the leaf as well as the file."""
        try:
            yield
        except (CorruptCheckpoint, OSError) as error:
            where = f"{self._places[path].file} :: {display(path)}"
            if isinstance(error, CorruptCheckpoint):
                raise CorruptCheckpoint(
                    error.what, where=where, expected=error.expected, found=error.found, hint=error.hint
                ) from error
            raise CorruptCheckpoint("cannot be read", where=where, found=error) from error


def read_weight_map(file: Path) -> dict[str, str]:
    """Which shard each tensor is in, from an index (``model.safetensors.index.json``).

    Raises:
        CorruptCheckpoint: It is no such index, or names a file that is missing or outside its directory.
    """
    refuse_dangling(file)
    try:
        document = strict_json(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint("an index that is not JSON", where=file, found=error) from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise CorruptCheckpoint("an index without a weight_map from tensors to files", where=file)
    for key, name in weight_map.items():
        parts = PurePosixPath(name).parts
        if not parts or "\0" in name or ".." in parts or PurePosixPath(name).is_absolute():
            raise CorruptCheckpoint(
                "an index that names a file outside its directory", where=f"{file} :: {key}", found=repr(name)
            )
    missing = sorted(name for name in set(weight_map.values()) if not (file.parent / name).is_file())
    if missing:
        refuse_dangling(file.parent / missing[0])
        raise CorruptCheckpoint(
            "shards are missing",
            where=file,
            expected=f"{len(set(weight_map.values()))} files",
            found=f"none called {first_names(missing, 3)}",
            hint="copy or download the checkpoint again",
        )
    return weight_map


def _refuse_strangers(file: Path, name: str, found: set[str], weight_map: Mapping[str, str]) -> None:
    """Refuse a shard that does not hold what the index says: a library would take what it finds, or make up what it misses."""
    listed = {key for key, shard in weight_map.items() if PurePosixPath(shard).as_posix() == name}
    if found != listed:
        absent, strange = sorted(listed - found), sorted(found - listed)
        raise CorruptCheckpoint(
            "a shard that does not hold what the index says",
            where=file,
            expected=f"{first_names(absent, 3)} in it" if absent else "only what is listed",
            found=f"{first_names(strange, 3)}, not listed for it" if strange else "no such tensors",
            hint="an index or a shard is left from another save: copy or download the checkpoint again",
        )
