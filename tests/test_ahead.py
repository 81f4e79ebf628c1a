"""Iterators that run ahead: the same items in the same order, few of them waiting, and no thread that outlives its reader."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.ahead import Ahead, in_order

LONG = 20
"""Seconds, after which something that should have happened did not."""


class Fault(Exception):
    """What no part of the standard library raises."""


@contextlib.contextmanager
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Maker:
    """Makes the numbers from 0 on, and tells how far it came."""

    def __init__(self, count: int = 10**9, fault: int | None = None) -> None:
        self.made = 0
        self.ended = False
        self.threads: set[str] = set()
        self._count = count
        self._fault = fault
        self._changed = threading.Condition()

    def __call__(self) -> Generator[int]:
        try:
            for number in range(self._count):
                self.threads.add(threading.current_thread().name)
                if number == self._fault:
                    raise Fault(number)
                with self._changed:
                    self.made = number + 1
                    self._changed.notify_all()
                yield number
        finally:
            self.ended = True

    def wait_for(self, made: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.made >= made, LONG)

    def stays_at(self, made: int) -> bool:
        """Whether it makes no more than so many for a moment: it shows no more than a moment can."""
        with self._changed:
            return not self._changed.wait_for(lambda: self.made > made, 0.02)


@given(st.lists(st.integers(), max_size=30), st.integers(1, 5))
@settings(deadline=None)
def test_the_items_in_their_order(items, waiting):
    with no_thread_left():
        assert list(Ahead(iter(items), waiting)) == items


@given(st.lists(st.lists(st.integers(), max_size=6), max_size=8), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None)
def test_several_in_their_order(lists, running, waiting):
    makers = [lambda items=items: iter(items) for items in lists]
    with no_thread_left():
        assert [list(one) for one in in_order(makers, running, waiting)] == lists


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8), st.integers(1, 4))
@settings(deadline=None)
def test_one_that_is_left_early_does_not_disturb_the_next(cases, running):
    makers = [lambda count=count: iter(range(count)) for count, _ in cases]
    with no_thread_left():
        arriving = zip(in_order(makers, running), cases, strict=True)
        found = [list(itertools.islice(one, taken)) for one, (_, taken) in arriving]
    assert found == [list(range(min(count, taken))) for count, taken in cases]


def test_the_items_are_made_on_a_thread_while_none_is_asked_for():
    maker = Maker(3)
    with no_thread_left(), Ahead(maker()) as items:
        maker.wait_for(3)
        assert list(items) == [0, 1, 2]
    assert threading.current_thread().name not in maker.threads and len(maker.threads) == 1


@pytest.mark.parametrize("waiting", [1, 2, 5])
def test_no_more_are_made_than_may_wait_and_the_one_being_made(waiting):
    maker = Maker()
    with no_thread_left(), Ahead(maker(), waiting) as items:
        for taken in range(4):
            maker.wait_for(taken + waiting)
            assert maker.stays_at(taken + waiting + 1)
            assert next(items) == taken


def test_an_item_that_was_taken_is_not_held():
    class Item:
        pass

    let_go = threading.Event()

    def made() -> Generator[Item]:
        yield Item()
        let_go.wait(LONG)
        yield Item()

    with no_thread_left(), Ahead(made()) as items:
        held = weakref.ref(next(items))
        try:
            assert held() is None
        finally:
            let_go.set()


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_error_comes_where_its_item_would_have_come(at):
    with no_thread_left():
        items = Ahead(Maker(fault=at)())
        assert [next(items) for _ in range(at)] == list(range(at))
        with pytest.raises(Fault, match=str(at)):
            next(items)
        assert list(items) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_passes_as_well(error):
    def made() -> Generator[int]:
        yield 1
        raise error

    with no_thread_left():
        items = Ahead(made())
        assert next(items) == 1
        with pytest.raises(error):
            next(items)


def test_an_error_shows_where_it_was_raised():
    with pytest.raises(Fault) as raised:
        list(Ahead(Maker(fault=0)()))
    assert raised.traceback[-1].name == "__call__"


def test_an_error_of_one_in_a_row_waits_for_its_turn_and_closes_the_others():
    makers = [Maker(3), Maker(fault=1), Maker()]
    found: list[list[int]] = []
    with no_thread_left():
        arriving = in_order(makers, 3)
        with contextlib.closing(arriving), pytest.raises(Fault):
            for one in arriving:
                found.append([])
                for item in one:
                    found[-1].append(item)
    assert found == [[0, 1, 2], [0]]


def test_so_many_run_at_a_time():
    makers = [Maker() for _ in range(5)]
    with no_thread_left(), contextlib.closing(in_order(makers, 2)) as arriving:
        for number, one in enumerate(arriving):
            assert next(one) == 0
            for maker in makers[number : number + 2]:
                maker.wait_for(1)
            assert [maker.made for maker in makers[number + 2 :]] == [0] * (3 - number if number < 3 else 0)


def test_the_one_before_is_closed_at_the_next_ones_turn():
    with contextlib.closing(in_order([Maker(), Maker()], 1)) as arriving:
        first = next(arriving)
        assert next(first) == 0
        next(arriving)
        assert list(first) == []


def test_nothing_at_all():
    assert list(Ahead(())) == []
    assert list(in_order([], 2)) == []


def test_closing_while_it_waits_for_room():
    maker = Maker()
    with no_thread_left():
        items = Ahead(maker())
        maker.wait_for(3)
        items.close()
        items.close()
        assert list(items) == []


def test_closing_while_it_works_waits_for_that_item_alone():
    begun, let_go = threading.Event(), threading.Event()
    after: list[int] = []

    def made() -> Generator[int]:
        begun.set()
        assert let_go.wait(LONG)
        yield 1
        after.append(1)

    with no_thread_left():
        items = Ahead(made())
        assert begun.wait(LONG)
        threading.Timer(0.05, let_go.set).start()
        items.close()
        assert let_go.is_set() and after == []
        assert list(items) == []
        join_timers()


def test_closing_before_anything_was_taken():
    makers = [Maker(), Maker()]
    with no_thread_left():
        arriving = in_order(makers, 2)
        next(arriving)
        arriving.close()


def test_closing_ends_the_iterator_on_its_own_thread():
    ended: list[str] = []

    def made() -> Generator[int]:
        try:
            while True:
                yield 1
        finally:
            ended.append(threading.current_thread().name)

    items = Ahead(made())
    items.close()
    assert ended == ["ahead"], (
        "what it holds open (decoders, files, other threads) would stay for as long as the reader does"
    )


def nested(inner: Callable[[], Generator[int]]) -> Generator[int]:
    with Ahead(inner()) as items:
        yield from items


def test_one_inside_another():
    with no_thread_left():
        assert list(Ahead(nested(Maker(20)))) == list(range(20))
        with pytest.raises(Fault):
            list(Ahead(nested(Maker(fault=3))))


def test_closing_the_outer_one_closes_the_inner_one():
    maker = Maker()
    with no_thread_left():
        outer = Ahead(nested(maker))
        assert next(outer) == 0
        outer.close()
        assert maker.ended


def test_an_error_of_the_reader_leaves_no_thread():
    with no_thread_left(), pytest.raises(Fault), Ahead(Maker()()) as items:
        for item in items:
            raise Fault(item)
    with no_thread_left(), pytest.raises(Fault), contextlib.closing(in_order([Maker(), Maker()], 2)) as arriving:
        for one in arriving:
            raise Fault(next(one))


def test_ctrl_c_while_the_reader_waits():
    ready, let_go = threading.Event(), threading.Event()

    def made() -> Generator[int]:
        assert ready.wait(LONG)
        # A signal between the reader's last instruction and its waiting would be seen only when that ends.
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        let_go.wait(LONG)
        yield 1

    with no_thread_left(), pytest.raises(KeyboardInterrupt), Ahead(made()) as items:
        try:
            ready.set()
            next(items)
        finally:
            let_go.set()


def test_ctrl_c_while_a_row_is_closed_stops_all_of_it():
    """The second Ctrl-C: what cannot be waited for any more is at least told to stop."""
    let_go = threading.Event()
    begun = threading.Event()

    def slow() -> Generator[int]:
        yield 0
        begun.set()
        let_go.wait(LONG)
        yield 1

    with no_thread_left():
        arriving = in_order([slow, Maker()], 2)
        assert next(next(arriving)) == 0
        assert begun.wait(LONG)
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            arriving.close()
        let_go.set()
        join_timers()
        wait_for_the_stopped()


def test_ctrl_c_while_a_thread_starts_leaves_none(monkeypatch):
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with no_thread_left():
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Ahead(Maker()())
        monkeypatch.undo()
        wait_for_the_stopped()


def wait_for_the_stopped() -> None:
    # Not by joining: a thread whose join was interrupted counts as stopped while it still runs.
    last = time.monotonic() + 1
    while any(thread.name == "ahead" for thread in threading.enumerate()) and time.monotonic() < last:
        time.sleep(0.001)


def join_timers() -> None:
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
