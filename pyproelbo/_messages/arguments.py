"""Checks of the arguments of reports."""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from numbers import Integral, Real
from typing import TypeGuard


def check_counts(least: int = 1, **values: object) -> None:
    """Check that each is a whole number that is large enough.

    Raises:
        ValueError: for one that is not.
    """
    for name, value in values.items():
        if not is_whole(value) or value < least:
            what = (
                "a positive whole number" if least == 1 else f"a whole number of at least {least}"
            )
            raise ValueError(f"{name} should be {what}, got {value!r}")


def check_shared(plate: object, seed: object, arguments: object, chunk: object = None) -> None:
    """Check the arguments that reports share: ``chunk``, ``seed``, ``plate``, ``arguments``.

    Raises:
        ValueError: for the first of them that is invalid.
    """
    check_counts(chunk=1 if chunk is None else chunk)
    check_seed(seed)
    check_name(plate=plate)
    check_function(arguments=arguments)


def check_executor(executor: object, level: object = None) -> None:
    """Check an executor, and that the report at this level is one of rows.

    Raises:
        ValueError: for anything but an executor, or None.
    """
    if not (executor is None or isinstance(executor, Executor)):
        raise ValueError(
            "executor should be a concurrent.futures.Executor, such as ProcessPoolExecutor(4) or "
            f"dask.distributed.Client(...).get_executor(), got {executor!r}"
        )
    if executor is not None and level in ("global", "local"):
        raise ValueError(
            f"executor= computes rows of the data, and level={level!r} has none: leave one of the "
            "two out"
        )


def check_seed(seed: object) -> None:
    """
    Raises:
        ValueError: for anything but a valid seed of all generators.
    """
    if not is_whole(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed should be a whole number, not negative, got {seed!r}")


def check_name(**values: object) -> None:
    """Check that each is a name, or None.

    Raises:
        ValueError: for one that is neither.
    """
    for name, value in values.items():
        if not (value is None or isinstance(value, str)):
            raise ValueError(f"{name} should be a name, got {value!r}")


def check_names(**values: object) -> None:
    """Check that each is a name, or several, or None.

    Raises:
        ValueError: for one that is not.
    """
    for name, value in values.items():
        if value is None or isinstance(value, str):
            continue
        several = isinstance(value, Sequence) and all(isinstance(part, str) for part in value)
        if not (several and value):
            raise ValueError(f"{name} should be a name, or a list of names, got {value!r}")


def check_function(**values: object) -> None:
    """Check that each can be called, or is None.

    Raises:
        ValueError: for one that is neither.
    """
    for name, value in values.items():
        if not (value is None or callable(value)):
            raise ValueError(f"{name} should be a function, got {value!r}")


def check_positive(**values: object) -> None:
    """Check that each is a number above 0.

    Raises:
        ValueError: for one that is not.
    """
    for name, value in values.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not (is_number and 0 < float(value) < math.inf):  # type: ignore[arg-type]
            raise ValueError(f"{name} should be a positive number, got {value!r}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether this is a whole number, from Python or NumPy; True is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)
