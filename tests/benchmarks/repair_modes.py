"""How often ``pe.repair`` says "passes" of draws that miss a mode.

    python tests/benchmarks/repair_modes.py [--seeds 3] [--out rows.json]

Posteriors of two modes whose shares are known, and guides that are exact, nearly, at one of them:

- "square": z ~ N((m, 0, ..., 0), 1.5^2) in D dims, x_1 ~ N(z_1^2, 0.5^2), x_k ~ N(z_k, 0.1^2). The
  larger m, the less has the negative mode. "narrow" is a guide that is several times too narrow,
  "sharp" has noise of 0.05 and 0.02. Shares by quadrature;
- "exchange": the means of two normal distributions in a mixture, of which the guide knows one
  order.

Six data for each, and seed. A pass is false where the share of the draws in one mode is off by more
than four standard errors and 2%. Beside it what weights alone say, k-hat of the guide.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyproelbo as pe


class Case(NamedTuple):
    """Programs, data, and the share of the mode in which ``is_in`` says that z is, (6,)."""

    model: Callable
    guide: Callable
    x: Tensor
    share: Tensor
    is_in: Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """Counts of data: all, those that pass, and those of them that should not."""

    case: str
    num: int
    by_weights: int
    false_by_weights: int
    passes: int
    false: int
    seconds: float


def square(
    num: int, mean: float = 0.0, side: float = 1.0, noise: float = 0.5, rest: float = 0.1, times=1.0
) -> Case:
    """A guide at the positive mode, or at the negative one."""
    x = torch.cat(
        [torch.tensor([[2.0], [3.0], [4.0], [5.0], [6.0], [8.0]]), torch.randn(6, num - 1)], 1
    )
    means = torch.tensor([mean] + [0.0] * (num - 1))
    sds = torch.tensor([noise] + [rest] * (num - 1))
    precision = 1.5**-2 + rest**-2

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(means, 1.5).to_event(1))
            loc = torch.cat([z[..., :1].square(), z[..., 1:]], -1)
            pyro.sample("x", dist.Normal(loc, sds).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        root = x[:, :1].sqrt()
        loc = torch.cat([side * root, x[:, 1:] * rest**-2 / precision], -1)
        others = torch.full((len(x), num - 1), precision**-0.5)
        with pyro.plate("data", len(x)):
            sd = torch.cat([times * noise / (2 * root), others], -1)
            pyro.sample("z", dist.Normal(loc, sd).to_event(1))

    grid = torch.linspace(-8, 8, 200_001)[:, None]
    log_p = dist.Normal(mean, 1.5).log_prob(grid)
    log_p = log_p + dist.Normal(grid.square(), noise).log_prob(x[:, 0])
    share = (log_p.softmax(0) * (grid > 0)).sum(0)
    return Case(model, guide, x, share, lambda z: z[..., 0] > 0)


def exchange(num: int, apart: float) -> Case:
    """Two clusters of half of ``num`` data each."""
    half = num // 2
    x = torch.cat([torch.randn(6, half) - apart / 2, torch.randn(6, half) + apart / 2], 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
            which = dist.Categorical(torch.full((2,), 0.5))
            of_one = dist.MixtureSameFamily(which, dist.Normal(z.unsqueeze(-2), 1.0))
            pyro.sample("x", of_one.expand((*z.shape[:-1], num)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = torch.stack([x[:, :half].mean(1), x[:, half:].mean(1)], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.2 * half**-0.5).to_event(1))

    return Case(model, guide, x, torch.full((6,), 0.5), lambda z: z[..., 1] > z[..., 0])


CASES: dict[str, Callable[[], Case]] = {
    f"square, D = {num}, m = {mean:g}, guide at {'+' if side > 0 else '-'}": partial(
        square, num, mean, side
    )
    for num in (1, 3, 6, 10)
    for mean in (0.0, 0.4, 1.0)
    for side in (1.0, -1.0)
    if mean or side > 0
}
CASES |= {
    "square, D = 6, narrow": partial(square, 6, 0.3, times=0.15),
    "square, D = 3, sharp": partial(square, 3, noise=0.05, rest=0.02),
    "exchange, 12 data": partial(exchange, 12, 3.0),
    "exchange, 40 data": partial(exchange, 40, 4.0),
}


def row(name: str, seeds: int) -> Row:
    """One case, on data of each seed."""
    counts, begin = torch.zeros(5, dtype=torch.long), time.monotonic()
    for seed in range(seeds):
        torch.manual_seed(seed)
        case = CASES[name]()
        found = pe.repair(case.model, case.guide, case.x, seed=seed, progress=False)
        share, size = case.share, found.effective_sample_size
        off = case.is_in(found.draws["z"]).double().mean(0) - share
        is_false = off.abs() > 4 * (share * (1 - share) / size).sqrt() + 0.02
        good = found.khat_before < 0.7  # whose draws are all in one mode
        parts = (good, good & (1 - share).minimum(share).gt(0.02), found.passes)
        counts += torch.tensor([len(share), *(int(p.sum()) for p in parts), 0])
        counts[-1] += int((found.passes & is_false).sum())
    return Row(name, *counts.tolist(), time.monotonic() - begin)


def report(rows: list[Row]) -> None:
    """Print a line for each case, and the sums."""
    print(
        "| posterior | data | k-hat < 0.7 | of these false | repair passes | of these false | s |"
    )
    print("|---|---|---|---|---|---|---|")
    total = [sum(column) for column in zip(*(r[1:] for r in rows), strict=True)]
    for case, *numbers, seconds in [*rows, Row("all", *total)]:
        print("| " + " | ".join((case, *map(str, numbers), f"{seconds:.0f}")) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    rows = []
    for name in CASES:
        rows.append(row(name, options.seeds))
        if options.out is not None:
            options.out.write_text(json.dumps([r._asdict() for r in rows], indent=1))
    report(rows)


if __name__ == "__main__":
    main()
