"""Checkpoint formats, in detection order, and the way in: `open_checkpoint`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lora_merge_cli.errors import InputNotFound, NotPermitted, UnknownFormat
from lora_merge_cli.formats.interface import Checkpoint, Format
from lora_merge_cli.formats.orbax_dir import OrbaxFormat
from lora_merge_cli.formats.safetensors_dir import SafetensorsFormat
from lora_merge_cli.formats.torch_pth import TorchFormat

FORMATS: tuple[Format, ...] = (OrbaxFormat(), SafetensorsFormat(), TorchFormat())


def open_checkpoint(path: Path | str, step: int | None = None) -> Checkpoint:
    """Open a checkpoint of any known format, read-only.

    Args:
        path: A run, a step, an item (``params/``) or a bare checkpoint directory.
        step: Which step of a run; the newest one if None.

    Raises:
        InputNotFound: Nothing is there, or not that step.
        UnknownFormat: No format knows it.
        CorruptCheckpoint: It is of a known format and damaged.
        NotPermitted: The operating system denies access.
    """
    path = Path(path)
    with _following(path):
        for fmt in FORMATS:
            checkpoint = fmt.open(path, step)
            if checkpoint is not None:
                return checkpoint
        adapter = next(filter(None, (fmt.open_adapter(path) for fmt in FORMATS)), None)
    raise UnknownFormat(
        "not a checkpoint" if adapter is None else "an adapter, where a checkpoint is wanted",
        where=path,
        expected="an Orbax run, step or params directory, a safetensors file or directory, or a .pth file",
        found=_describe(path),
        hint=None if adapter is None else "give the model that it was trained on, and this after --adapter",
    )


def open_adapter(path: Path | str) -> Checkpoint:
    """Open an adapter that lies beside its base, read-only.

    Args:
        path: Its directory, one that holds it as the only one, or its file.

    Raises:
        InputNotFound: Nothing is there.
        UnknownFormat: It is no adapter of any format.
        CorruptCheckpoint: It is one, and damaged.
        UsageError: The directory holds several.
        NotPermitted: The operating system denies access.
    """
    path = Path(path)
    with _following(path):
        for fmt in FORMATS:
            adapter = fmt.open_adapter(path)
            if adapter is not None:
                return adapter
    raise UnknownFormat(
        "not an adapter",
        where=path,
        expected="adapter_model.safetensors or adapter_model.bin with its adapter_config.json, or a .pth file",
        found=_describe(path),
    )


@contextlib.contextmanager
def _following(path: Path) -> Iterator[None]:
    try:
        if not path.exists():
            raise InputNotFound("no such file or directory", where=path)
        yield
    except PermissionError as error:
        raise NotPermitted("permission denied", where=error.filename or path) from error
    except (OSError, RuntimeError) as error:
        raise InputNotFound("the path cannot be followed", where=path, found=error) from error


def format_named(name: str) -> Format:
    """The registered format of that name."""
    return next(fmt for fmt in FORMATS if fmt.name == name)


def _describe(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(entry.name for entry in path.iterdir())
    return "an empty directory" if not names else f"a directory with {', '.join(names[:6])}"
