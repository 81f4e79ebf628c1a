"""One stream and several writers: all of it to each, in step, whoever fails; and no thread is left, whatever interrupts."""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import itertools
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli import fan_out
from lora_merge_cli._cli.boundary import boundary
from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.fan_out import Broadcast, FanOut
from lora_merge_cli.formats.interface import LeafData, Stored
from lora_merge_cli.formats.torch_pth import TorchFormat
from lora_merge_cli.formats.torch_sink import TorchSink
from lora_merge_cli.records import TensorSpec
from lora_merge_cli.staging import staged

LONG = 20
"""Seconds, after which something that should have happened did not."""
A_MOMENT = 0.02
"""Seconds in which whoever is about to wait does: a signal just before that would be seen only when the waiting ends."""
Position = tuple[int, int]
"""A leaf and 0 for the leaf itself, or one more than the number of a piece; the place after the last is where the end is."""


class Fault(Exception):
    """What no part of the project raises."""


@pytest.fixture(autouse=True)
def deadlocks_are_failures() -> Iterator[None]:
    faulthandler.dump_traceback_later(3 * LONG, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def wait_until(condition: Callable[[], object]) -> None:
    last = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.001)


def broadcast(leaf: int, outputs: int, data: Any) -> Broadcast:
    specs = tuple(TensorSpec(("leaf", leaf, "output", output), (9,), np.dtype(np.int64)) for output in range(outputs))
    return Broadcast(specs, (leaf + 1,), data, None if leaf == 0 else ("leaf", 0))


def value(leaf: int, piece: int, output: int) -> int:
    return 100 * leaf + 10 * piece + output


def produced(
    leaves: Sequence[tuple[str, int]],
    outputs: int,
    note: Callable[[Position], object] = lambda position: None,
    refused: Collection[tuple[int, int, int]] = (),
) -> Generator[Broadcast]:
    """Leaves of so many pieces, all in the same memory: each piece overwrites the one before."""
    stored = bytearray(1)
    arrays = [np.zeros(1, np.int64) for _ in range(outputs)]

    def pieces(leaf: int, count: int) -> Iterator[tuple[str, memoryview]]:
        for piece in range(count):
            note((leaf, piece + 1))
            stored[0] = piece
            yield str(leaf), memoryview(stored)
        note((leaf, count + 1))

    def blocks(leaf: int, count: int) -> Iterator[Any]:
        for piece in range(count):
            note((leaf, piece + 1))
            for output in range(outputs):
                arrays[output][0] = value(leaf, piece, output)
            entries: list[Any] = list(arrays)
            for output in range(outputs):
                if (leaf, piece, output) in refused:
                    entries[output] = LoraMergeError(f"refused {output}")
            yield (slice(piece, piece + 1),), tuple(entries)
        note((leaf, count + 1))

    for leaf, (kind, count) in enumerate(leaves):
        note((leaf, 0))
        yield broadcast(leaf, outputs, Stored("e", pieces(leaf, count)) if kind == "stored" else blocks(leaf, count))
    note((len(leaves), 0))


def items_of(leaf: LeafData) -> Iterator[Any]:
    """Each piece's name or region, and a copy of its data."""
    if isinstance(leaf.data, Stored):
        assert leaf.data.encoding == "e"
        return ((name, bytes(piece)) for name, piece in leaf.data.values)
    return ((region, int(values[0])) for region, values in leaf.data)


def expected_items(leaf: int, kind: str, count: int, output: int) -> list[Any]:
    if kind == "stored":
        return [(str(leaf), bytes([piece])) for piece in range(count)]
    return [((slice(piece, piece + 1),), value(leaf, piece, output)) for piece in range(count)]


def everything(leaves: Iterator[LeafData]) -> list[Any]:
    return [(leaf.spec.path, leaf.chunk, leaf.same_as, list(items_of(leaf))) for leaf in leaves]


LEAVES = (("blocks", 3), ("stored", 2), ("stored", 0), ("blocks", 0), ("blocks", 1))


