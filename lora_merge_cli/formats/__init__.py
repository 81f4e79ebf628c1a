"""Checkpoint formats, in detection order, and the way in: `open_checkpoint`."""

from __future__ import annotations

from pathlib import Path

from lora_merge_cli.errors import InputNotFound, NotPermitted, UnknownFormat
from lora_merge_cli.formats.interface import Checkpoint, Format
from lora_merge_cli.formats.orbax_dir import OrbaxFormat

FORMATS: tuple[Format, ...] = (OrbaxFormat(),)


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
    try:
        if not path.exists():
            raise InputNotFound("no such file or directory", where=path)
        for fmt in FORMATS:
            checkpoint = fmt.open(path, step)
            if checkpoint is not None:
                return checkpoint
    except PermissionError as error:
        raise NotPermitted("permission denied", where=error.filename or path) from error
    except (OSError, RuntimeError) as error:
        raise InputNotFound("the path cannot be followed", where=path, found=error) from error
    raise UnknownFormat(
        "not a checkpoint",
        where=path,
        expected="an Orbax run, step or params directory (with _METADATA)",
        found=_describe(path),
    )


def format_named(name: str) -> Format:
    """The registered format of that name."""
    return next(fmt for fmt in FORMATS if fmt.name == name)


def _describe(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(entry.name for entry in path.iterdir())
    return "an empty directory" if not names else f"a directory with {', '.join(names[:6])}"
