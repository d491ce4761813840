"""The command line ``python -m pyproelbo``, and :func:`load_run` for what it has written."""

from pyproelbo.cli.runs import Run as Run
from pyproelbo.cli.runs import load_run as load_run