def expected_everything(output: int) -> list[Any]:
    return [
        (
            ("leaf", leaf, "output", output),
            (leaf + 1,),
            ("leaf", 0) if leaf else None,
            expected_items(leaf, *what, output),
        )
        for leaf, what in enumerate(LEAVES)
    ]


def slowed(output: int) -> Callable[[Iterator[LeafData]], list[Any]]:
    """A writer that looks at each piece late, the later the higher its number."""

    def late(leaf: LeafData) -> Iterator[Any]:
        data = leaf.data.values if isinstance(leaf.data, Stored) else leaf.data
        for item in data:
            time.sleep(0.002 * output)
            [copied] = items_of(
                LeafData(leaf.spec, (), Stored("e", [item]) if isinstance(leaf.data, Stored) else iter([item]))
            )
            yield copied

    return lambda leaves: [(leaf.spec.path, leaf.chunk, leaf.same_as, list(late(leaf))) for leaf in leaves]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_everything_to_each_in_order_at_any_speed(count):
    with no_thread_left():
        results = FanOut(count).run(produced(LEAVES, count), [slowed(output) for output in range(count)])
    assert results == [expected_everything(output) for output in range(count)]


def test_nothing_is_made_while_a_writer_uses_what_was_made_before():
    using: set[int] = set()
    overlaps: list[Position] = []

    def note(position: Position) -> None:
        if using:
            overlaps.append(position)

    def writer(output: int) -> Callable[[Iterator[LeafData]], None]:
        def write(leaves: Iterator[LeafData]) -> None:
            for leaf in leaves:
                for _ in items_of(leaf):
                    using.add(output)
                    time.sleep(0.001 * output)
                    using.discard(output)

        return write

    FanOut(3).run(produced(LEAVES, 3, note), [writer(output) for output in range(3)])
    assert overlaps == []


@dataclass(frozen=True)
class Script:
    """What a writer does."""

    takes: tuple[int, ...]
    """How many pieces it asks for, per leaf."""
    last: int | None
    """After which leaf it ends; None for the last of all."""
    fails: bool
    """Whether it ends there by an error."""


@dataclass(frozen=True)
class Story:
    """What a script comes to: the plain model, of one writer that nobody disturbs."""

    asked: tuple[Position, ...]
    received: tuple[tuple[Position, Any], ...]
    error: str | None


def story(script: Script, leaves: Sequence[tuple[str, int]], output: int, refused: Collection[Any]) -> Story:
    asked: list[Position] = []
    received: list[tuple[Position, Any]] = []
    for leaf, (kind, count) in enumerate(leaves):
        asked.append((leaf, 0))
        received.append(((leaf, 0), leaf))
        items = expected_items(leaf, kind, count, output)
        for piece in range(script.takes[leaf]):
            asked.append((leaf, piece + 1))
            if piece == count:
                break
            if kind == "blocks" and (leaf, piece, output) in refused:
                return Story(tuple(asked), tuple(received), f"refused {output}")
            received.append(((leaf, piece + 1), items[piece]))
        if leaf == script.last:
            return Story(tuple(asked), tuple(received), f"failed {output}" if script.fails else None)
    return Story((*asked, (len(leaves), 0)), tuple(received), None)


def acted(script: Script, output: int, received: list[Any], ends: list[str]) -> Callable[[Iterator[LeafData]], str]:
    def write(leaves: Iterator[LeafData]) -> str:
        try:
            for number, leaf in enumerate(leaves):
                received.append(((number, 0), leaf.chunk[0] - 1))
                for piece, item in enumerate(itertools.islice(items_of(leaf), script.takes[number])):
                    received.append(((number, piece + 1), item))
                if number == script.last:
                    if script.fails:
                        raise LoraMergeError(f"failed {output}")
                    break
        except Exception:
            ends[output] = "failed"
            raise
        except BaseException:
            ends[output] = "stopped"
            raise
        ends[output] = "done"
        return f"result {output}"

    return write


