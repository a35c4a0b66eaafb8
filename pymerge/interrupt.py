"""Work that no interrupt can break off halfway.

Python raises KeyboardInterrupt, and whatever else the handler of a signal raises, in the main
thread, between any two bytecodes: within cleanup too, within `Thread.join` (which up to Python 3.12
then takes a running thread for a finished one), and as often as somebody presses the keys. Work
that maps memory, has threads that use it and writes files is therefore done on a thread of its own,
where nothing is raised from outside. The calling thread waits; what is raised there meanwhile, by
whom and how often ever, is raised in the work once, where it says `check`, and at the end in the
calling thread.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Generic, TypeVar

T = TypeVar("T")

# Both threads wait for what the other one has set, not for a message, which is lost where an
# interrupt comes between taking it and keeping it. The locks wake them at once; that either looks
# again after so many seconds makes up for a lost one.
_POLL = 0.05

_local = threading.local()


class Uninterrupted(Generic[T]):
    """One piece of work for a thread of its own; `run` it once."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.asked: BaseException | None = None  # what the work is to raise
        self._work = work
        self._call: Callable[[], object] | None = None  # what the calling thread is to do
        self._left = False  # whether the calling thread has stopped waiting
        self._done = False
        self._result: list[T] = []
        self._failure: BaseException | None = None
        # Taken by the thread that begins, or by the one that gives up.
        self._begun = threading.Lock()
        self._woken = threading.Lock()
        self._answered = threading.Lock()
        self._woken.acquire()
        self._answered.acquire()
        self._signals = _Signals(self._woken)
        self._process = os.getpid()

    def run(self) -> T:
        """Do the work and return its result, or raise what it raised; RuntimeError where there can
        be no thread.
        """
        if _current() is not None:
            return self._work()
        if sys.is_finalizing():  # a thread that is started now never runs, and is waited for
            raise RuntimeError(
                "the interpreter is ending, and no thread runs any more; merge before that, not in"
                " what is called when objects are deleted at the end"
            )
        run = contextvars.copy_context().run
        # A daemon where the calling thread is one: the process then ends without waiting for it.
        thread = threading.Thread(target=run, args=(self._run,), name="pymerge-merge")
        try:
            with self._signals:
                self._wait(thread)
        finally:
            # It is done now, but where something was raised by `PyThreadState_SetAsyncExc` while
            # something else was being
            # noted: it then stops by itself, and frees what it holds.
            self._left = True
            if self.asked is None and not self._done:
                self.asked = KeyboardInterrupt()
        failure, self._failure = self._failure, None
        try:
            if self.asked is not None and failure is not self.asked:
                raise self.asked from failure  # it came too late to stop anything
            if failure is not None:
                raise failure
            return self._result.pop()
        finally:
            del failure  # whose frames hold this one
            self.asked = None

    def over(self) -> bool:
        """Whether the work has nothing in use: it is done, or has not begun and now never will."""
        self._done = self._done or self._begun.acquire(blocking=False)
        return self._done

    def _wait(self, thread: threading.Thread) -> None:
        started = False
        while True:
            try:
                if not started:
                    started = True
                    self._start(thread)
                while not self._done and not self._is_copy():
                    self._signals.deliver()
                    if self.asked is None or not self.over():
                        self._answer()
                        self._woken.acquire(timeout=_POLL)
                if thread.is_alive():
                    thread.join()
                return
            except BaseException as error:
                self.asked = self.asked or error

    def _is_copy(self) -> bool:
        """Whether this is a process that was forked while the calling thread was called back: the
        work goes on in the other one.
        """
        if os.getpid() == self._process:
            return False
        self.asked = self.asked or RuntimeError(
            "this process was forked while a merge ran, which goes on in the other one; leave it"
            " with os._exit(), or start it with multiprocessing"
        )
        return True

    def _start(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except RuntimeError as error:  # no further thread
            self._failure = error
            self._done = True

    def _answer(self) -> None:
        call = self._call
        if call is None:
            return
        try:
            if self.asked is None:
                self._signals.held = False
                call()
        except BaseException as error:
            self._signals.held = True
            self.asked = error
        self._signals.held = True
        self._call = None
        _wake(self._answered)

    def _run(self) -> None:
        if not self._begun.acquire(blocking=False):
            return
        _local.work = self
        try:
            self._result.append(self._work())
        except BaseException as error:  # raised again by `run`
            self._failure = error
        finally:
            self._done = True
            _wake(self._woken)

    def call(self, function: Callable[[], object]) -> None:
        """From the work: have the calling thread do this, and raise what it raises."""
        self._call = function
        _wake(self._woken)
        while self._call is not None and not self._left:
            self._answered.acquire(timeout=_POLL)
        check()


class _Signals:
    """Holds the handlers of signals back, which may raise, until they are called where that does no
    harm. Use as a context.

    Python calls them in the main thread alone; elsewhere nothing is held back.
    """

    def __init__(self, woken: threading.Lock) -> None:
        self.held = False
        self._woken = woken
        self._came: deque[int] = deque()
        self._usual: dict[int, Callable[[int, FrameType | None], object]] = {}

    def __enter__(self) -> None:
        self.held = True
        try:
            if threading.current_thread() is threading.main_thread():
                for number in signal.valid_signals():
                    usual = signal.getsignal(number)
                    if callable(usual):
                        self._usual[number] = usual
                        signal.signal(number, self._note)
        except BaseException:  # of a signal that was not held yet
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        late: BaseException | None = None
        for number, usual in self._usual.items():
            try:
                if signal.getsignal(number) == self._note:
                    signal.signal(number, usual)
            except BaseException as error:  # of a signal that is held no longer
                late = late or error
        self.held = False
        self.deliver()
        if late is not None:
            raise late

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.held:
            self._came.append(number)
            _wake(self._woken)
        else:  # while the calling thread is called back
            self._usual[number](number, frame)

    def deliver(self) -> None:
        """Call the handlers of the signals that came."""
        while self._came:
            number = self._came.popleft()
            self._usual[number](number, sys._getframe())


def check() -> None:
    """Raise here what was raised in the calling thread. Does nothing outside of such work, and may
    be called anywhere.
    """
    work = _current()
    if work is not None and work.asked is not None:
        raise work.asked


def on_calling_thread(function: Callable[[], object]) -> None:
    """Call a function of the user's where the user called, so that it finds its own thread."""
    work = _current()
    if work is None:
        function()
    else:
        work.call(function)


def _current() -> Uninterrupted[object] | None:
    return getattr(_local, "work", None)


def _wake(lock: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # awake already
        lock.release()
