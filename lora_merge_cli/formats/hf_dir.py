"""Directories as Hugging Face's libraries lay them out: weights, ``config.json``, tokenizer, and perhaps an adapter.

Files may be links, as in the hub's cache, where every file is one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_merge_cli.errors import CorruptCheckpoint, UsageError
from lora_merge_cli.formats.interface import PROVENANCE
from lora_merge_cli.records import first_names

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ASSETS = "assets"

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_FILE = re.compile(r"adapter_config\.json|adapter_model[.-].*|adapters\.safetensors|pytorch_lora_weights\..*")
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|ot|npz|tflite|distcp)"
    r"|.*\.index(\.[^.]+)?\.json"
    r"|manifest\.ocdbt|_METADATA",
    re.IGNORECASE,
)
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args|random_states)[^/]*\.(pt|pth|bin|pkl)")
_STEP_FOLDER = re.compile(r"checkpoint-(\d+)")


def read_config(directory: Path, name: str) -> Mapping[str, Any] | None:
    """The JSON object in ``directory/name``, or None if there is no such file.

    Raises:
        CorruptCheckpoint: It is not JSON, no object, or a link that leads nowhere.
    """
    file = directory / name
    if not file.exists():
        refuse_dangling(file)
        return None
    try:
        config = json.loads(file.read_bytes())
    except (IsADirectoryError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint("a configuration that is not JSON", where=file, found=error) from error
    if not isinstance(config, dict):
        raise CorruptCheckpoint("a configuration that is no JSON object", where=file, found=type(config).__name__)
    return config


def companions(directory: Path, arrays: Collection[str]) -> tuple[str, ...]:
    """The files that belong to a checkpoint and hold no arrays: configurations, tokenizer, processor, README and the like.

    Args:
        directory: The checkpoint's directory.
        arrays: The names of the files in use that hold its arrays, their index included.

    Returns:
        Their names, relative and with ``/``, in order.

    Raises:
        CorruptCheckpoint: One is a link that leads nowhere.
    """
    found = sorted(name for name, reason in _listing(directory, arrays) if reason is None)
    for name in found:
        refuse_dangling(directory / name)
    return tuple(found)


def left_out(directory: Path, arrays: Collection[str]) -> dict[str, str]:
    """The other names in a checkpoint's directory, those of folders with a ``/`` behind them, and why each is no companion.

    Neither the arrays in use nor the provenance file of an earlier merge are among them: the output has its own.
    """
    return dict(sorted((name, reason) for name, reason in _listing(directory, arrays) if reason))


def find_adapter(path: Path) -> tuple[Path, tuple[str, ...]] | None:
    """The directory that holds an adapter, and notes on what was chosen; None if there is none.

    It is `path` itself, else its only subfolder with an adapter, else the newest ``checkpoint-N`` if there are only such ones.

    Raises:
        UsageError: Several subfolders could be meant.
    """
    if not path.is_dir():
        return None
    if _holds_adapter(path):
        return path, ()
    found = sorted(entry for entry in path.iterdir() if _is_folder(entry) and _holds_adapter(entry))
    if not found:
        return None
    if len(found) == 1:
        return found[0], (f"the only adapter below {path}: {found[0].name}",)
    steps = {number: entry for entry in found if (number := step_number(entry)) is not None}
    if len(steps) == len(found):
        newest = steps[max(steps)]
        return newest, (f"{newest.name} of {len(steps)} (the newest): {newest}",)
    raise UsageError(
        "several adapters could be meant",
        where=path,
        found=first_names(entry.name for entry in found),
        hint=f"name one, for example {found[0]}",
    )


def step_number(folder: Path) -> int | None:
    """The N of a trainer's folder that is called ``checkpoint-N``, else None."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_folders(path: Path) -> dict[int, Path]:
    """A trainer's folders called ``checkpoint-N``, by N in ascending order, whatever they hold."""
    found = {number: entry for entry in path.iterdir() if (number := step_number(entry)) is not None and entry.is_dir()}
    return dict(sorted(found.items()))


def is_adapter_file(name: str) -> bool:
    """Whether a file of that name is an adapter's, and not a model's."""
    return _ADAPTER_FILE.fullmatch(name) is not None


def refuse_dangling(file: Path) -> None:
    """Refuse a link that leads nowhere.

    Raises:
        CorruptCheckpoint: It is one.
    """
    if file.is_symlink() and not file.exists():
        raise CorruptCheckpoint(
            "a link that leads nowhere",
            where=file,
            found=file.readlink(),
            hint="copy or download the checkpoint again",
        )


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, *_ADAPTER_WEIGHTS))


def _is_folder(entry: Path) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def _listing(directory: Path, arrays: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Every name that is not bookkeeping: of a file, or of a folder that is left out whole; and why it is left out, if so."""
    used = frozenset(arrays)
    folders: list[tuple[Path, tuple[str, ...]]] = [(directory, (os.path.realpath(directory),))]
    while folders:
        folder, around = folders.pop()
        for entry in sorted(folder.iterdir()):
            name = entry.relative_to(directory).as_posix()
            if name in used or name == PROVENANCE:
                continue
            if not entry.is_dir():
                yield name, _reason(entry)
                continue
            real = os.path.realpath(entry)
            reason = _folder_reason(entry, name, used)
            if real in around:
                reason = "a link to a folder around it"
            if reason:
                yield f"{name}/", reason
            else:
                folders.append((entry, (*around, real)))


def _reason(file: Path) -> str | None:
    if file.name.startswith("."):
        return "hidden"
    if is_adapter_file(file.name):
        return "an adapter's file"
    if _TRAINING.fullmatch(file.name):
        return "the trainer's state does not fit the merged parameters"
    if _WEIGHTS.fullmatch(file.name):
        return "weights that are not the ones in use"
    if file.exists() and not file.is_file():
        return "no file with contents"
    return None


def _folder_reason(folder: Path, name: str, used: frozenset[str]) -> str | None:
    if folder.name.startswith("."):
        return "hidden"
    if any(array.startswith(f"{name}/") for array in used):
        return None
    if step_number(folder) is not None:
        return "another checkpoint of the run"
    weights = sorted(entry.name for entry in folder.iterdir() if _WEIGHTS.fullmatch(entry.name))
    return f"a folder with weights of its own: {first_names(weights, 2)}" if weights else None