@st.composite
def plays(draw: st.DrawFn) -> tuple[list[tuple[str, int]], list[Script], set[tuple[int, int, int]]]:
    leaves = draw(st.lists(st.tuples(st.sampled_from(["stored", "blocks"]), st.integers(0, 3)), max_size=4))
    count = len(leaves)
    scripts = st.builds(
        Script,
        st.lists(st.integers(0, 5), min_size=count, max_size=count).map(tuple),
        st.none() | st.integers(0, 4),
        st.booleans(),
    )
    writers = draw(st.lists(scripts, min_size=1, max_size=4))
    refused = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, len(writers) - 1))
    return leaves, writers, draw(st.sets(refused, max_size=3))


@given(plays())
def test_each_writer_gets_what_it_would_get_alone_and_only_what_is_asked_for_is_made(play):
    leaves, scripts, refused = play
    count = len(scripts)
    stories = [story(script, leaves, output, refused) for output, script in enumerate(scripts)]
    fan = FanOut(count)
    made: list[tuple[Position, list[bool]]] = []
    received: list[list[Any]] = [[] for _ in scripts]
    ends = [""] * count
    leaving = produced(leaves, count, lambda position: made.append((position, list(fan.alive))), refused)
    with no_thread_left():
        results = fan.run(
            leaving, [acted(script, output, received[output], ends) for output, script in enumerate(scripts)]
        )
    assert [tuple(one) for one in received] == [one.received for one in stories]
    assert [str(result) for result in results] == [one.error or f"result {n}" for n, one in enumerate(stories)]
    asked = sorted(set().union(*(one.asked for one in stories)))
    assert made == [(position, [position <= one.asked[-1] for one in stories]) for position in asked]
    assert fan.alive == [False] * count and not fan.cancelled
    assert inspect.getgeneratorstate(leaving) == inspect.GEN_CLOSED


@given(plays(), st.integers(0), st.sampled_from([Fault, LoraMergeError, KeyboardInterrupt]))
def test_an_error_of_the_leaves_stops_whoever_still_asks_and_is_the_callers(play, moment, kind):
    leaves, scripts, refused = play
    count = len(scripts)
    stories = [story(script, leaves, output, refused) for output, script in enumerate(scripts)]
    asked = sorted(set().union(*(one.asked for one in stories)))
    at = asked[moment % len(asked)]
    error = kind("the leaves fail")
    received: list[list[Any]] = [[] for _ in scripts]
    ends = [""] * count

    def note(position: Position) -> None:
        if position == at:
            raise error

    fan = FanOut(count)
    with no_thread_left(), pytest.raises(kind) as raised:
        fan.run(
            produced(leaves, count, note, refused),
            [acted(script, output, received[output], ends) for output, script in enumerate(scripts)],
        )
    assert raised.value is error
    assert [tuple(one) for one in received] == [tuple(item for item in one.received if item[0] < at) for one in stories]
    if count > 1:
        ended = [("failed" if one.error else "done") if one.asked[-1] < at else "stopped" for one in stories]
        assert ends == ended and fan.cancelled


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_error_of_the_leaves_shows_where_it_was_raised(count):
    def leaves() -> Generator[Broadcast]:
        yield broadcast(0, count, iter(()))
        raise Fault

    with pytest.raises(Fault) as raised:
        FanOut(count).run(leaves(), [everything] * count)
    assert raised.traceback[-1].name == "leaves"


def test_a_single_writer_runs_in_the_calling_thread():
    threads: list[list[threading.Thread]] = []

    def write(leaves: Iterator[LeafData]) -> threading.Thread:
        everything(leaves)
        return threading.current_thread()

    before = threading.enumerate()
    [result] = FanOut(1).run(produced(LEAVES, 1, lambda _: threads.append(threading.enumerate())), [write])
    assert result is threading.current_thread()
    assert all(found == before for found in threads) and threads


def test_the_leaves_are_made_in_the_calling_thread_and_each_writer_has_one_of_its_own():
    makers: set[threading.Thread] = set()

    def write(leaves: Iterator[LeafData]) -> threading.Thread:
        everything(leaves)
        return threading.current_thread()

    results = FanOut(3).run(produced(LEAVES, 3, lambda _: makers.add(threading.current_thread())), [write] * 3)
    assert makers == {threading.current_thread()}
    assert len({threading.current_thread(), *results}) == 4


