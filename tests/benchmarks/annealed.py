"""log p(x) by importance weighting and by annealing, with a good guide and with a bad one.

    python tests/benchmarks/annealed.py

A Bernoulli VAE with 10 latents on scikit-learn's digits, whose pixels are made 0 or 1 at one half;
log p(x) of 100 images that it was not trained on, nats per datum. The bad guide is the trained one
with other weights in its last layer. What is true is taken to be importance weighting by the
trained guide, with 200,000 draws.
"""

import time

import pyro
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits

import pyproelbo as pe
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.vae import VAE, BernoulliLikelihood

TRAIN, TEST, EPOCHS = 1397, 100, 60


def programs(x):
    """A trained model and its guide, and a guide that was spoilt."""
    model, guide = VAE(10, 64, (64,), BernoulliLikelihood()), Diagonal(10, 64, (64,))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), pe.BetaELBO())
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(128):
            svi.step(x[rows])
    bad = Diagonal(10, 64, (64,))
    bad.load_state_dict(guide.state_dict())
    torch.nn.init.normal_(bad.encoder[-1].weight, 0.0, 0.3)
    return model, guide, bad


def main():
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data / 16 > 0.5).float()
    model, good, bad = programs(x[:TRAIN])
    test = x[TRAIN : TRAIN + TEST]
    truth = pe.evidence(model, good, test, num_samples=200_000)
    print(f"| trained | the truth | 200,000 | | {truth.log_evidence.mean():.3f} | |")
    contenders = [("importance", num) for num in (1000, 10_000, 40_000)]
    contenders += [(pe.Annealed(num), 10) for num in (10, 30, 100)]
    rows = [
        (name, guide, *c) for name, guide in (("trained", good), ("bad", bad)) for c in contenders
    ]
    rows += [("none", good, pe.Annealed(num, start="prior"), 10) for num in (10, 30, 100)]
    for name, guide, method, num in rows:
        start = time.perf_counter()
        result = pe.evidence(model, guide, test, method=method, num_samples=num)
        seconds = time.perf_counter() - start
        label = method if isinstance(method, str) else f"T = {method.num_temperatures}"
        print(
            f"| {name} | {label} | {num:,} | {seconds:.1f} | {result.log_evidence.mean():.3f} | "
            f"{result.effective_sample_size.median():.1f} |"
        )


if __name__ == "__main__":
    main()
