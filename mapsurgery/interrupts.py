"""Sections that no signal may cut in two."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

Handler = Callable[[int, Any], Any]


class uninterrupted:  # noqa: N801  (reads as a statement)
    """Hold signals back until the block has ended, then deliver them: a model is never left half changed.

    Those with a handler in Python, whatever it does: Ctrl-C, and SIGTERM, SIGALRM or SIGUSR1 where the program gave
    them one. Handlers run in the main thread alone; in others this does nothing. Blocks may be nested.
    """

    def __init__(self) -> None:
        self._before: dict[int, Handler] = {}
        self._caught: list[int] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):  # else the system acts, or a handler that is not Python's and cannot be put back
                    self._before[number] = handler
                    signal.signal(number, self._hold)
        except BaseException:  # that of a signal whose turn had not come
            self.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._put_back()
        finally:  # a handler that was put back may raise at once
            self._deliver(self._caught)

    def _hold(self, number: int, frame: Any) -> None:
        self._caught.append(number)

    def _put_back(self) -> None:
        try:
            for number, handler in self._before.items():
                signal.signal(number, handler)
        except BaseException:  # that of a signal which is no longer held back
            self._put_back()
            raise

    def _deliver(self, numbers: Sequence[int]) -> None:
        """Each to its handler, also where that of another raises."""
        if numbers:
            try:
                self._before[numbers[0]](numbers[0], sys._getframe(2))
            finally:
                self._deliver(numbers[1:])


@contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """A block after which `undo` has run, whatever ends it.

    Args: undo: may run twice: the first call may be kept from starting by a signal, or fail.
    """
    try:
        try:
            yield
        finally:
            with uninterrupted():
                undo()
    finally:
        with uninterrupted():
            undo()
