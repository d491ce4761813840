"""Ctrl-C and SIGTERM, taken alike: they stop a command, but not in the middle of a step."""

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
        num: how many there have been.
        raised: whether one was raised; what an import makes of it is another error.
        last_words: what is to be said if one ends the command.
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
        """Be called for both signals, in the main thread; returns who was called before."""
        if threading.current_thread() is not threading.main_thread():
            return []
        return [signal.signal(number, self) for number in _SIGNALS]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Be called for both signals as long as this lasts."""
        before = self.listen()
        try:
            yield
        finally:
            for number, handler in zip(_SIGNALS, before, strict=False):
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Count them alone, as long as this lasts; who does that looks at ``num``."""
        if self.raised:  # and was swallowed
            raise KeyboardInterrupt
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
