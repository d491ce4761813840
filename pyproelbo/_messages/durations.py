"""Durations in words."""


def duration(seconds: float) -> str:
    """In the largest unit of which there are at least two.

    >>> duration(7400.0), duration(100.0), duration(0.1)
    ('2 hours', '100 seconds', '1 seconds')
    """
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1.0):.0f} seconds"
