"""What a run has come to: tables on the terminal, files and figures in its folder."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyproelbo.cli.runs import Config
from pyproelbo.latent_dims import kl_per_dim
from pyproelbo.lightning import ELBOTask
from pyproelbo.plots import NATS, plot_elbo_trace, plot_kl_per_dim, plot_reconstructions

ACTIVE = 0.01  # nats
_LABELS = {
    "objective": "objective",
    "elbo": "ELBO",
    "reconstruction": "reconstruction",
    "kl": "KL",
}


def summarise(config: Config, task: ELBOTask, train: Tensor, val: Tensor) -> dict[str, Any]:
    """The terms of both parts of the data, and the KL by dimension, per datum in nats."""
    state = torch.get_rng_state()
    torch.manual_seed(config.seed)
    parts = {"train": _evaluate(task, train), "held_out": _evaluate(task, val)}
    torch.set_rng_state(state)
    with torch.no_grad():
        kl = kl_per_dim(task.guide.posterior(train))  # type: ignore[attr-defined]
    return {
        "steps": task.objective.step,
        "beta": config.schedule()(task.objective.step),
        "unit": "nats per datum",
        "num_train": len(train),
        "num_held_out": len(val),
        **parts,
        "kl_per_dim": kl.tolist(),
        "active_dims": int((kl > ACTIVE).sum()),
    }


def _evaluate(task: ELBOTask, x: Tensor) -> dict[str, float]:
    sums = dict.fromkeys(_LABELS, 0.0)
    for batch in x.split(4096):
        terms = task.terms(batch)
        sums["objective"] += task.objective.objective(terms).item()
        sums["elbo"] += terms.elbo.item()
        sums["reconstruction"] += terms.reconstruction.item()
        sums["kl"] += terms.shrinkage.item()
    return {name: value / len(x) for name, value in sums.items()}


def show(summary: dict[str, Any]) -> None:
    """Print the tables."""
    table = Table(title="Terms of the ELBO, nats per datum", title_justify="left")
    table.add_column("")
    table.add_column(f"train ({summary['num_train']:,})", justify="right")
    table.add_column(f"held out ({summary['num_held_out']:,})", justify="right")
    for name, label in _LABELS.items():
        if name == "objective":
            label += f" (beta = {summary['beta']:g})"
        table.add_row(label, *(f"{summary[part][name]:.2f}" for part in ("train", "held_out")))

    kl = np.array(summary["kl_per_dim"])
    active = summary["active_dims"]
    dims = Table(
        title=f"KL by latent dimension, {active} of {len(kl)} active", title_justify="left"
    )
    dims.add_column("dimension", justify="right")
    dims.add_column("nats per datum", justify="right")
    dims.add_column("")
    order = np.argsort(-kl, kind="stable")[:20]
    for d in order:
        dims.add_row(str(d), f"{kl[d]:.3f}", "█" * round(24 * kl[d] / max(kl.max(), ACTIVE)))
    console = Console()
    console.print(table)
    console.print(dims)
    if len(kl) > len(order):
        console.print(f"and {len(kl) - len(order)} more, in summary.json")


def write(
    folder: Path,
    config: Config,
    task: ELBOTask,
    rows: list[dict[str, float]],
    summary: dict[str, Any],
    val: Tensor,
) -> None:
    """Write the trace, the summary and the figures."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if rows:
        with (folder / "terms.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        _trace_figure(rows).savefig(folder / "elbo_trace.png", dpi=150)

    figure = _figure(7, 3.6)
    ax = plot_kl_per_dim(summary["kl_per_dim"], threshold=ACTIVE, ax=figure.subplots())
    ax.set_title(f"KL by latent dimension, beta = {summary['beta']:g}")
    figure.savefig(folder / "kl_per_dim.png", dpi=150)

    x = val[:10]
    with torch.no_grad(), pyro.get_param_store().scope():
        z = task.guide.posterior(x).mean  # type: ignore[attr-defined]
        mean = task.model.decode(z).mean  # type: ignore[attr-defined]
    image = len(config.shape) > 1
    figure = _figure(7, 2.0 if image else 6.0)
    ax = plot_reconstructions(x, mean, shape=config.shape, ax=figure.subplots())
    ax.set_title("Held-out data and their reconstructions from the posterior mean")
    figure.savefig(folder / "reconstructions.png", dpi=150)


def _trace_figure(rows: list[dict[str, float]]) -> Figure:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    figure = _figure(7, 6.4)
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


def _figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window, whatever backend is set."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
