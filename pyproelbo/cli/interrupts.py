"""Ctrl-C and SIGTERM, treated alike: they stop a command, but not in the middle of a step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Counts Ctrl-C and SIGTERM, and raises KeyboardInterrupt where they are not deferred.

    Attributes:
        num: the number of signals so far.
        raised: whether one was raised; an import turns it into another error.
        last_words: the message if one ends the command.
    """

    def __init__(self) -> None:
        self.num, self.last_words, self.raised, self._deferred = 0, "stopped", False, False

    def __call__(self, *_: object) -> None:
        """Count a signal; raise KeyboardInterrupt where that is not deferred."""
        self.num += 1
        if not self._deferred:
            self.raised = True
            raise KeyboardInterrupt

    def listen(self) -> list[Handler]:
        """Handle both signals, in the main thread; returns the previous handlers."""
        if threading.current_thread() is not threading.main_thread():
            return []
        return [signal.signal(number, self) for number in _SIGNALS]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals within this context."""
        before = self.listen()
        try:
            yield
        finally:
            for number, handler in zip(_SIGNALS, before, strict=False):
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only count them within this context; the caller checks ``num``."""
        if self.raised:  # and was swallowed
            raise KeyboardInterrupt
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
