"""torch's own checkpoints: a file that ``torch.save`` wrote, or a directory with ``pytorch_model.bin`` or its shards.

Nothing in them is ever run, and torch is not needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge_cli.errors import CorruptCheckpoint, UsageError
from lora_merge_cli.formats.hf_dir import (
    ADAPTER_CONFIG,
    ASSETS,
    CONFIG,
    companions,
    find_adapter,
    left_out,
    read_config,
)
from lora_merge_cli.formats.interface import PROVENANCE, Checkpoint, Destination, Sink
from lora_merge_cli.records import first_names

if TYPE_CHECKING:
    from lora_merge_cli.formats.torch_source import TorchSource

_MODEL_FILE = "pytorch_model.bin"
_SHARDS = "pytorch_model.bin.index.json"
_ADAPTER_FILE = "adapter_model.bin"
_OTHER_ADAPTER_FILE = "adapter_model.safetensors"
_OUTPUT_FILE = "model.pth"


class TorchFormat:
    """Files of ``torch.save``: zip archives, and the older format without one."""

    name = "pth"
    compresses = False

    def open(self, path: Path, step: int | None) -> Checkpoint | None:
        """See `Format.open`."""
        given = path
        path = Path(os.path.abspath(path))  # noqa: PTH100  (a link keeps its own neighbours)
        checkpoint = _open_directory(path, given) if path.is_dir() else _open_file(path, given, None)
        if checkpoint is not None and step is not None:
            raise UsageError(f"--step {step} needs a run directory", where=given)
        return checkpoint

    def open_adapter(self, path: Path) -> Checkpoint | None:
        """See `Format.open_adapter`."""
        given = path
        path = Path(os.path.abspath(path))  # noqa: PTH100  (a link keeps its own neighbours)
        if path.is_file():
            return _open_file(path, given, ADAPTER_CONFIG if path.name == _ADAPTER_FILE else None)
        directory, notes = find_adapter(path) or (path, ())
        if not (directory / _ADAPTER_FILE).is_file() or (directory / _OTHER_ADAPTER_FILE).exists():
            return None
        source = _source(directory / _ADAPTER_FILE, [directory / _ADAPTER_FILE])
        return _checkpoint(given, directory, source, [_ADAPTER_FILE], ADAPTER_CONFIG, notes)

    def sink(self, destination: Destination, like: Checkpoint) -> Sink:
        """See `Format.sink`."""
        from lora_merge_cli.formats.torch_sink import TorchSink
        from lora_merge_cli.formats.torch_source import TorchSource

        name = destination.file or (_MODEL_FILE if CONFIG in like.companions else _OUTPUT_FILE)
        path = destination.directory / name
        if not isinstance(like.source, TorchSource):
            return TorchSink(path)
        like.source.index()
        return TorchSink(path, like.source.containers, like.source.order)


def _open_file(path: Path, given: Path, config: str | None) -> Checkpoint | None:
    if not path.is_file():
        return None
    from lora_merge_cli.formats.torch_archive import open_archive
    from lora_merge_cli.formats.torch_source import TorchSource

    archive = open_archive(path)
    if archive is None:
        return None
    provenance = path.with_name(f"{path.name}.{PROVENANCE}")
    return Checkpoint(
        format=TorchFormat.name,
        given=given,
        source=TorchSource(path, [path], opened=archive),
        directory=path,
        item=None,
        provenance=provenance if provenance.is_file() else None,
        config=None if config is None else read_config(path.parent, config),
    )


def _open_directory(path: Path, given: Path) -> Checkpoint | None:
    if any(path.glob("model*.safetensors*")):
        return None
    if (path / _MODEL_FILE).is_file():
        both = (path / _SHARDS).exists()
        notes = (f"{_MODEL_FILE}, and not the shards that {_SHARDS} names",) if both else ()
        return _checkpoint(given, path, _source(path, [path / _MODEL_FILE]), [_MODEL_FILE], CONFIG, notes)
    if not (path / _SHARDS).is_file():
        return _open_sole_file(path, given)
    weight_map = _weight_map(path / _SHARDS)
    names = sorted(set(weight_map.values()))
    source = _source(path, [path / name for name in names], weight_map)
    return _checkpoint(given, path, source, [*names, _SHARDS], CONFIG, ())


def _open_sole_file(path: Path, given: Path) -> Checkpoint | None:
    """A directory with ``model.pth``, or with one file of that suffix."""
    names = sorted(entry.name for entry in path.glob("*.pth") if entry.is_file())
    name = _OUTPUT_FILE if _OUTPUT_FILE in names else names[0] if len(names) == 1 else None
    if name is None or any(path.glob("*.safetensors")):
        return None
    return _checkpoint(given, path, _source(path, [path / name]), [name], CONFIG, ())


def _source(path: Path, files: Sequence[Path], weight_map: Mapping[str, str] | None = None) -> TorchSource:
    # The reader of pickles is imported once there is one: most checkpoints are of another format.
    from lora_merge_cli.formats.torch_source import TorchSource

    return TorchSource(path, files, weight_map)


def _checkpoint(
    given: Path, directory: Path, source: TorchSource, arrays: Collection[str], config: str, notes: tuple[str, ...]
) -> Checkpoint:
    provenance = directory / PROVENANCE
    # Assets of an OpenPI tree are looked at and carried over as a whole; elsewhere such a folder is one like any other.
    holds_tree = _OUTPUT_FILE in arrays and (directory / ASSETS).is_dir()
    beside = (name for name in companions(directory, arrays) if not (holds_tree and name.startswith(f"{ASSETS}/")))
    return Checkpoint(
        format=TorchFormat.name,
        given=given,
        source=source,
        directory=directory,
        item=None,
        assets=directory / ASSETS if holds_tree else None,
        provenance=provenance if provenance.is_file() else None,
        left_out=left_out(directory, arrays),
        notes=notes,
        config=read_config(directory, config),
        companions=tuple(beside),
    )


def _weight_map(file: Path) -> dict[str, str]:
    """The file of each key, by the index of the shards."""
    try:
        document: Any = json.loads(file.read_bytes())
        entries = dict(document["weight_map"])
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(
            "an index of shards that cannot be read", where=file, found=repr(error)[:100]
        ) from error
    names = entries.values()
    # A shard may be a link, as in the hub's cache, but its name never leads out of the directory.
    bad = [repr(name) for name in names if not isinstance(name, str) or Path(name).name != name or name in ("", "..")]
    if bad or not entries:
        raise CorruptCheckpoint(
            "an index of shards that names what is no file beside it", where=file, found=first_names(bad) or "nothing"
        )
    missing = sorted({name for name in names if not (file.parent / name).is_file()})
    if missing:
        raise CorruptCheckpoint(
            "shards are missing",
            where=file,
            found=f"no {first_names(missing)}",
            hint="copy or download the checkpoint again",
        )
    return entries
