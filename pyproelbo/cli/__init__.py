"""The command line ``python -m pyproelbo``, and :func:`load_run` for what it has written."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyproelbo.cli.runs import Run as Run
    from pyproelbo.cli.runs import load_run as load_run

PROGRAM = "python -m pyproelbo"


def __getattr__(name: str) -> Any:
    """Names that need torch, imported on demand: --help does not need it."""
    if name in ("Run", "load_run"):
        from pyproelbo.cli import runs

        return getattr(runs, name)
    raise AttributeError(f"module 'pyproelbo.cli' has no attribute {name!r}")
