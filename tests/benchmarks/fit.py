"""Fits that end by themselves, beside Adam with the best of five learning rates.

    python tests/benchmarks/fit.py PATH [--steps 5000] [--processes 2] [--out rows.json]

PATH is a folder with posteriors of posteriordb, as of ``posteriordb.py``. Each is fitted by
AutoNormal and AutoMultivariateNormal: by ``pe.fit`` as it is, and by Pyro's SVI with Adam, for so
many steps at each of five rates, that fall to a hundredth, from the same start; of these the best
is taken, as one who tunes by hand would. A fit that says "converged" is false where its ELBO is
more than 0.1 nats below the best of both, by more than two standard errors.
"""

import argparse
import json
import time
import warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import posteriordb_models as posteriors
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_value

import pyproelbo as pe

RATES = (0.3, 0.1, 0.03, 0.01, 0.003)
GUIDES = ("AutoNormal", "AutoMultivariateNormal")
DRAWS = 10_000  # of which an ELBO is the mean
NEAR = 0.1  # nats


class Pair(NamedTuple):
    """Two fits of a guide to a posterior.

    Attributes:
        reason, elbo, stderr, seconds, steps: of ``pe.fit``.
        best, rate, seconds_of_one, seconds_of_all: of Adam at its best rate, and of all five.
    """

    posterior: str
    guide: str
    reason: str
    elbo: float
    stderr: float
    seconds: float
    steps: int
    best: float
    rate: float
    seconds_of_one: float
    seconds_of_all: float

    @property
    def lacks(self) -> float:
        """How far the ELBO is below the best, in nats."""
        return max(self.best - self.elbo, 0.0)

    @property
    def is_near(self) -> bool:
        """Whether that is little, or within the error."""
        return self.lacks < NEAR + 2 * self.stderr


def pair(folder: Path, steps: int, which: tuple[str, str]) -> Pair:
    """Fit one guide to one posterior in both ways."""
    name, kind = which
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    truth = posteriors.load(folder, name)

    def new_guide() -> autoguide.AutoGuide:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        start = init_to_value(values=dict(truth.initial))
        return getattr(autoguide, kind)(truth.model, init_loc_fn=start)

    def elbo(guide: autoguide.AutoGuide) -> tuple[float, float]:
        found = pe.evidence(truth.model, guide, None, num_samples=DRAWS, seed=7, progress=False)
        return float(found.elbo), float(found.elbo_stderr)

    guide = new_guide()
    fit = pe.fit(truth.model, guide, None, progress=False)
    value, error = elbo(guide)
    found, seconds = {}, {}
    for rate in RATES:
        guide, start = new_guide(), time.monotonic()
        optimiser = pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / steps)})
        svi = SVI(truth.model, guide, optimiser, Trace_ELBO())
        try:
            for _ in range(steps):
                svi.step()
            found[rate] = elbo(guide)[0]
        except ValueError:  # a parameter that is not valid any more
            found[rate] = -float("inf")
        seconds[rate] = time.monotonic() - start
    best = max(found, key=lambda rate: found[rate])
    return Pair(
        name,
        kind,
        fit.reason,
        value,
        error,
        fit.seconds,
        fit.num_steps,
        found[best],
        best,
        seconds[best],
        sum(seconds.values()),
    )


def report(pairs: list[Pair]) -> None:
    """Print the rates that count, and each pair."""
    print("| posterior | guide | ended | ELBO | Adam's | at rate | s | s of one | s of all |")
    print("|---|---|---|---|---|---|---|---|---|")
    for p in pairs:
        cells = (f"{p.elbo:.2f} ± {p.stderr:.2f}", f"{p.best:.2f}", f"{p.rate:g}")
        times = (f"{p.seconds:.0f}", f"{p.seconds_of_one:.0f}", f"{p.seconds_of_all:.0f}")
        names = (p.posterior.partition("-")[2], p.guide.removeprefix("Auto"), p.reason)
        print("| " + " | ".join((*names, *cells, *times)) + " |")
    ended = [p for p in pairs if p.reason == "converged"]
    near, false = sum(p.is_near for p in pairs), sum(not p.is_near for p in ended)
    ratio = sorted(p.seconds / p.seconds_of_one for p in pairs)[len(pairs) // 2]
    print(f"\nwithin {NEAR} nats of the best: {near} of {len(pairs)} ({near / len(pairs):.1%})")
    print(f'"converged" that is false: {false} of {len(ended)}')
    print(f"time beside that of the best rate alone, median: {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = [(name, kind) for name in posteriors.names(options.path) for kind in GUIDES]
    of = partial(pair, options.path, options.steps)
    with get_context("spawn").Pool(options.processes) as pool:
        pairs = []
        for each in pool.imap(of, work, chunksize=1):
            pairs.append(each)
            if options.out is not None:
                options.out.write_text(json.dumps([p._asdict() for p in pairs], indent=1))
    report(pairs)


if __name__ == "__main__":
    main()
