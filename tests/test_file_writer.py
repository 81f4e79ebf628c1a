from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.formats.file_writer import ALIGNMENT, FileWriter

KIB = 2**10
MIB = 2**20
DIRECT: int = getattr(os, "O_DIRECT", 0)
PWRITE, OPEN = os.pwrite, os.open


def content(size: int, seed: int = 0) -> bytes:
    """Without zeros, so that bytes that were never stored show."""
    return np.random.default_rng(seed).integers(1, 256, size, np.uint8).tobytes()


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


def stored(path: Path) -> bytes:
    """What the page cache says is there, and the disk too."""
    cached = path.read_bytes()
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    assert path.read_bytes() == cached
    return cached


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    def held() -> tuple[set[str], set[threading.Thread]]:
        folder = "/proc/self/fd"
        links = set()
        for name in os.listdir(folder) if Path(folder).exists() else []:  # noqa: PTH208
            with contextlib.suppress(FileNotFoundError):
                links.add(f"{name} {Path(folder, name).readlink()}")
        return links, set(threading.enumerate())

    before = held()
    yield
    assert held() == before


@pytest.fixture
def takes_direct_writes(tmp_path: Path) -> None:
    """Skips where the file system of the tests refuses them."""
    try:
        assert DIRECT
        descriptor = os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | DIRECT)
        os.pwrite(descriptor, mmap.mmap(-1, ALIGNMENT), 0)
        os.close(descriptor)
    except (AssertionError, OSError):
        pytest.skip("no direct writes here")


@pytest.fixture(autouse=True)
def _no_hang():
    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def as_usual(patch: pytest.MonkeyPatch) -> None: ...


def missing(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "O_DIRECT", raising=False)


def refused_at_open(patch: pytest.MonkeyPatch) -> None:
    def refusing(path: str | Path, flags: int, *mode: int) -> int:
        if flags & DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return OPEN(path, flags, *mode)

    patch.setattr(os, "open", refusing)


def refused_at_write(patch: pytest.MonkeyPatch, after: int = 0) -> None:
    accepted = iter(range(after))

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor) and next(accepted, None) is None:
            raise OSError(errno.EINVAL, "Invalid argument")
        return PWRITE(descriptor, data, offset)

    patch.setattr(os, "pwrite", refusing)


def refused_later(patch: pytest.MonkeyPatch) -> None:
    refused_at_write(patch, after=2)


def cut_short(patch: pytest.MonkeyPatch) -> None:
    def short(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            return PWRITE(descriptor, data[:ALIGNMENT], offset)
        return PWRITE(descriptor, data[:1000], offset)

    patch.setattr(os, "pwrite", short)


def cut_short_within_a_block(patch: pytest.MonkeyPatch) -> None:
    def short(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            plain = OPEN(f"/proc/self/fd/{descriptor}", os.O_WRONLY)
            try:
                return PWRITE(plain, data[: len(data) - 512], offset)
            finally:
                os.close(plain)
        return PWRITE(descriptor, data, offset)

    patch.setattr(os, "pwrite", short)


SYSTEMS: list[Callable[[pytest.MonkeyPatch], None]] = [
    as_usual,
    missing,
    refused_at_open,
    refused_at_write,
    refused_later,
    cut_short,
    cut_short_within_a_block,
]

sizes = st.one_of(
    st.integers(0, 3),
    st.integers(0, 10 * ALIGNMENT),
    st.builds(lambda blocks, more: max(0, blocks * ALIGNMENT + more), st.integers(0, 9), st.integers(-2, 2)),
)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int | None, bytes]]:
    """Appends (at None) in their order, among writes beyond them in any order."""
    appended = draw(st.lists(sizes, max_size=4))
    end = sum(appended)
    written = []
    for gap, size in draw(st.lists(st.tuples(st.one_of(st.just(0), sizes), sizes), max_size=6)):
        written.append((end + gap, size))
        end += gap + size
    steps = draw(st.permutations([*written, *((None, size) for size in appended)]))
    in_order = iter(appended)
    return [
        (offset, content(size if offset is not None else next(in_order), number))
        for number, (offset, size) in enumerate(steps)
    ]


@pytest.mark.parametrize("system", SYSTEMS)
@given(
    history=histories(),
    blocks=st.sampled_from([1, 2, 4, 16]),
    stagings=st.integers(1, 3),
    least=st.sampled_from([0, ALIGNMENT, 3 * ALIGNMENT]),
)
def test_the_file_holds_what_was_given(tmp_path_factory, system, history, blocks, stagings, least):
    path = tmp_path_factory.mktemp("written") / "f"
    expected = bytearray()
    appended = 0
    with pytest.MonkeyPatch.context() as patch, nothing_left():
        system(patch)
        with FileWriter(path, staging_bytes=blocks * ALIGNMENT, stagings=stagings, least_direct_bytes=least) as writer:
            for offset, data in history:
                reused = bytearray(data)
                if offset is None:
                    writer.append(memoryview(reused))
                    offset, appended = appended, appended + len(data)
                else:
                    writer.write(offset, memoryview(reused))
                reused[:] = bytes(len(data))
                if data:
                    expected.extend(bytes(max(0, offset + len(data) - len(expected))))
                    expected[offset : offset + len(data)] = data
    assert (stored(path) if system in (as_usual, refused_later) else path.read_bytes()) == expected
    assert writer.bytes_direct + writer.bytes_ordinary == sum(len(data) for _, data in history)
    if system in (missing, refused_at_open, refused_at_write):
        assert writer.bytes_direct == 0