def test_the_threads_are_gone_to_the_last_of_what_they_own():
    owned = threading.local()
    gone: list[str] = []

    class Slow:
        def __del__(self) -> None:
            time.sleep(A_MOMENT)
            gone.append(threading.current_thread().name)

    def write(leaves: Iterator[LeafData]) -> None:
        owned.slow = Slow()
        everything(leaves)

    FanOut(2).run(produced(LEAVES, 2), [write] * 2)
    assert len(gone) == 2


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("error", [Fault, MemoryError, SystemExit, KeyboardInterrupt])
def test_what_a_writer_raises_that_is_no_refusal_stops_all_and_goes_to_the_caller(count, error):
    ends = ["nothing"] * count

    def writer(output: int) -> Callable[[Iterator[LeafData]], None]:
        def write(leaves: Iterator[LeafData]) -> None:
            try:
                for _ in leaves:
                    if output == count - 1:
                        raise error("here")
                ends[output] = "published"
            finally:
                ends[output] += ", cleaned up"

        return write

    leaves = produced(LEAVES, count)
    with no_thread_left(), pytest.raises(error, match="here") as raised:
        FanOut(count).run(leaves, [writer(output) for output in range(count)])
    assert raised.traceback[-1].name == "write"
    assert ends == ["nothing, cleaned up"] * count
    assert inspect.getgeneratorstate(leaves) == inspect.GEN_CLOSED


@pytest.mark.parametrize("count", [1, 3])
def test_a_writer_that_fails_before_it_asks_for_anything(count):
    def refuse(leaves: Iterator[LeafData]) -> list[Any]:
        raise LoraMergeError("no")

    results = FanOut(count).run(produced(LEAVES, count), [*[everything] * (count - 1), refuse])
    assert results[:-1] == [expected_everything(output) for output in range(count - 1)]
    assert isinstance(results[-1], LoraMergeError)


@pytest.mark.parametrize("count", [1, 3])
def test_a_writer_that_fails_after_all_leaves(count):
    def refuse(leaves: Iterator[LeafData]) -> list[Any]:
        everything(leaves)
        raise LoraMergeError("no")

    results = FanOut(count).run(produced(LEAVES, count), [*[everything] * (count - 1), refuse])
    assert results[:-1] == [expected_everything(output) for output in range(count - 1)]
    assert str(results[-1]) == "no"


@pytest.mark.parametrize("count", [1, 2])
def test_a_refusal_of_the_writers_own_that_follows_one_of_the_leaves_is_not_taken_for_a_result(count):
    def write(leaves: Iterator[LeafData]) -> None:
        try:
            everything(leaves)
        except LoraMergeError as error:
            raise LoraMergeError("worded anew") from error

    def note(position: Position) -> None:
        if position == (1, 1):
            raise LoraMergeError("the leaves fail")

    with pytest.raises(LoraMergeError):
        FanOut(count).run(produced(LEAVES, count, note), [write] * count)


def test_the_data_of_a_leaf_is_over_once_the_next_one_was_asked_for():
    def write(leaves: Iterator[LeafData]) -> list[Any]:
        kept = list(leaves)
        return [list(items_of(leaf)) for leaf in kept]

    results = FanOut(2).run(produced(LEAVES, 2), [write, everything])
    assert results == [[[]] * len(LEAVES), expected_everything(1)]


