"""The time that a fit may take, and the display of its progress."""

import time

from tqdm import tqdm


class OutOfTime(Exception):
    """The bound on time, or another bound, has been reached."""


class Budget:
    """A bound on time, and a progress bar with the ELBO.

    Args:
        max_time: seconds; None for no bound.
        progress: whether to show the bar, on a terminal.
    """

    def __init__(self, max_time: float | None, progress: bool) -> None:
        self._end = None if max_time is None else time.monotonic() + max_time
        self._bar = tqdm(desc="fit", unit=" steps", disable=None if progress else True, leave=False)

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self._end is not None and time.monotonic() > self._end

    def check(self) -> None:
        """Raise OutOfTime if the time is over."""
        if self.is_over:
            raise OutOfTime

    def show(self) -> None:
        """One step more."""
        self._bar.update()

    def say(self, elbo: float) -> None:
        """What the ELBO is."""
        self._bar.set_postfix_str(f"ELBO {elbo:.4g}", refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
