"""The rows of a result, in words."""

from typing import Literal

Per = Literal["datum", "data set"]


def nats(per: Per) -> str:
    """The unit of a mean over the rows.

    >>> nats("datum"), nats("data set")
    ('nats per datum', 'nats')
    """
    return "nats per datum" if per == "datum" else "nats"


def num_rows(per: Per, num: int) -> str:
    """The number of rows, in words.

    >>> num_rows("datum", 1200), num_rows("data set", 1)
    ('1,200 data', 'all data together')
    """
    return f"{num:,} data" if per == "datum" else "all data together"


def dim(per: Per) -> str:
    """The name of their dim."""
    return per.replace(" ", "_")