def test_data_that_nobody_uses_up_is_closed_in_the_calling_thread():
    closed_by: list[threading.Thread] = []

    def blocks() -> Generator[Any]:
        try:
            for number in range(9):
                yield (slice(number, number + 1),), (np.zeros(1), np.zeros(1))
        finally:
            closed_by.append(threading.current_thread())

    def leaves() -> Generator[Broadcast]:
        held = blocks()
        yield broadcast(0, 2, held)
        assert closed_by == [threading.current_thread()]

    kept: list[LeafData] = []

    def write(leaves: Iterator[LeafData]) -> None:
        for leaf in leaves:
            kept.append(leaf)
            assert not isinstance(leaf.data, Stored)
            next(leaf.data)

    FanOut(2).run(leaves(), [write, write])
    assert len(closed_by) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_a_piece_is_not_held_while_the_next_one_is_made(count):
    watched: list[weakref.ref[Any]] = []
    held: list[int] = []

    def blocks() -> Iterator[Any]:
        for _ in range(3):
            held.extend(number for number, one in enumerate(watched) if one() is not None)
            passed = [np.zeros(1)]
            watched.append(weakref.ref(passed[0]))
            yield (slice(0, 1),), (passed.pop(),) * count

    def leaves() -> Generator[Broadcast]:
        yield broadcast(0, count, blocks())

    def write(leaves: Iterator[LeafData]) -> int:
        # A loop's variable would hold it.
        return sum(len(list(map(len, leaf.data))) for leaf in leaves)

    assert FanOut(count).run(leaves(), [write] * count) == [3] * count
    assert held == []


def test_as_many_writers_as_outputs():
    with pytest.raises(ValueError, match="2 writers for 3 outputs"):
        FanOut(3).run(produced(LEAVES, 3), [everything] * 2)


class Interrupt:
    """A trace function that raises once, at the moment-th call or line of the module in this thread."""

    def __init__(self, moment: int) -> None:
        self.came = False
        self._left = moment

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        # A reader's generators run on its own thread; on this one they are finalised at most.
        if frame.f_code.co_filename != fan_out.__file__ or frame.f_code.co_name in ("take", "_leaves"):
            return None
        if event in ("call", "line"):
            self.came = self._left == 0
            self._left -= 1
            if self.came:
                raise KeyboardInterrupt
        return self


def test_an_interrupt_at_any_line():
    """Where a signal may be heard, and at some places more."""
    leaves, count = (("blocks", 2), ("stored", 1)), 2
    before = set(threading.enumerate())
    previous = sys.gettrace()
    for moment in itertools.count():
        states = ["not begun"] * count

        def writer(output: int, states: list[str] = states) -> Callable[[Iterator[LeafData]], None]:
            def write(leaves: Iterator[LeafData]) -> None:
                states[output] = "stopped"
                for leaf in leaves:
                    # One skips data.
                    list(itertools.islice(items_of(leaf), 9 * output))
                states[output] = "published"

            return write

        writers = [writer(output) for output in range(count)]
        leaving = produced(leaves, count)
        fan = FanOut(count)
        interrupt = Interrupt(moment)
        heard = False
        try:
            sys.settrace(interrupt)
            fan.run(leaving, writers)
        except KeyboardInterrupt:
            heard = True
        finally:
            sys.settrace(previous)
        assert heard == interrupt.came
        if not heard:
            break
        # Those that ended already may be about to leave.
        wait_until(lambda: set(threading.enumerate()) <= before)
        assert fan.cancelled or set(states) <= {"not begun"} or set(states) == {"published"}
        assert inspect.getgeneratorstate(leaving) in (inspect.GEN_CREATED, inspect.GEN_CLOSED)
    assert moment > 100 and states == ["published"] * count


def send(number: int) -> None:
    time.sleep(A_MOMENT)
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("at", [0, 1, len(LEAVES), len(LEAVES) + 1])
def test_a_signal_while_writers_write(at, number, code, tmp_path):
    fan = FanOut(3)

    def writer(output: int) -> Callable[[Iterator[LeafData]], None]:
        def write(leaves: Iterator[LeafData]) -> None:
            with staged(tmp_path / str(output), overwrite=False) as stage:
                (stage / "begun").touch()
                if output == 2 and at:
                    return
                for leaf in itertools.islice(leaves, at):
                    everything(iter([leaf]))
                if output == 1:
                    send(number)
                    wait_until(lambda: fan.cancelled)
                for leaf in leaves:
                    everything(iter([leaf]))
                wait_until(lambda: fan.cancelled)
                raise Fault("it has all leaves, and looks whether it goes on")

        return write

    with no_thread_left(), pytest.raises(SystemExit) as raised, boundary(verbose=False):
        fan.run(produced(LEAVES, 3), [writer(output) for output in range(3)])
    assert raised.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == (["2"] if at else []), "what was complete stays"


