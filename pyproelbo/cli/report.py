"""The result of a fit: tables on the terminal, files and figures in its folder."""

import csv
import io
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from matplotlib.figure import Figure

from pyproelbo.cli import files
from pyproelbo.cli.figures import new_figure, save_figure
from pyproelbo.cli.runs import SUMMARY, Config
from pyproelbo.lightning import ELBOTask
from pyproelbo.plots import plot_elbo_trace


@dataclass(frozen=True)
class Report(ABC):
    """The result of a fit.

    Attributes:
        step: the number of steps.
        beta: the weight of the KL at the end.
        num: the numbers of rows of the training and the held-out data.
        unit: of the terms.
    """

    unit: ClassVar[str]

    step: int
    beta: float
    num: tuple[int, int]

    @property
    def hint(self) -> str | None:
        """A command for more, with {} for the run's folder; None if there is none."""
        return None

    @classmethod
    @abstractmethod
    def of(cls, config: Config, task: ELBOTask, train: Any, val: Any) -> Self:
        """Judge a fitted run on its data."""

    @abstractmethod
    def show(self) -> None:
        """Print the tables and their notes."""

    @abstractmethod
    def parts(self) -> dict[str, object]:
        """The terms of the training and of the held-out data, and more, for JSON."""

    @abstractmethod
    def figures(self) -> dict[str, Figure]:
        """The figures, by the names of their files."""

    def as_json(self) -> dict[str, object]:
        """The contents of ``summary.json``."""
        return {
            "steps": self.step,
            "beta": self.beta,
            "unit": self.unit,
            "num_train": self.num[0],
            "num_held_out": self.num[1],
            **self.parts(),
        }


def write(folder: Path, report: Report, rows: list[dict[str, float]]) -> list[str]:
    """Write the figures, the trace with a row for each epoch, and finally the summary.

    Returns:
        The names of the figures' files.
    """
    figures = report.figures()
    if rows:
        figures["elbo_trace"] = _trace_figure(rows, report.unit)
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
    if rows:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        files.write(folder / "terms.csv", table.getvalue())
    files.write(folder / SUMMARY, json.dumps(report.as_json(), indent=2) + "\n")
    return [f"{name}.png" for name in figures]


def is_written(folder: Path, step: int) -> bool:
    """Whether a folder has the complete report of a run after ``step`` steps."""
    try:
        return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["steps"] == step
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _trace_figure(rows: list[dict[str, float]], unit: str) -> Figure:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    figure = new_figure(7, 6.4)
    top, middle, bottom = figure.subplots(3, sharex=True)
    for ax, name, label in (
        (top, "elbo", "ELBO"),
        (middle, "reconstruction", "reconstruction"),
        (bottom, "kl", "KL"),
    ):
        curves = {"train": columns[f"train_{name}"], "held out": columns[f"val_{name}"]}
        plot_elbo_trace(columns["step"], curves, ylabel=label, ax=ax)
        ax.set(xlabel="", ylabel=label)
    top.set_title("The ELBO and its terms while training")
    bottom.set_xlabel("training step")
    figure.supylabel(unit, fontsize="medium")
    return figure
