"""Numbers in tables and figures, with as many digits as their errors allow."""

import math

FEWEST, MOST = 2, 6  # decimals of a number that has an error


def with_error(value: float, stderr: float | None = None, decimals: int = 4) -> str:
    """A number and its standard error, as :func:`parts` has them, in one text.

    >>> with_error(-23.92391, 0.0196), with_error(0.03, 0.00453), with_error(3.79493)
    ('-23.924 ± 0.020', '0.0300 ± 0.0045', '3.7949')
    """
    number, error = parts(value, stderr, decimals)
    return f"{number} ± {error}" if error else number


def parts(value: float, stderr: float | None = None, decimals: int = 4) -> tuple[str, str]:
    """A number, and its standard error: "" where that is 0 or None.

    The error has two significant digits, the number as many decimals, at least two and at most six.
    An error below a millionth is given as a power of ten. NaN is "unknown".

    Args:
        decimals: of a number whose error is 0, None or NaN.

    >>> parts(1234.5678, 87.6), parts(0.1, 2e-6), parts(0.1, 3e-9)
    (('1234.57', '87.60'), ('0.100000', '0.000002'), ('0.100000', '3e-09'))
    >>> parts(1.0, 0.0), parts(1.0, math.nan), parts(math.nan, 0.1)
    (('1.0000', ''), ('1.0000', 'unknown'), ('unknown', ''))
    """
    value, error = float(value), 0.0 if stderr is None else abs(float(stderr))
    if math.isnan(value):
        return "unknown", ""
    if error == 0:
        return f"{value:z.{decimals}f}", ""
    if not math.isfinite(error):
        return f"{value:z.{decimals}f}", "unknown" if math.isnan(error) else "inf"
    exponent = int(f"{error:.1e}".partition("e")[2])
    decimals = min(max(1 - exponent, FEWEST), MOST)
    text = f"{error:.0e}" if error < 10**-MOST else f"{error:.{decimals}f}"
    return f"{value:z.{decimals}f}", text


def share(value: float) -> str:
    """A share of 1, in percent; NaN is "unknown".

    >>> share(0.7167), share(-1e-9)
    ('71.7%', '0.0%')
    """
    return "unknown" if math.isnan(value) else f"{value:z.1%}"
