"""What interrupts a report at a moment that a test chooses."""


class Stopping:
    """A program that is interrupted at one of its calls."""

    def __init__(self, program, at):
        self.program, self.at, self.calls = program, at, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.program(*args)
