"""The surgery of a run: its numbers and its figures, in a folder within the run's."""

import json
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from pyproelbo._rows.whole_reports import whole_reports
from pyproelbo._surgery.result import Surgery
from pyproelbo._surgery.surgery import surgery
from pyproelbo.cli import files
from pyproelbo.cli.figures import new_figure, save_figure
from pyproelbo.cli.rows import Rows
from pyproelbo.cli.runs import Run, load_run
from pyproelbo.cli.workers import workers
from pyproelbo.datasets import Files
from pyproelbo.plots import plot_aggregate_posterior, plot_kl_per_dim, plot_surgery
from pyproelbo.plots.axes import NATS
from pyproelbo.priors import MixturePrior

PARTS = {"train": "training data", "held-out": "held-out data"}


def take_apart(
    folder: Path,
    on: str,
    num_samples: int,
    max_pairs: int | None,
    batch_size: int,
    seed: int,
    num_workers: int = 1,
) -> tuple[Surgery, list[Path]]:
    """Split the ELBO of a run on one part of its data.

    Returns:
        The surgery, and the files that it is written to.

    Raises:
        ValueError: for an unknown part, a folder without a run, data that have changed.
    """
    run, data = load_part(folder, on)
    if isinstance(data, dict) and "lengths" in data:
        raise ValueError(
            f"the sequences of {folder} have different lengths, and their latents have no common "
            "aggregate posterior: fit sequences of one length"
        )
    with whole_reports(), workers(num_workers) as executor:
        result = surgery(
            run.model,
            run.guide,
            data.batched(batch_size) if isinstance(data, Files) else data,
            num_samples=num_samples,
            max_pairs=max_pairs,
            batch_size=batch_size,
            seed=seed,
            executor=executor,
        )
    into = folder / ("surgery" if on == "train" else "surgery_held_out")
    into.mkdir(exist_ok=True)
    with files.locked(into):
        return result, _write(into, run, result, on, seed)


def load_part(folder: Path, on: str) -> tuple[Run, Rows]:
    """A run, and the part of its data that ``on`` names.

    Raises:
        ValueError: for an unknown part, a folder that is no run's, data that have changed.
    """
    if on not in PARTS:
        raise ValueError(f"--on should be {' or '.join(PARTS)}, got {on!r}")
    run = load_run(folder)
    parts = run.config.split(run.config.read().x)
    return run, dict(zip(PARTS, parts, strict=True))[on]


def as_json(result: Surgery) -> dict[str, object]:
    """All of a surgery except its codes, for JSON."""
    values = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "codes"}
    values["stderr"] = {name: _plain(error) for name, error in result.stderr.items()}
    plain = {name: _plain(value) for name, value in values.items()}
    return {"unit": NATS, **plain, "notes": result.notes}


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else value


def _write(folder: Path, run: Run, result: Surgery, on: str, seed: int) -> list[Path]:
    of = f"{PARTS[on]} of {Path(run.config.data).name}"
    paths = [folder / "surgery.json"]
    values = {"data": of, "seed": seed, **as_json(result)}
    files.write(paths[0], json.dumps(values, indent=2) + "\n")

    figure = new_figure(8, 3.6)
    plot_surgery(result, ax=figure.subplots())
    figure.suptitle(f"ELBO surgery: {of}", fontsize="medium")
    figures = {"surgery.png": figure}

    if result.kl_per_dim is not None:
        figures["kl_per_dim.png"] = new_figure(7, 3.6)
        ax = plot_kl_per_dim(result, ax=figures["kl_per_dim.png"].subplots())
        ax.set_title(f"KL by latent dimension: {of}", fontsize="medium")

    learned = getattr(run.model, "prior", None)
    prior = learned() if isinstance(learned, MixturePrior) else None
    if len(result.dims) > 1 and (prior is not None or result.kl_per_dim is not None):
        size = result.codes.var(0) if result.kl_per_dim is None else result.kl_per_dim
        first, second = size.argsort(descending=True, stable=True)[:2].tolist()
        figures["aggregate_posterior.png"] = figure = new_figure(6.4, 4.8)
        ax = plot_aggregate_posterior(result, prior, dims=(first, second), ax=figure.subplots())
        ax.set_title(f"A code for each of the {of}", fontsize="medium")

    for name, figure in figures.items():
        paths.append(folder / name)
        save_figure(figure, paths[-1])
    return paths
