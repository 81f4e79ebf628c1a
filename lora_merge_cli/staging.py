"""Write beside the target, rename when complete: on any failure nothing appears at the target."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_merge_cli.errors import DiskFull, NotPermitted, OutputExists, UnsafeOutput, storage_refusal

_MARK = ".lora-merge-"
_LOCK = ".lock"
_OLD = "old"
_RESERVE_BYTES = 16 * 2**20


def anchored(target: Path) -> Path:
    """The target's absolute path without ``..`` and links, but for a link at its very end.

    Raises:
        NotPermitted: The path cannot be followed.
    """
    try:
        if target.name in ("", ".."):
            return target.resolve()
        return target.parent.resolve() / target.name
    except (OSError, RuntimeError) as error:
        raise NotPermitted("the path cannot be followed", where=target, found=error) from error


def check_target(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a target that must not be written.

    Raises:
        UnsafeOutput: It is an input, lies inside one, or holds one or the working directory.
        OutputExists: Something is there and `overwrite` is false.
    """
    resolved = anchored(target)
    for path in inputs:
        source = path.resolve()
        if any(place.is_relative_to(source) for place in (resolved, Path(os.path.realpath(resolved)))):
            raise UnsafeOutput("the output would lie inside an input", where=target, found=f"input {source}")
        if source.is_relative_to(resolved):
            raise UnsafeOutput("the output would replace an input", where=target, found=source)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputExists("the output exists", where=target, hint="pass --overwrite, or choose another -o")
    # os.path, since pathlib raises where there is no home.
    for kept in (Path.cwd(), Path(os.path.expanduser("~"))):  # noqa: PTH111
        if kept.resolve().is_relative_to(resolved):
            raise UnsafeOutput("--overwrite would remove more than an output", where=target)


def check_space(target: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        DiskFull: Less than `needed` bytes and a small reserve are free.
    """
    with filesystem(target):
        existing = next(p for p in (target, *target.parents) if p.exists())
        free = shutil.disk_usage(existing).free
    if free < needed + _RESERVE_BYTES:
        raise DiskFull(
            "not enough free disk",
            where=existing,
            expected=f"{needed + _RESERVE_BYTES} bytes",
            found=f"{free} bytes",
            hint="free some space, or write elsewhere",
        )


@contextlib.contextmanager
def staged(target: Path, *, overwrite: bool, files: Sequence[str] | None = None) -> Iterator[Path]:
    """An empty directory beside `target` that becomes it when the block ends well, and vanishes otherwise.

    Args:
        target: What appears.
        overwrite: Whether it may replace something.
        files: Where the target is a file: its name, and the names of others that appear beside it; all are expected in the
            directory. None where the target is the directory itself.

    Leftovers of runs that died are removed: a run holds a lock on its staging directory as long as it lives.

    Raises:
        OutputExists: Something appeared at the target meanwhile.
        NotPermitted, ResourceError: The file system denies it.
    """
    # Named before anything exists, so that an interrupt at any moment knows what to remove.
    stage = target.with_name(f".{target.name}{_MARK}{secrets.token_hex(4)}")
    lock_file = _lock_of(stage)
    missing = [folder for folder in target.parents if not folder.exists()]
    complete = False
    try:
        with filesystem(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            lock = lock_file.open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            inner = stage / "out"
            inner.mkdir(parents=True)
        with lock:
            yield inner
            with filesystem(target):
                if files is None:
                    _publish(inner, target, stage, overwrite=overwrite)
                else:
                    # The main file comes last: once it is there, so is what stands beside it.
                    _publish_files(
                        [(inner / name, target.with_name(name)) for name in reversed(files)], stage, overwrite
                    )
            complete = True
    finally:
        _clear(stage, target)
        if not complete:
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _lock_of(stage: Path) -> Path:
    return Path(f"{stage}{_LOCK}")


def _publish(inner: Path, target: Path, stage: Path, *, overwrite: bool) -> None:
    if os.path.lexists(target):
        if not overwrite:
            raise OutputExists("something appeared at the output meanwhile", where=target)
        target.rename(_kept(stage, target))
    inner.rename(target)


def _publish_files(pairs: Sequence[tuple[Path, Path]], stage: Path, overwrite: bool) -> None:
    """All of them, or none."""
    done: list[Path] = []
    try:
        for inner, target in pairs:
            _publish(inner, target, stage, overwrite=overwrite)
            done.append(target)
    except BaseException:
        for target in done:
            target.unlink(missing_ok=True)
        raise


def _kept(stage: Path, target: Path) -> Path:
    """Where an old output waits until the new one is in its place."""
    return stage / f"{_OLD}-{target.name}"


def _clear(stage: Path, target: Path) -> None:
    """Remove a staging directory; an old output that nothing replaced goes back first."""
    for old in stage.glob(f"{_OLD}-*"):
        place = target.with_name(old.name.removeprefix(f"{_OLD}-"))
        if not os.path.lexists(place):
            old.rename(place)
        elif old.is_symlink() or old.is_file():
            old.unlink()
    shutil.rmtree(stage, ignore_errors=True)
    with contextlib.suppress(OSError):
        _lock_of(stage).unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Clear the staging directories of dead runs: their locks went with them."""
    for lock_file in target.parent.glob(f".{glob.escape(target.name)}{_MARK}*{_LOCK}"):
        with lock_file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            _clear(Path(str(lock_file).removesuffix(_LOCK)), target)


@contextlib.contextmanager
def filesystem(where: Path) -> Iterator[None]:
    """Turn an error of the operating system in the block into a refusal that names `where`."""
    try:
        yield
    except OSError as error:
        raise storage_refusal(where, error) from error
