"""The data that pe.surgery is given: batches, seeds, loaders, and what stays as it was."""

import contextlib
import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from helpers.oracles import rows
from helpers.surgery_programs import (
    POSTERIORS,
    PRIORS,
    SCALARS,
    correlated,
    normal,
    programs,
    standard,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo._distributions import interpolated_marginals
from pyproelbo._distributions.mixture_kernel import log_aggregate_marginals
from pyproelbo._surgery import guide_aggregate


@pytest.mark.slow
@pytest.mark.parametrize("q", POSTERIORS)
def test_the_answer_does_not_depend_on_the_batch(q):
    x = rows(530, 4)
    prior = PRIORS.get(q, standard)
    model, guide = programs(q, prior)
    expected = pe.surgery(model, guide, x, batch_size=530)
    loader = DataLoader(TensorDataset(x), batch_size=300)
    others = [
        pe.surgery(model, guide, x, batch_size=7),
        pe.surgery(model, guide, loader),
        pe.surgery(model, guide, {"x": x}, batch_size=100),
        pe.surgery(model, guide, (x,), batch_size=529),
    ]
    for other in others:
        torch.testing.assert_close(other.codes, expected.codes)
        for name in (*SCALARS, "kl_per_dim", "marginal_kl_per_dim"):
            ours, theirs = getattr(expected, name), getattr(other, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs))
                error = torch.as_tensor(other.stderr[name])
                torch.testing.assert_close(torch.as_tensor(expected.stderr[name]), error)


def test_seeds_and_nothing_random_outside():
    x = rows(50, 4)
    model, guide = programs(normal)
    before = torch.get_rng_state()
    first, again, other = (pe.surgery(model, guide, x, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.mutual_information == again.mutual_information
    assert first.mutual_information != other.mutual_information


@pytest.mark.parametrize("options, cause", [
    ({"num_samples": 0}, "num_samples"), ({"batch_size": 0}, "batch_size"), ({"seed": -1}, "seed"),
    ({"plate": "rows"}, "in plates .'data'., not in 'rows'"),
])  # fmt: skip
def test_wrong_options(options, cause):
    with pytest.raises(ValueError, match=cause):
        pe.surgery(*programs(normal), rows(10, 4), **options)


def test_wrong_data():
    model, guide = programs(normal)
    x = rows(10, 4)
    for data in (
        x[:0],
        [],
        iter([x]),
        np.zeros((3, 4)),
        DataLoader([]),
        torch.ones(()),
    ):
        with pytest.raises(ValueError, match="data should"):
            pe.surgery(model, guide, data)
    x[3, 1] = math.nan
    with pytest.raises(ValueError, match="data hold NaN in rows 2 to 3"):
        pe.surgery(model, guide, x, batch_size=2)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="the first of them row 3"):
        pe.surgery(model, guide, x, batch_size=2)


class Interrupting(nn.Module):
    """A guide that stops at its n-th run, as Ctrl-C would."""

    def __init__(self, at):
        super().__init__()
        self.at, self.dropout = at, nn.Dropout(0.9)

    def forward(self, x):
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(self.dropout(x)))


def test_modules_are_evaluated_without_dropout_and_left_as_they_were():
    x = rows(20, 4)
    model, guide = programs(normal)
    module = Interrupting(at=-1)
    expected = pe.surgery(model, guide, x)
    assert pe.surgery(model, module, x).elbo == expected.elbo
    assert module.training and module.dropout.training


def test_ctrl_c_leaves_nothing_behind():
    x = rows(20, 4)
    module = Interrupting(at=12)
    before = torch.get_rng_state()
    with pytest.warns(pe.UnfinishedWarning):
        pe.surgery(programs(normal)[0], module, x, batch_size=2)
    assert module.training and module.dropout.training
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


class Noisy(torch.utils.data.Dataset):
    """Rows that are others each time they are asked for, as augmentation makes them."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 3 * torch.randn(self.x.shape[1])


class Once:
    """Batches that can be gone through only once, though they do not say so."""

    def __init__(self, x):
        self.batches = iter(x.split(8))

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("make, num", [
    (lambda x: DataLoader(x, 8, shuffle=True, drop_last=True), 24),
    (lambda x: DataLoader(x, 8, shuffle=True), 30), (Once, 30),
    (lambda x: DataLoader(Noisy(x), 8, shuffle=True), 30),
    (lambda x: DataLoader(x, 8, sampler=torch.utils.data.RandomSampler(x, True, 40)), 40),
])  # fmt: skip
@pytest.mark.parametrize("family", [normal, correlated])
def test_loaders_whose_passes_differ(make, num, family):
    """All is of one pass: mutual information keeps its bound, and every row that came counts."""
    result = pe.surgery(*programs(family), make(rows(30, 4)), progress=False)
    assert result.num_data == num
    assert 0 < result.mutual_information <= result.log_n + 1e-9


def test_evidence_beside_a_loader_that_shuffles():
    model, guide = programs(normal)
    x = rows(10, 4)
    for report in (pe.decompositions, pe.inference_gap):
        with pytest.raises(ValueError, match="another order in each pass"):
            report(model, guide, DataLoader(x, 5, shuffle=True), evidence=torch.zeros(10))


@pytest.mark.parametrize("ends_at", [None, 2])
def test_marginals_are_interpolated_of_the_data_that_are_finished(ends_at, monkeypatch, device):
    """To 1e-5 nats what the exact kernel gives, of all data and of those before Ctrl-C."""
    x = rows(guide_aggregate._SLAB + 300, 4)
    for cost in ("_BY_COMPONENT", "_BY_POINT", "_BY_OCTAVE"):
        monkeypatch.setattr(interpolated_marginals, cost, 0)
    joint = guide_aggregate.log_aggregate_posterior

    def found():
        calls = itertools.count()

        def stopping(*tensors):
            if next(calls) == ends_at:
                raise KeyboardInterrupt
            return joint(*tensors)

        monkeypatch.setattr(guide_aggregate, "log_aggregate_posterior", stopping)
        return pe.surgery(*programs(normal), x, batch_size=1000)

    with contextlib.nullcontext() if ends_at is None else pytest.warns(pe.UnfinishedWarning):
        ours = found()
        monkeypatch.setattr(guide_aggregate, "interpolated_marginals", log_aggregate_marginals)
        expected = found()
    assert ours.num_data == (len(x) if ends_at is None else guide_aggregate._SLAB)
    interpolated = ours.total_correlation != expected.total_correlation
    assert interpolated == (device.type == "cpu")
    for name in (*SCALARS, "marginal_kl_per_dim"):
        value = torch.as_tensor(getattr(expected, name))
        torch.testing.assert_close(torch.as_tensor(getattr(ours, name)), value, rtol=0, atol=1e-5)
        error, exact = (torch.as_tensor(of.stderr[name]) for of in (ours, expected))
        torch.testing.assert_close(error, exact, rtol=1e-4, atol=1e-6)
