"""Write beside the target, rename when complete: on any failure nothing appears at the target."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_merge_cli.errors import (
    DiskFull,
    LoraMergeError,
    NotPermitted,
    OutputExists,
    ResourceError,
    UnsafeOutput,
)

_MARK = ".lora-merge-"
_LOCK = ".lock"
_RESERVE_BYTES = 16 * 2**20


def check_target(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a target that must not be written.

    Raises:
        UnsafeOutput: It is an input, lies inside one, or holds one or the working directory.
        OutputExists: Something is there and `overwrite` is false.
    """
    resolved = target.resolve()
    for path in inputs:
        source = path.resolve()
        if resolved == source or resolved.is_relative_to(source):
            raise UnsafeOutput("the output would lie inside an input", where=target, found=f"input {source}")
        if source.is_relative_to(resolved):
            raise UnsafeOutput("the output would replace an input", where=target, found=source)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputExists("the output exists", where=target, hint="pass --overwrite, or choose another -o")
    for kept in (Path.cwd(), Path.home()):
        if kept.resolve().is_relative_to(resolved):
            raise UnsafeOutput("--overwrite would remove more than an output", where=target)


def check_space(target: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        DiskFull: Less than `needed` bytes and a small reserve are free.
    """
    existing = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise _refusal(existing, error) from error
    if free < needed + _RESERVE_BYTES:
        raise DiskFull(
            "not enough free disk",
            where=existing,
            expected=f"{needed + _RESERVE_BYTES} bytes",
            found=f"{free} bytes",
            hint="free some space, or write elsewhere",
        )


@contextlib.contextmanager
def staged(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty directory beside `target` that becomes it when the block ends well, and vanishes otherwise.

    Leftovers of runs that died are removed: a run holds a lock on its staging directory as long as it lives.

    Raises:
        OutputExists: Something appeared at the target meanwhile.
        NotPermitted, ResourceError: The file system denies it.
    """
    target = target.absolute()
    created = _make_parents(target.parent)
    stage: Path | None = None
    try:
        with _filesystem(target.parent):
            _remove_leftovers(target)
            stage = Path(tempfile.mkdtemp(prefix=f".{target.name}{_MARK}", dir=target.parent))
            lock = Path(f"{stage}{_LOCK}").open("w")  # noqa: SIM115  (held until the directory is gone)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            inner = stage / "out"
            inner.mkdir()
            yield inner
            with _filesystem(target):
                _publish(inner, target, stage, overwrite=overwrite)
        finally:
            _remove(stage)
            Path(lock.name).unlink(missing_ok=True)
            lock.close()
    except BaseException:
        for folder in reversed(created):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` and what it needs; return what was missing, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    created = []
    with _filesystem(folder):
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            created.append(path)
    return created


def _publish(inner: Path, target: Path, stage: Path, *, overwrite: bool) -> None:
    inner.chmod(0o777 & ~_umask())
    if not os.path.lexists(target):
        inner.rename(target)
        return
    if not overwrite:
        raise OutputExists("something appeared at the output meanwhile", where=target)
    old = stage / "old"
    target.rename(old)
    try:
        inner.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _remove_leftovers(target: Path) -> None:
    for lock_file in target.parent.glob(f".{_escaped(target.name)}{_MARK}*{_LOCK}"):
        stage = Path(str(lock_file).removesuffix(_LOCK))
        with lock_file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if (stage / "old").exists() and not os.path.lexists(target):
                (stage / "old").rename(target)
            _remove(stage)
            lock_file.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _filesystem(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(where, error) from error


def _refusal(where: Path, error: OSError) -> LoraMergeError:
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError) or "read-only" in reason.lower():
        return NotPermitted("cannot be written", where=where, found=reason)
    if "no space" in reason.lower() or "quota" in reason.lower():
        return DiskFull("the disk is full", where=where, found=reason)
    return ResourceError("cannot be written", where=where, found=reason)
