"""Figures of the command line, which belong to no window, whatever the backend."""

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyproelbo.cli import files


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, ``width`` by ``height`` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    files.write(path, file.getvalue())
