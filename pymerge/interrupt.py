"""Ctrl-C: work that no interrupt can break off halfway.

Python raises KeyboardInterrupt, and whatever else a signal handler raises, in the main thread
between any two bytecodes: also during clean-up, also in `Thread.join` (which up to Python 3.12 then
takes a running thread for a finished one), and as often as the keys are pressed. Work that maps
memory, writes files and has threads that use them therefore runs on a thread of its own, where
nothing is raised from outside. The calling thread waits. What is raised there in the meantime,
however often, is raised once in the work, where it calls `check`, and in the calling thread at the
end.

`engine.merge` runs merges of folders this way; `cli.main` turns the KeyboardInterrupt into a
message, `__main__` into exit status 130.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Generic, TypeVar

T = TypeVar("T")

# The threads wait for attributes that the other one sets, not for messages: an interrupt between
# receiving and storing a message would lose it. Locks wake them at once; polling at this interval
# in seconds makes up for a lost wake-up.
_POLL = 0.05

_local = threading.local()


class Uninterrupted(Generic[T]):
    """One piece of work for a thread of its own; call `run` once."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.asked: BaseException | None = None  # the exception that the work shall raise
        self._work = work
        # The function that the calling thread shall call
        self._call: Callable[[], object] | None = None
        self._left = False  # whether the calling thread has stopped waiting
        self._done = False
        self._result: list[T] = []
        self._failure: BaseException | None = None
        # Acquired by the thread that begins the work, or by the caller that gives up before.
        self._begun = threading.Lock()
        self._woken = threading.Lock()
        self._answered = threading.Lock()
        self._woken.acquire()
        self._answered.acquire()
        self._signals = _Signals(self._woken)
        self._process = os.getpid()

    def run(self) -> T:
        """Do the work and return its result, or raise what it raised. RuntimeError where no thread
        can be started.
        """
        if _current() is not None:
            return self._work()
        if sys.is_finalizing():  # a thread that is started now never runs, and is waited for
            raise RuntimeError(
                "the interpreter is ending, and no thread runs any more; merge before that, not in"
                " what is called when objects are deleted at the end"
            )
        run = contextvars.copy_context().run
        # A daemon if the calling thread is one (inherited), so that the process need not wait for
        # it.
        thread = threading.Thread(target=run, args=(self._run,), name="pymerge-merge")
        try:
            with self._signals:
                self._wait(thread)
        finally:
            # The work is done by now, unless `PyThreadState_SetAsyncExc` raised something while
            # another exception was being recorded. It then stops by itself and releases what it
            # holds.
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
        """Whether the work uses nothing any more: it is done, or will never begin."""
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
        """Called by the work: have the calling thread call this function, and raise what that
        raises.
        """
        self._call = function
        _wake(self._woken)
        while self._call is not None and not self._left:
            self._answered.acquire(timeout=_POLL)
        check()


class _Signals:
    """A context that holds back signal handlers, which may raise, until calling them does no harm.

    Python calls handlers in the main thread only, so in other threads nothing is held back.
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
        except BaseException:  # from a signal that was not held back yet
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        late: BaseException | None = None
        for number, usual in self._usual.items():
            try:
                if signal.getsignal(number) == self._note:
                    signal.signal(number, usual)
            except BaseException as error:  # from a signal that is no longer held back
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
    """Raise, in the work, what was raised in the calling thread. Does nothing outside such work."""
    work = _current()
    if work is not None and work.asked is not None:
        raise work.asked


def on_calling_thread(function: Callable[[], object]) -> None:
    """Call a function of the user's on the thread from which the user called."""
    work = _current()
    if work is None:
        function()
    else:
        work.call(function)


def load(module: str) -> ModuleType:
    """Import a module on a thread of its own. Compiled packages swallow an interrupt that is raised
    while they are imported, and others are then half imported and unusable.
    """
    return Uninterrupted(functools.partial(importlib.import_module, module)).run()


def _current() -> Uninterrupted[object] | None:
    return getattr(_local, "work", None)


def _wake(lock: threading.Lock) -> None:
    with contextlib.suppress(RuntimeError):  # awake already
        lock.release()
