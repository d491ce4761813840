"""What a fit has come to: tables on the terminal, files and figures in its folder."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyproelbo.cli.figures import new_figure
from pyproelbo.cli.runs import Config
from pyproelbo.cli.surgery import as_json
from pyproelbo.lightning import ELBOTask
from pyproelbo.plots import plot_elbo_trace, plot_kl_per_dim, plot_reconstructions
from pyproelbo.plots.axes import NATS
from pyproelbo.surgery import Surgery, surgery

MANY, FIRST = 20_000, 10_000  # of more rows than the one, so many are taken apart


class Report(NamedTuple):
    """What a fit has come to.

    Attributes:
        step: how many steps there were.
        beta: the weight of the KL in the end.
        rows: the trace, a row for each epoch.
        num: how many rows the training and the held-out data have.
        train: the surgery of the training data, or of the first of them.
        held_out: the surgery of the held-out data, or of the first of them.
    """

    step: int
    beta: float
    rows: list[dict[str, float]]
    num: tuple[int, int]
    train: Surgery
    held_out: Surgery

    def as_json(self) -> dict[str, Any]:
        """What ``summary.json`` has."""
        return {
            "steps": self.step,
            "beta": self.beta,
            "unit": NATS,
            "num_train": self.num[0],
            "num_held_out": self.num[1],
            "train": self._terms(self.train),
            "held_out": self._terms(self.held_out),
            "surgery": as_json(self.train),
        }

    def _terms(self, part: Surgery) -> dict[str, float]:
        return {
            "objective": self.objective(part),
            "elbo": part.elbo,
            "reconstruction": part.reconstruction,
            "kl": part.average_kl,
        }

    def objective(self, part: Surgery) -> float:
        """What the fit has maximised: reconstruction - beta KL."""
        return part.reconstruction - self.beta * part.average_kl


def report(
    config: Config, task: ELBOTask, rows: list[dict[str, float]], train: Tensor, val: Tensor
) -> Report:
    """Judge a fitted run on its data; where they are many, on the first 10,000 rows."""
    parts = [
        surgery(task.model, task.guide, x[:FIRST] if len(x) > MANY else x, seed=config.seed)
        for x in (train, val)
    ]
    step = task.objective.step
    return Report(step, config.schedule()(step), rows, (len(train), len(val)), *parts)


def show(report: Report) -> None:
    """Print the tables, and what they say."""
    parts = (report.train, report.held_out)
    table = Table(title="Terms of the ELBO, nats per datum", title_justify="left")
    table.add_column("")
    for name, part, num in zip(("train", "held out"), parts, report.num, strict=True):
        which = f"first {part.num_data:,} of {num:,}" if part.num_data < num else f"{num:,}"
        table.add_column(f"{name} ({which})", justify="right")
    objectives = [f"{report.objective(part):.2f}" for part in parts]
    table.add_row(f"objective (beta = {report.beta:g})", *objectives)
    for label, name in (
        ("ELBO", "elbo"),
        ("  reconstruction", "reconstruction"),
        ("  average KL", "average_kl"),
    ):
        table.add_row(label, *(_with_error(part, name) for part in parts))
    table.add_row("    mutual information", _with_error(report.train, "mutual_information"))
    table.add_row("      at most log N", f"{report.train.log_n:.2f}")
    table.add_row("    marginal KL", _with_error(report.train, "marginal_kl"))
    if report.train.active_units is not None:
        active = int(report.train.active_units.sum())
        table.add_row("active units", f"{active} of {len(report.train.dims)}")

    console = Console()
    console.print(table)
    console.print(_dims(report.train))
    for note in report.train.notes:
        console.print(note, highlight=False)


def _with_error(part: Surgery, name: str) -> str:
    error = float(part.stderr[name])
    return f"{getattr(part, name):.2f}" + (f" ± {error:.2f}" if error else "")


def _dims(result: Surgery) -> Table:
    """The KL of each dimension, the 20 largest."""
    kl, marginal = result.kl_per_dim, result.marginal_kl_per_dim
    assert kl is not None and marginal is not None  # of a diagonal guide they are known
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


def write(folder: Path, config: Config, task: ELBOTask, report: Report, val: Tensor) -> None:
    """Write the trace, the summary and the figures."""
    (folder / "summary.json").write_text(json.dumps(report.as_json(), indent=2) + "\n")
    if report.rows:
        with (folder / "terms.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(report.rows[0]))
            writer.writeheader()
            writer.writerows(report.rows)
        _trace_figure(report.rows).savefig(folder / "elbo_trace.png", dpi=150)

    figure = new_figure(7, 3.6)
    ax = plot_kl_per_dim(report.train, ax=figure.subplots())
    ax.set_title(f"KL by latent dimension, beta = {report.beta:g}")
    figure.savefig(folder / "kl_per_dim.png", dpi=150)

    x = val[:10]
    with torch.no_grad(), pyro.get_param_store().scope():
        z = task.guide.posterior(x).mean  # type: ignore[attr-defined]
        mean = task.model.decode(z).mean  # type: ignore[attr-defined]
    image = len(config.shape) > 1
    figure = new_figure(7, 2.0 if image else 6.0)
    ax = plot_reconstructions(x, mean, shape=config.shape, ax=figure.subplots())
    ax.set_title("Held-out data and their reconstructions from the posterior mean")
    figure.savefig(folder / "reconstructions.png", dpi=150)


def _trace_figure(rows: list[dict[str, float]]) -> Figure:
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
    figure.supylabel(NATS, fontsize="medium")
    return figure
