"""The report of a fit to rows: their surgery."""

import time
from dataclasses import dataclass
from typing import Self

import pyro
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyproelbo._messages.durations import duration
from pyproelbo._results.numbers import with_error
from pyproelbo._rows.whole_reports import whole_reports
from pyproelbo._surgery.expected_time import LONG
from pyproelbo._surgery.result import Surgery
from pyproelbo._surgery.surgery import surgery
from pyproelbo.cli.figures import new_figure
from pyproelbo.cli.report import Report
from pyproelbo.cli.rows import num_rows, some
from pyproelbo.cli.runs import Config
from pyproelbo.cli.standardising import ScaledGuide
from pyproelbo.cli.surgery import as_json
from pyproelbo.datasets import Files
from pyproelbo.lightning import ELBOTask
from pyproelbo.plots import plot_kl_per_dim, plot_pseudo_inputs, plot_reconstructions
from pyproelbo.plots.axes import NATS
from pyproelbo.priors import MixturePrior, Usage, VampPrior, usage

MANY, FIRST = 20_000, 10_000  # beyond the one, the surgery uses the other number of rows


@dataclass(frozen=True)
class RowReport(Report):
    """The result of a fit to rows.

    Attributes:
        train: the surgery of the training data, or of some of them.
        held_out: the surgery of the held-out data, or of some of them.
        seconds: the duration of the training data's surgery.
        examples: some held-out data (n, D) and their reconstructions from the posterior mean, as
            drawn.
        shape: of one datum.
        usage: the training codes' use of a mixture prior's components; None for others.
        pseudo_inputs: (K, D), of a VampPrior, as drawn.
        drawn: how they are drawn, in brackets, for titles: standardised, if features have units.
    """

    unit = NATS

    train: Surgery
    held_out: Surgery
    seconds: float
    examples: tuple[Tensor, Tensor]
    shape: tuple[int, ...]
    usage: Usage | None = None
    pseudo_inputs: Tensor | None = None
    drawn: str = ""

    @property
    def hint(self) -> str:
        """The command for the whole surgery, with its duration if that is not done yet."""
        command, of = "python -m pyproelbo surgery {}", self.train.num_data
        if of == self.num[0]:
            return f"for all of the surgery: {command}"
        # time grows with the square of the number of rows
        seconds = self.seconds * (self.num[0] / of) ** 2
        sooner = " (sooner with --max-pairs)" if seconds > LONG else ""
        return f"for all {self.num[0]:,} rows, in about {duration(seconds)}: {command}{sooner}"

    @classmethod
    def of(cls, config: Config, task: ELBOTask, train: Tensor | Files, val: Tensor | Files) -> Self:
        """Judge a fitted run on its data; if there are many, on 10,000 of the rows."""

        def taken_apart(data: Tensor | Files) -> Surgery:
            num = num_rows(data)
            x = some(data, FIRST if num > MANY else num, config.seed)
            with whole_reports():
                return surgery(task.model, task.guide, x, seed=config.seed)

        x = some(val, 10, config.seed)
        assert isinstance(x, Tensor)
        with torch.no_grad(), pyro.get_param_store().scope():
            z = task.guide.posterior(x).mean  # type: ignore[attr-defined]
            mean = task.model.decode(z).mean  # type: ignore[attr-defined]
        draw, in_units = torch.Tensor.detach, False
        if isinstance(task.guide, ScaledGuide) and len(config.shape) == 1:
            draw, in_units = task.guide.standardised, True
        step, prior = task.objective.step, task.model.prior  # type: ignore[attr-defined]
        start = time.monotonic()
        on_train = taken_apart(train)
        seconds = time.monotonic() - start
        return cls(
            step=step,
            beta=config.schedule()(step),
            num=(num_rows(train), num_rows(val)),
            train=on_train,
            held_out=taken_apart(val),
            seconds=seconds,
            examples=(draw(x), draw(mean)),
            shape=config.shape,
            usage=usage(prior, on_train.codes) if isinstance(prior, MixturePrior) else None,
            pseudo_inputs=draw(prior.pseudo_inputs.detach())
            if isinstance(prior, VampPrior)
            else None,
            drawn=" (standardised)" * in_units,
        )

    def show(self) -> None:
        """Print the terms of both parts, the KL of each dimension, the use of a mixture prior."""
        parts = (self.train, self.held_out)
        table = Table(title=f"Terms of the ELBO, {NATS}", title_justify="left")
        table.add_column("")
        for name, part, num in zip(("train", "held out"), parts, self.num, strict=True):
            which = f"{part.num_data:,} of {num:,}" if part.num_data < num else f"{num:,}"
            table.add_column(f"{name} ({which})", justify="right")
        objectives = [f"{self._terms(part)['objective']:.2f}" for part in parts]
        table.add_row(f"objective (beta = {self.beta:g})", *objectives)
        for label, name in (
            ("ELBO", "elbo"),
            ("  reconstruction", "reconstruction"),
            ("  average KL", "average_kl"),
        ):
            table.add_row(label, *(_with_error(part, name) for part in parts))
        table.add_row("    mutual information", _with_error(self.train, "mutual_information"))
        table.add_row("      at most log N", f"{self.train.log_n:.2f}")
        table.add_row("    marginal KL", _with_error(self.train, "marginal_kl"))
        if self.train.active_units is not None:
            active = int(self.train.active_units.sum())
            table.add_row("active units", f"{active} of {len(self.train.dims)}")

        console = Console()
        console.print(table)
        if self.train.kl_per_dim is not None:
            console.print(_dims(self.train))
        for note in self.train.notes:
            console.print(note, highlight=False)
        if self.usage is not None:
            console.print(self.usage, highlight=False)

    def parts(self) -> dict[str, object]:
        """The terms of both parts, the training data's surgery, the use of a mixture prior."""
        parts = {
            "train": self._terms(self.train),
            "held_out": self._terms(self.held_out),
            "surgery": as_json(self.train),
        }
        if self.usage is not None:
            parts["prior"] = {
                "num_components": len(self.usage.usage),
                "used": self.usage.used,
                "distinct": self.usage.distinct,
                "usage": self.usage.usage.tolist(),
                "notes": self.usage.notes,
            }
        return parts

    def figures(self) -> dict[str, Figure]:
        """The KL of each dimension, the pseudo-inputs of a VampPrior, and reconstructions."""
        figures = {}
        if self.train.kl_per_dim is not None:
            figures["kl_per_dim"] = figure = new_figure(7, 3.6)
            ax = plot_kl_per_dim(self.train, ax=figure.subplots())
            ax.set_title(f"KL by latent dimension, beta = {self.beta:g}")
        if self.usage is not None and self.pseudo_inputs is not None:
            figures["pseudo_inputs"] = figure = new_figure(7, 4.2)
            ax = plot_pseudo_inputs(
                self.pseudo_inputs, self.usage.usage, shape=self.shape, ax=figure.subplots()
            )
            ax.set_title(ax.get_title() + self.drawn)
        figures["reconstructions"] = figure = new_figure(7, 2.0 if len(self.shape) > 1 else 6.0)
        ax = plot_reconstructions(*self.examples, shape=self.shape, ax=figure.subplots())
        ax.set_title(f"Held-out data and reconstructions from the posterior mean{self.drawn}")
        return figures

    def _terms(self, part: Surgery) -> dict[str, float]:
        return {
            "objective": part.reconstruction - self.beta * part.average_kl,
            "elbo": part.elbo,
            "reconstruction": part.reconstruction,
            "kl": part.average_kl,
        }


def _with_error(part: Surgery, name: str) -> str:
    return with_error(getattr(part, name), float(part.stderr[name]), decimals=2)


def _dims(result: Surgery) -> Table:
    """The KL of each dimension, the 20 largest."""
    kl, marginal = result.kl_per_dim, result.marginal_kl_per_dim
    assert kl is not None and marginal is not None  # known for a diagonal guide
    order = kl.argsort(descending=True, stable=True)[:20].tolist()
    more = f", the first {len(order)} of {len(kl)}" if len(kl) > len(order) else ""
    table = Table(title=f"KL by latent dimension, nats per datum{more}", title_justify="left")
    table.add_column("dimension")
    table.add_column("KL", justify="right")
    table.add_column("of which marginal", justify="right")
    table.add_column("")
    widest = max(float(kl.max()), 0.1)
    for d in order:
        bar = "█" * round(24 * float(kl[d]) / widest)
        table.add_row(result.dims[d], f"{kl[d]:.3f}", f"{float(marginal[d]):z.3f}", bar)
    return table
