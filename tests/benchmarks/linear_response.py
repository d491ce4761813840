"""Posterior sds in four ways, on real posteriors whose truth is known.

    python tests/benchmarks/linear_response.py PATH [--processes 2] [--out rows.json]

PATH is a folder with posteriors of posteriordb, as of ``posteriordb.py``. Each is fitted by
AutoNormal and by AutoMultivariateNormal, with ``pe.fit`` as it is. The sds of its parameters, as
the model has them, are

- those of the AutoNormal itself: mean field;
- those of ``pe.linear_response`` of it;
- those of its draws weighed by importance, smoothed: of ``pe.moments``;
- those of the AutoMultivariateNormal: full rank.

With ``--out`` a run goes on where it was stopped.
"""

import argparse
import json
import time
import warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import posteriordb_models as posteriors
import pyro
import torch
from posteriordb import NO_VARIANCE, SD
from pyro.infer import autoguide
from pyro.infer.autoguide.initialization import init_to_value

import pyproelbo as pe

WAYS = ("mean field", "linear response", "weighted draws", "full rank")
DRAWS = 10_000  # of which moments are means


class Compared(NamedTuple):
    """How far sds are off, by the four ways.

    Attributes:
        khat, can_be_corrected: of the AutoNormal's weighted draws.
        ended: why the two fits ended.
        off: sd / reference's sd - 1 of each parameter, by way; None where it refuses.
        why: it refuses, by way.
        stderr: the largest Monte Carlo error of an sd by linear response, relative.
        moved: of the linear response.
        seconds: of the AutoNormal's fit, its linear response, its moments, the other fit.
    """

    posterior: str
    khat: float
    can_be_corrected: bool
    ended: tuple[str, str]
    off: dict[str, list[float] | None]
    why: dict[str, str]
    stderr: float
    moved: float
    seconds: tuple[float, ...]

    def worst(self, way: str) -> float:
        """The worst |sd / reference's sd - 1|; infinite where the way refuses."""
        off = self.off[way]
        return np.inf if off is None else float(np.abs(off).max())

    def median(self, way: str) -> float:
        """The median of the same."""
        off = self.off[way]
        return np.inf if off is None else float(np.median(np.abs(off)))


def compared(folder: Path, max_time: float, num_samples: int, name: str) -> Compared:
    """Fit both guides to one posterior, and compare."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    truth = posteriors.load(folder, name)
    seconds: list[float] = []

    def timed(call, *args, **options):
        start = time.monotonic()
        try:
            return call(*args, progress=False, **options)
        finally:
            seconds.append(time.monotonic() - start)

    def fitted(kind: str) -> tuple[autoguide.AutoGuide, str]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = getattr(autoguide, kind)(
            truth.model, init_loc_fn=init_to_value(values=dict(truth.initial))
        )
        return guide, timed(pe.fit, truth.model, guide, None, max_time=max_time).reason

    def off(names: tuple[str, ...], sd: torch.Tensor) -> list[float]:
        """Of the latents that the reference has as they are, and that have an sd."""
        sites = list(dict.fromkeys(each.partition("[")[0] for each in names))
        assert sites == list(truth.initial), (sites, list(truth.initial))
        # of eight schools the reference has the effects, not those without units
        kept = [i for i, each in enumerate(names) if each.partition("[")[0] != "eta"]
        kept = [i for i in kept if i not in NO_VARIANCE.get(name, ())]
        return (sd.numpy()[kept] / truth.sd[kept] - 1).tolist()

    guide, first = fitted("AutoNormal")
    why, found = {}, dict.fromkeys(WAYS)
    stderr = moved = np.nan
    try:
        response = timed(pe.linear_response, truth.model, guide, None, num_samples=num_samples)
        found["linear response"] = off(response.names, response.sd)
        stderr, moved = float((response.sd_stderr / response.sd).max()), response.moved
    except ValueError as error:
        why["linear response"] = str(error)
    moments = timed(pe.moments, truth.model, guide, None, num_samples=DRAWS)
    found["mean field"] = off(moments.dims, moments.q_sd[0])
    found["weighted draws"] = off(moments.dims, moments.sd[0])
    guide, second = fitted("AutoMultivariateNormal")
    full = pe.moments(truth.model, guide, None, num_samples=DRAWS, progress=False)
    found["full rank"] = off(full.dims, full.q_sd[0])
    can_be_corrected = bool(moments.can_be_corrected[0])
    numbers = (float(moments.khat[0]), can_be_corrected, (first, second), found, why)
    return Compared(name, *numbers, stderr, moved, tuple(seconds))


def report(rows: list[Compared]) -> None:
    """Print a line for each posterior, and the counts."""
    heads = ("posterior", "parameters", "k-hat", *WAYS)
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        num = len(row.off["mean field"])
        cells = [f"{row.worst(w):.2f}, {row.median(w):.2f}" for w in WAYS]
        cells = [
            c if row.off[w] is not None else "refuses" for w, c in zip(WAYS, cells, strict=True)
        ]
        cells[2] += " (unreached)" * (not row.can_be_corrected)
        for i, ended in zip((0, 3), row.ended, strict=True):
            cells[i] += f" ({ended})" * (ended != "converged")
        print("| " + " | ".join((row.posterior, str(num), f"{row.khat:.2f}", *cells)) + " |")
    print("\n| | all sds within 20 % | median off | 90 % are off by less than | refuses |")
    print("|---|---|---|---|---|")
    for way in WAYS:
        off = np.abs(np.concatenate([row.off[way] for row in rows if row.off[way] is not None]))
        right = sum(row.worst(way) <= SD for row in rows)
        refused = sum(row.off[way] is None for row in rows)
        numbers = (f"{np.median(off):.3f}", f"{np.quantile(off, 0.9):.2f}", str(refused))
        print(f"| {way} | {right} of {len(rows)} | " + " | ".join(numbers) + " |")
    reached = [row for row in rows if row.can_be_corrected]
    right = sum(row.worst("weighted draws") <= SD for row in reached)
    print(f"\nof weighted draws that are said to reach: {right} of {len(reached)}")
    stderr = np.nanmedian([row.stderr for row in rows]), np.nanmax([row.stderr for row in rows])
    print("Monte Carlo error of linear response, relative: {:.1%}, at most {:.1%}".format(*stderr))
    times = np.array([row.seconds for row in rows])
    print("seconds, median and most: fit, linear response, weighted draws, full-rank fit")
    print(*(f"{np.median(t):.1f} ({t.max():.0f})" for t in times.T))
    for row in rows:
        for way, why in row.why.items():
            print(f"{row.posterior}, {way}: {why}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-time", type=float, default=300.0, help="of a fit, in seconds")
    parser.add_argument("--num-samples", type=int, default=100, help="of the linear response")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    rows = []
    if options.out and options.out.exists():
        rows = [Compared(**row) for row in json.loads(options.out.read_text())]
    done = {row.posterior for row in rows}
    names = options.only or posteriors.names(options.folder)
    of = partial(compared, options.folder, options.max_time, options.num_samples)
    with get_context("spawn").Pool(options.processes) as pool:
        for row in pool.imap(of, [name for name in names if name not in done]):
            rows.append(row)
            if options.out:
                options.out.write_text(json.dumps([r._asdict() for r in rows], indent=1))
    report(sorted(rows, key=lambda row: row.posterior))


if __name__ == "__main__":
    main()
