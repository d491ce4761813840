"""How often the verdict of ``pe.check`` is right: on real posteriors whose truth is known.

    python tests/benchmarks/posteriordb.py PATH [--steps 4000] [--processes 2] [--out rows.json]

PATH is a folder with posteriors of posteriordb (Magnusson et al.): ``data.json``, ``index.json``,
``reference.npz``. Each is fitted by four AutoGuides, and by one that is trained too short. A fit is
wrong where, of any parameter, the mean is off by more than 0.2 standard deviations of the
reference, or the standard deviation by more than 20 %.
"""

import argparse
import json
import warnings
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import posteriordb_models as posteriors
import pyro
import torch
from pyro.infer import SVI, autoguide
from pyro.infer.autoguide.initialization import init_to_value

import pyproelbo as pe

SHORT = 150  # steps
MEAN, SD = 0.2, 0.2  # what is wrong: of the reference's sds, and relative
DRAWS = 4000
NO_VARIANCE = {"one_comp_mm_elim_abs-one_comp_mm_elim_abs": (1, 2)}  # K_m and V_m: no sd to compare

GUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoDiagonalNormal, short": autoguide.AutoDiagonalNormal,
}


class Fit(NamedTuple):
    """What was found of one fit.

    Attributes:
        off: the worst mean, in sds of the reference, and the worst relative error of an sd: by
            the guide's draws, and by those that are corrected.
        khat, shift, ratio, gap, ess: what the guide's own weighted draws say: k-hat, the worst mean
            in sds, the worst factor of an sd, nats to log p(x), and the effective sample size.
        can_be_corrected: whether the weighted draws are said to stand for the posterior.
        verdict: of ``pe.check``.
    """

    posterior: str
    guide: str
    off: tuple[float, float]
    corrected: tuple[float, float]
    khat: float
    shift: float
    ratio: float
    gap: float
    ess: float
    can_be_corrected: bool
    verdict: str

    @property
    def is_wrong(self) -> bool:
        """Whether the guide's means or sds are."""
        return self.off[0] > MEAN or self.off[1] > SD

    @property
    def is_mended(self) -> bool:
        """Whether the corrected ones are right."""
        return self.corrected[0] <= MEAN and self.corrected[1] <= SD


def fit(folder: Path, steps: int, pair: tuple[str, str]) -> Fit:
    """Fit one guide to one posterior, and judge it."""
    name, kind = pair
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    warnings.simplefilter("ignore")
    truth = posteriors.load(folder, name)
    start = init_to_value(values=dict(truth.initial))
    guide = GUIDES[kind](truth.model, init_loc_fn=start)
    num = SHORT if kind.endswith("short") else steps
    decay = 0.01 ** (1 / num)  # of the learning rate, to a hundredth in the end
    optimiser = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": decay})
    svi = SVI(truth.model, guide, optimiser, pe.BetaELBO(num_particles=4, vectorize_particles=True))
    for _ in range(num):
        svi.step()
    found = pe.check(truth.model, guide, None, num_samples=1000, progress=False)
    off, corrected = (
        _off(truth, _draws(truth, guide, corrected), NO_VARIANCE.get(name, ()))
        for corrected in (False, True)
    )
    ratio = found.moments.sd_ratio.log().abs().max().exp().item()
    return Fit(
        name,
        kind,
        off,
        corrected,
        float(found.psis.khat),
        found.moments.mean_shift.abs().max().item(),
        ratio,
        found.decompositions.posterior_kl.value,
        float(found.psis.effective_sample_size),
        bool(found.moments.can_be_corrected),
        found.verdict,
    )


def _draws(truth: posteriors.Posterior, guide: object, corrected: bool) -> np.ndarray:
    """Of the parameters that the reference has, (S, P)."""
    options = {"num_samples": DRAWS, "seed": 1, "progress": False}
    groups = ("posterior", "sample_stats")
    tree = pe.from_svi(truth.model, guide, groups=groups, corrected=corrected, **options)
    values = tree["posterior"].to_dataset()
    latents = {n: torch.as_tensor(values[n].values[0]) for n in truth.initial}
    return truth.reported(latents).numpy()


def _off(truth: posteriors.Posterior, x: np.ndarray, free: tuple[int, ...]) -> tuple[float, float]:
    """The worst mean, in sds, and the worst relative error of an sd."""
    mean = np.abs(x.mean(0) - truth.mean) / truth.sd
    sd = np.abs(x.std(0) / truth.sd - 1)
    kept = [i for i in range(len(sd)) if i not in free]
    return float(mean[kept].max()), float(sd[kept].max())


def report(fits: list[Fit]) -> None:
    """Print the confusion table, and the rates that count."""
    counts = Counter((each.is_wrong, each.verdict) for each in fits)
    print("| | fine | doubtful | bad |\n|---|---|---|---|")
    for wrong, label in ((False, "right"), (True, "wrong")):
        cells = [str(counts[wrong, verdict]) for verdict in ("fine", "doubtful", "bad")]
        print(f"| {label} | " + " | ".join(cells) + " |")
    fine = [each for each in fits if each.verdict == "fine"]
    wrong = [each for each in fits if each.is_wrong]
    print(f"\nof those called fine {share(sum(e.is_wrong for e in fine), len(fine))} are wrong;")
    said = sum(each.verdict != "fine" for each in wrong)
    print(f"of the wrong {share(said, len(wrong))} are called doubtful or bad;")
    for label, some in (
        ("with k-hat below 0.7", [each for each in fits if each.khat < 0.7]),
        ("whose draws are said to reach", [each for each in fits if each.can_be_corrected]),
    ):
        mended = share(sum(each.is_mended for each in some), len(some))
        own = share(sum(not each.is_wrong for each in some), len(some))
        print(f"of those {label} {mended} are right once corrected, {own} as they are;")
    print()
    print("| posterior | guide | mean off | sd off | corrected | k-hat | by weights | verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for e in fits:
        by_weights = f"{e.shift:.2f}, x{e.ratio:.2f}"
        print(
            f"| {e.posterior} | {e.guide} | {e.off[0]:.2f} | {e.off[1]:.2f} | "
            f"{e.corrected[0]:.2f}, {e.corrected[1]:.2f} | {e.khat:.2f} | {by_weights} | "
            f"{e.verdict}{' (wrong)' * e.is_wrong} |"
        )


def share(part: int, of: int) -> str:
    """A share in percent, with its numbers."""
    return f"{part / max(of, 1):.1%} ({part} of {of})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    names = options.only or posteriors.names(options.folder)
    pairs = [(name, kind) for name in names for kind in GUIDES]
    with get_context("spawn").Pool(options.processes) as pool:
        fits = []
        for each in pool.imap(partial(fit, options.folder, options.steps), pairs):
            fits.append(each)
            if options.out:
                options.out.write_text(json.dumps([f._asdict() for f in fits], indent=1))
    report(fits)


if __name__ == "__main__":
    main()
