"""The report of a fit to sequences: their ELBO by timestep."""

from dataclasses import dataclass
from typing import NamedTuple, Self

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyproelbo._results.numbers import with_error
from pyproelbo._rows.batches import Batches
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.runs import Runs, Use
from pyproelbo._terms.by_time import ByTime, concatenate_by_time
from pyproelbo._terms.collect import terms_of
from pyproelbo._terms.terms import stack_terms
from pyproelbo.cli.figures import new_figure
from pyproelbo.cli.report import Report
from pyproelbo.cli.runs import Config
from pyproelbo.elbo.sequential import time_of
from pyproelbo.lightning import ELBOTask
from pyproelbo.plots import plot_kl_by_time, plot_reconstruction_by_time

DRAWS = 2  # of the guide for each sequence, whose spread gives the standard errors
BATCH = 256  # sequences at once
_NATS = ["reconstruction", "kl", "elbo"]
_LABELS = ("objective", "ELBO", "  reconstruction", "  KL")


class Mean(NamedTuple):
    """A term of the ELBO, as a mean over sequences, in nats.

    Attributes:
        value: per sequence.
        stderr: its Monte Carlo standard error, from the draws of the guide.
        per_frame: the sum over all sequences, divided by the number of all their steps.
    """

    value: float
    stderr: float
    per_frame: float

    def texts(self) -> tuple[str, str]:
        """Per sequence, and per frame."""
        return with_error(self.value, self.stderr, decimals=2), f"{self.per_frame:.3f}"


@dataclass(frozen=True)
class SequenceReport(Report):
    """The result of a fit to sequences.

    Attributes:
        train: the ELBO of the training data by timestep.
        held_out: the same for the held-out data.
    """

    unit = "nats per sequence"

    train: ByTime
    held_out: ByTime

    @classmethod
    def of(
        cls, config: Config, task: ELBOTask, train: dict[str, Tensor], val: dict[str, Tensor]
    ) -> Self:
        """The ELBO by timestep of both parts of the data, from two draws of the guide."""
        step = task.objective.step
        return cls(
            step=step,
            beta=config.schedule()(step),
            num=(len(train["x"]), len(val["x"])),
            train=_by_time(task, train, config.seed),
            held_out=_by_time(task, val, config.seed),
        )

    def show(self) -> None:
        """Print the terms per sequence and per frame, and the training data's by timestep."""
        title = f"Terms of the ELBO, nats (objective: beta = {self.beta:g})"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for name, num in zip(("train", "held out"), self.num, strict=True):
            table.add_column(f"{name} ({num:,})\nper sequence", justify="right")
            table.add_column("\nper frame", justify="right")
        parts = [_means(part, self.beta).values() for part in (self.train, self.held_out)]
        for label, *means in zip(_LABELS, *parts, strict=True):
            table.add_row(label, *(text for mean in means for text in mean.texts()))
        console = Console()
        console.print(table)
        console.print(f"Training data: {self.train}", highlight=False, soft_wrap=True)

    def parts(self) -> dict[str, object]:
        """The terms of both parts, and means per frame of the training data by timestep."""
        steps = self.train.totals().to_dataframe().query("frames > 0").reset_index()
        steps[_NATS] = steps[_NATS].div(steps.frames, axis=0)
        return {
            "train": self._terms(self.train),
            "held_out": self._terms(self.held_out),
            "by_time": {"unit": "nats per frame", **steps.to_dict("list")},
        }

    def figures(self) -> dict[str, Figure]:
        """The KL and the reconstruction of the training data by timestep."""
        figures = {}
        for plot in (plot_kl_by_time, plot_reconstruction_by_time):
            figure = figures[plot.__name__.removeprefix("plot_")] = new_figure(7, 5)
            ax = plot(self.train, ax=figure.subplots())
            ax.set_title(f"Training data, beta = {self.beta:g}")
        return figures

    def _terms(self, part: ByTime) -> dict[str, float]:
        means = _means(part, self.beta)
        terms = {name: mean.value for name, mean in means.items()}
        elbo = means["elbo"]
        return {**terms, "elbo_stderr": elbo.stderr, "elbo_per_frame": elbo.per_frame}


def _by_time(task: ELBOTask, data: dict[str, Tensor], seed: int) -> ByTime:
    parts = []
    with evaluating(task.model, task.guide, seed=seed):
        for batch in Batches(data, BATCH):
            runs = Runs(task.model, task.guide, batch, seed)
            draws = runs.traces("data", range(DRAWS), Use.SEQUENCES)
            by_time = stack_terms([terms_of(traces, time=time_of) for traces in draws]).by_time
            assert by_time is not None
            parts.append(by_time)
    return concatenate_by_time(parts)


def _means(by_time: ByTime, beta: float) -> dict[str, Mean]:
    """The means of the objective, the ELBO and its parts, in the order of ``_LABELS``."""
    sums, frames = by_time.to_xarray().sum("time"), float(by_time.totals().frames.sum())
    reconstruction, kl = sums.reconstruction, sums.kl
    terms = {
        "objective": reconstruction - beta * kl,
        "elbo": reconstruction - kl,
        "reconstruction": reconstruction,
        "kl": kl,
    }
    means = {}
    for name, value in terms.items():  # (draws, sequences)
        mean, variance = float(value.mean()), float(value.var("particle", ddof=1).mean())
        per_frame = float(value.mean("particle").sum()) / frames
        means[name] = Mean(mean, (variance / value.size) ** 0.5, per_frame)
    return means