def test_a_writer_that_does_not_look_is_waited_for_however_often_one_interrupts():
    fan = FanOut(2)
    ended: list[str] = []

    def stubborn(leaves: Iterator[LeafData]) -> None:
        everything(leaves)
        send(signal.SIGINT)
        wait_until(lambda: fan.cancelled)
        send(signal.SIGINT)
        send(signal.SIGINT)
        time.sleep(A_MOMENT)
        ended.append("all of it")

    with no_thread_left(), pytest.raises(KeyboardInterrupt):
        fan.run(produced(LEAVES, 2), [stubborn, everything])
    assert ended == ["all of it"]


def test_an_interrupt_while_an_error_unwinds_comes_first_and_leaves_no_thread():
    def unwilling(leaves: Iterator[LeafData]) -> None:
        try:
            everything(leaves)
        finally:
            send(signal.SIGINT)
            time.sleep(A_MOMENT)

    def note(position: Position) -> None:
        if position == (1, 0):
            raise Fault("first")

    with no_thread_left(), pytest.raises(KeyboardInterrupt) as raised:
        FanOut(2).run(produced(LEAVES, 2, note), [unwilling, everything])
    assert isinstance(raised.value.__context__, Fault)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
@pytest.mark.parametrize("started", [False, True])
def test_a_thread_that_does_not_start_lets_no_writer_begin(started, error, monkeypatch):
    start = threading.Thread.start
    begun: list[object] = []
    threads = itertools.count()

    def interrupted(thread: threading.Thread) -> None:
        failing = next(threads) == 1
        if started or not failing:
            start(thread)
        if failing:
            raise error

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    leaves = produced(LEAVES, 3)
    with no_thread_left(), pytest.raises(type(error)):
        FanOut(3).run(leaves, [begun.append] * 3)
    assert begun == []
    assert inspect.getgeneratorstate(leaves) == inspect.GEN_CLOSED


def test_files_of_one_stream_equal_those_of_a_stream_each(tmp_path):
    """Real sinks, one of which finds its disk unwilling."""
    values = np.random.default_rng(0).standard_normal((3, 40, 50)).astype(np.float32)

    def leaves(outputs: Sequence[int]) -> Generator[Broadcast]:
        for number in range(4):
            spec = TensorSpec((f"leaf{number}",), (40, 50), np.dtype(np.float32))
            rows = (
                ((slice(row, row + 8), slice(0, 50)), tuple(values[one, row : row + 8] * number for one in outputs))
                for row in range(0, 40, 8)
            )
            yield Broadcast((spec,) * len(outputs), (8, 50), rows)

    def writer(file: Path) -> Callable[[Iterator[LeafData]], int]:
        specs = [TensorSpec((f"leaf{number}",), (40, 50), np.dtype(np.float32)) for number in range(4)]
        return lambda leaves: TorchSink(file).write(specs, leaves, ())

    (tmp_path / "in the way").touch()
    together = [tmp_path / "together0.pth", tmp_path / "in the way" / "1.pth", tmp_path / "together2.pth"]
    results = FanOut(3).run(leaves([0, 1, 2]), [writer(file) for file in together])
    assert isinstance(results[1], LoraMergeError)
    for output in (0, 2):
        alone = tmp_path / f"alone{output}.pth"
        assert FanOut(1).run(leaves([output]), [writer(alone)]) == [results[output]]
        assert alone.read_bytes() == together[output].read_bytes()
        opened = TorchFormat().open(together[output], None)
        assert opened is not None
        found = opened.source.read(("leaf3",), (slice(0, 40), slice(0, 50)))
        np.testing.assert_array_equal(found, values[output] * 3)