def test_values_of_any_width_are_taken(tmp_path: Path):
    values = np.arange(5, dtype=np.float32).reshape(5, 1)
    with FileWriter(tmp_path / "f") as writer:
        writer.append(values.data)
        writer.append(b"x")
    assert stored(tmp_path / "f") == values.tobytes() + b"x"


def test_what_is_long_enough_goes_past_the_cache(tmp_path: Path, takes_direct_writes):
    data = content(20 * MIB + 5)
    with FileWriter(tmp_path / "appended") as writer:
        for start in range(0, len(data), 3 * MIB + 1):
            writer.append(data[start : start + 3 * MIB + 1])
    assert (writer.bytes_direct, writer.bytes_ordinary) == (20 * MIB, 5)
    assert stored(tmp_path / "appended") == data
    with FileWriter(tmp_path / "shifted") as writer:
        writer.write(100, data[: 2 * MIB])
        writer.write(0, data[:100])
    assert (writer.bytes_direct, writer.bytes_ordinary) == (2 * MIB - ALIGNMENT, ALIGNMENT + 100)
    assert stored(tmp_path / "shifted") == data[:100] + data[: 2 * MIB]


def test_what_is_short_goes_through_it(tmp_path: Path):
    data = content(MIB - 1)
    with FileWriter(tmp_path / "f") as writer:
        writer.append(data)
        writer.write(5 * MIB, data)
    assert (writer.bytes_direct, writer.bytes_ordinary) == (0, 2 * len(data))
    assert stored(tmp_path / "f") == data + bytes(4 * MIB + 1) + data


def test_only_a_new_file_is_written(tmp_path: Path):
    (tmp_path / "there").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with nothing_left():
        for name in ("there", "link"):
            with pytest.raises(FileExistsError):
                FileWriter(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            FileWriter(tmp_path / "folder" / "f")
    assert (tmp_path / "there").read_bytes() == b"kept"
    assert not (tmp_path / "elsewhere").exists()


def test_its_mode_is_that_of_any_new_file(tmp_path: Path):
    for mask in (0o027, 0o222):
        before = os.umask(mask)
        try:
            with FileWriter(tmp_path / f"{mask}", least_direct_bytes=0) as writer:
                writer.append(bytes(ALIGNMENT))
        finally:
            os.umask(before)
        assert (tmp_path / f"{mask}").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_refusal_is_asked_for_once(tmp_path: Path, monkeypatch, takes_direct_writes):
    asked = []

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            asked.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return PWRITE(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    with FileWriter(tmp_path / "f", staging_bytes=ALIGNMENT, least_direct_bytes=0) as writer:
        writer.append(bytes(5 * ALIGNMENT))
    assert asked == [0]


def test_a_file_that_takes_its_place_is_left_alone(tmp_path: Path, monkeypatch):
    def replacing(path: str | Path, flags: int, *mode: int) -> int:
        descriptor = OPEN(path, flags, *mode)
        if flags & os.O_EXCL:
            (tmp_path / "f").rename(tmp_path / "g")
            (tmp_path / "f").write_bytes(b"another")
        return descriptor

    monkeypatch.setattr(os, "open", replacing)
    with FileWriter(tmp_path / "f", staging_bytes=ALIGNMENT, least_direct_bytes=0) as writer:
        writer.append(content(3 * ALIGNMENT))
    assert stored(tmp_path / "g") == content(3 * ALIGNMENT)
    assert (tmp_path / "f").read_bytes() == b"another"


def full_after(patch: pytest.MonkeyPatch, writes: int) -> list[int]:
    """The disk is full from then on; returns the offsets that were asked for, as they come."""
    asked: list[int] = []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        asked.append(offset)
        if len(asked) > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return PWRITE(descriptor, data, offset)

    patch.setattr(os, "pwrite", full)
    return asked


@pytest.mark.parametrize("least", [0, MIB])
@pytest.mark.parametrize("stagings", [1, 3])
def test_a_full_disk_is_told_once_while_writing(tmp_path: Path, monkeypatch, stagings, least):
    asked = full_after(monkeypatch, 2)
    with nothing_left():
        writer = FileWriter(tmp_path / "f", staging_bytes=ALIGNMENT, stagings=stagings, least_direct_bytes=least)
        with pytest.raises(OSError, match="No space") as caught:
            for _ in range(100):
                writer.append(bytes(ALIGNMENT))
        assert caught.value.errno == errno.ENOSPC
    assert len(asked) == 3, "it goes on after a failure"
    for late in (lambda: writer.append(b"x"), lambda: writer.write(0, b"x")):
        with pytest.raises(ValueError, match="closed"):
            late()
    writer.close()
    writer.abandon()


def test_a_full_disk_is_told_once_by_close(tmp_path: Path, monkeypatch):
    full_after(monkeypatch, 0)
    with nothing_left():
        writer = FileWriter(tmp_path / "f")
        writer.append(b"x")
        with pytest.raises(OSError, match="No space"):
            writer.close()
    writer.close()
    with pytest.raises(OSError, match="No space"), FileWriter(tmp_path / "g") as writer:
        writer.append(b"x")


def test_abandoning_hides_a_failure(tmp_path: Path, monkeypatch):
    full_after(monkeypatch, 0)
    with nothing_left():
        writer = FileWriter(tmp_path / "f", staging_bytes=ALIGNMENT)
        writer.append(bytes(ALIGNMENT))
        writer.abandon()
        writer.close()


@pytest.mark.parametrize("least", [0, MIB])
def test_the_systems_own_limit(tmp_path: Path, least):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with nothing_left():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KIB, hard))
        try:
            with (
                pytest.raises(OSError, match="too large") as caught,
                FileWriter(tmp_path / "f", staging_bytes=48 * KIB, least_direct_bytes=least) as writer,
            ):
                writer.append(content(200 * KIB))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "f").read_bytes() == content(200 * KIB)[: 64 * KIB]


