"""What a result of rows is of."""

from typing import NamedTuple


class Origin(NamedTuple):
    """The rows that a result is of, and what they depend on besides the data.

    Attributes:
        start, stop: the index of the first row in the whole data, and that after the last.
        seed: of the draws.
        programs: what tells model and guide, with their parameters, from others.
    """

    start: int
    stop: int
    seed: int
    programs: str