def test_a_failure_to_close_is_told(tmp_path: Path, monkeypatch):
    close = os.close

    def failing(descriptor: int) -> None:
        close(descriptor)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with nothing_left(), monkeypatch.context() as patch:
        patch.setattr(os, "close", failing)
        writer = FileWriter(tmp_path / "f")
        writer.append(b"x")
        with pytest.raises(OSError, match="quota"):
            writer.close()


def test_an_error_of_the_caller_abandons(tmp_path: Path):
    with nothing_left(), pytest.raises(KeyError), FileWriter(tmp_path / "f") as writer:
        writer.append(b"x")
        raise KeyError
    assert writer.bytes_direct + writer.bytes_ordinary == 0
    assert (tmp_path / "f").read_bytes() == b""


class Slow:
    """Writes that hold until they are let go."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()
        self.done = 0
        patch.setattr(os, "pwrite", self)

    def __call__(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.begun.set()
        self.let_go.wait()
        self.done += 1
        return PWRITE(descriptor, data, offset)

    def interrupt(self) -> None:
        """Interrupt the main thread, which waits for the write, then let that go on."""

        def interrupted(*_: object) -> None:
            threading.Timer(0.1, self.let_go.set).start()
            raise KeyboardInterrupt

        def send() -> None:
            self.begun.wait()
            signal.setitimer(signal.ITIMER_REAL, 0.05)

        signal.signal(signal.SIGALRM, interrupted)
        threading.Thread(target=send).start()


@pytest.mark.parametrize("pieces", [2, 100])
def test_an_interrupt_passes_once_nothing_runs(tmp_path: Path, monkeypatch, pieces):
    slow = Slow(monkeypatch)
    with nothing_left():
        slow.interrupt()
        # Two pieces find room: close is what waits. A hundred do not: append waits.
        with (
            pytest.raises(KeyboardInterrupt),
            FileWriter(tmp_path / "f", staging_bytes=ALIGNMENT, stagings=2) as writer,
        ):
            for _ in range(pieces):
                writer.append(bytes(ALIGNMENT))
        assert slow.done == 1, "it was not waited for what runs, or what was waiting was stored nonetheless"
        writer.close()
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()


def test_an_interrupt_at_the_start_of_close_leaves_nothing(tmp_path: Path, monkeypatch):
    submit = ThreadPoolExecutor.submit
    interrupts = iter([KeyboardInterrupt])

    def interrupted(*arguments):
        for interrupt in interrupts:
            raise interrupt
        return submit(*arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with nothing_left(), pytest.raises(KeyboardInterrupt), FileWriter(tmp_path / "f") as writer:
        writer.append(b"x")


def test_a_full_buffer_does_not_wait_for_more(tmp_path: Path, monkeypatch):
    slow = Slow(monkeypatch)
    slow.let_go.set()
    with FileWriter(tmp_path / "f", staging_bytes=ALIGNMENT) as writer:
        writer.append(bytes(ALIGNMENT))
        assert slow.begun.wait(10)


def test_memory_is_bounded(tmp_path: Path, monkeypatch):
    slow = Slow(monkeypatch)
    given = 0
    with FileWriter(tmp_path / "f", staging_bytes=ALIGNMENT, stagings=3) as writer:

        def produce() -> None:
            nonlocal given
            for _ in range(10):
                writer.append(bytes(ALIGNMENT))
                given += 1

        producer = threading.Thread(target=produce)
        producer.start()
        slow.begun.wait()
        producer.join(0.2)
        assert given == 3
        slow.let_go.set()
        producer.join()
    assert writer.bytes_direct + writer.bytes_ordinary == 10 * ALIGNMENT


def test_a_staging_size_that_cannot_be_aligned(tmp_path: Path):
    with nothing_left(), pytest.raises(ValueError, match="multiple"):
        FileWriter(tmp_path / "f", staging_bytes=ALIGNMENT + 1)
    assert not (tmp_path / "f").exists()
