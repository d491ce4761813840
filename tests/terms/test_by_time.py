"""The ELBO by timestep as a value: what of it counts, as an xarray.Dataset, as a table."""

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyproelbo as pe
from pyproelbo._terms.by_time import concatenate_by_time
from pyproelbo.sequences import IndependentSteps, MarkovChain, lengths_mask, unrolled

B, T = 4, 6
LENGTHS = (6, 1, 3, 6)


def masks():
    """Which steps a sequence has, and those whose data are there: (B, T)."""
    own = lengths_mask(torch.tensor(LENGTHS), T)
    observed = own.clone()
    observed[0, 2] = observed[2, 1] = False
    return own, observed


def plate(num, size=None):
    return pyro.plate("sequences", num if size is None else size, subsample=torch.arange(num))


def programs(own=None, observed=None, num=B, size=None):
    """A model and a guide of sequences (num, T)."""

    def model(x):
        with plate(num, size):
            z = pyro.sample(
                "z",
                MarkovChain(
                    dist.Normal(torch.zeros(num), 1.0),
                    lambda z: dist.Normal(0.9 * z, 0.5),
                    num_steps=T,
                    mask=own,
                ),
            )
            pyro.sample("x", IndependentSteps(dist.Normal(z, 1.0), mask=observed), obs=x)

    def guide(x):
        with plate(num, size):
            pyro.sample("z", IndependentSteps(dist.Normal(x / 2, 0.6), mask=own))

    return model, guide


def by_time(*args, looped=False, particles="one", x=None, **kwargs):
    model, guide = programs(*args, **kwargs)
    if looped:
        model, guide = unrolled(model), unrolled(guide)
    options = {
        "one": {},
        "looped": {"num_particles": 3},
        "vectorised": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 2},
    }[particles]
    x = torch.linspace(-1.0, 1.0, B * T).reshape(B, T) if x is None else x
    return pe.SequentialELBO(**options).terms(model, guide, x)


@pytest.mark.parametrize("looped", [False, True], ids=["whole", "loop"])
@pytest.mark.parametrize("particles", ["one", "looped", "vectorised"])
def test_a_dataset_has_named_dims_and_nan_where_nothing_counts(looped, particles):
    own, observed = masks()
    terms = by_time(own, observed, looped=looped, particles=particles)
    values = terms.by_time.to_xarray()
    dims = ("time", "sequences") if particles == "one" else ("time", "particle", "sequences")
    sizes = {"time": T, "particle": 3, "sequences": B}
    for name, counts in (("reconstruction", observed), ("kl", own)):
        assert values[name].dims == dims and values[name].attrs == {"units": "nats"}
        assert values[name].sizes == {dim: sizes[dim] for dim in dims}
        counts = np.broadcast_to(counts.cpu().numpy(), (*values[name].shape[1:-1], B, T))
        np.testing.assert_array_equal(values[name].notnull(), np.moveaxis(counts, -1, 0))
    assert values.time.values.tolist() == list(range(T))
    num = sizes["particle"] if "particle" in dims else 1
    elbo = float(values.reconstruction.sum() - values.kl.sum()) / num
    assert elbo == pytest.approx(float(terms.elbo))


def test_without_masks_all_counts():
    terms = by_time().by_time
    assert terms.mask.all() and terms.observed.all()
    assert terms.mask.shape == terms.kl.shape == (T, B)
    assert terms.mask.dtype == terms.observed.dtype == torch.bool


def test_totals_are_sums_over_sequences():
    own, observed = masks()
    terms = by_time(own, observed)
    totals = terms.by_time.totals()
    assert totals.frames.values.tolist() == own.sum(0).tolist() == [4, 3, 3, 2, 2, 2]
    assert totals.observed.values.tolist() == observed.sum(0).tolist() == [4, 2, 2, 2, 2, 2]
    np.testing.assert_allclose(totals.kl, terms.kl_by_time.sum(1).cpu())
    np.testing.assert_allclose(totals.elbo, totals.reconstruction - totals.kl)
    assert float(totals.elbo.sum()) == pytest.approx(float(terms.elbo))
    vectorised = by_time(own, observed, particles="vectorised")
    assert float(vectorised.by_time.totals().elbo.sum()) == pytest.approx(float(vectorised.elbo))


def test_a_minibatch_is_not_scaled_up():
    pyro.set_rng_seed(0)
    whole = by_time(*masks())
    pyro.set_rng_seed(0)
    part = by_time(*masks(), size=10 * B)
    torch.testing.assert_close(part.kl_by_time, 10 * whole.kl_by_time)
    for name in ("reconstruction", "kl"):
        values = (terms.by_time.to_xarray()[name] for terms in (part, whole))
        np.testing.assert_allclose(*values)


def test_a_sequence_without_plates():
    def model(x):
        z = pyro.sample("z", MarkovChain(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5), T))
        pyro.sample("x", IndependentSteps(dist.Normal(z, 1.0)), obs=x)

    def guide(x):
        pyro.sample("z", IndependentSteps(dist.Normal(x, 0.6)))

    terms = pe.SequentialELBO().terms(model, guide, torch.zeros(T))
    assert terms.by_time.to_xarray().kl.dims == ("time",)
    assert str(terms.by_time).startswith("ELBO by timestep, nats per frame (6 steps)\n")


def test_a_dataset_of_several_plates_and_of_sites_of_some_steps():
    some = torch.tensor([True, False, True])

    def model(x):
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows, columns:
            z = pyro.sample("z_2", dist.Normal(0.0, 1.0))
            w = pyro.sample("z_5", dist.Normal(z, 1.0).mask(some))
        with rows:
            pyro.sample("x_5", dist.Normal(w.sum(-1, keepdim=True), 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("z_2", dist.Normal(0.5, 1.0))
            pyro.sample("z_5", dist.Normal(0.5, 1.0).mask(some))

    terms = pe.SequentialELBO().terms(model, guide, torch.zeros(2, 1))
    values = terms.by_time.to_xarray()
    assert values.kl.dims == ("time", "rows", "columns")
    assert values.reconstruction.dims == ("time", "rows")
    assert values.time.values.tolist() == [2, 5]
    assert values.kl.sel(time=5).notnull().values.tolist() == [[True, False, True]] * 2
    assert values.kl.sel(time=2).notnull().all()
    assert values.reconstruction.notnull().values.tolist() == [[False] * 2, [True] * 2]
    assert float(terms.by_time.totals().elbo.sum()) == pytest.approx(float(terms.elbo))


# The table


def table(by_time):
    """Title, heads, rows by their label, and what is said below."""
    lines = str(by_time).splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("per sequence"))
    rows = {}
    for line in lines[2 : end + 1]:
        label, _, numbers = line.replace("per sequence", "per-sequence").partition(" ")
        rows[label] = [float(number.replace(",", "")) for number in numbers.split()]
    return lines[0], lines[1].split(), rows, lines[end + 1 :]


def test_a_table_has_means_over_the_sequences_that_have_a_step():
    terms = by_time(*masks()).by_time
    title, heads, rows, below = table(terms)
    assert title == "ELBO by timestep, nats per frame (4 sequences of 1 to 6 steps)"
    assert heads == ["timestep", "frames", "observed", "reconstruction", "KL", "ELBO"]
    assert list(rows) == [*map(str, range(T)), "all", "per-sequence"]
    totals = terms.totals()
    for t in range(T):
        frames, observed, *nats = rows[str(t)]
        step = totals.isel(time=t)
        assert (frames, observed) == (step.frames, step.observed)
        means = [float(step[name] / step.frames) for name in ("reconstruction", "kl", "elbo")]
        assert nats == pytest.approx(means, abs=1e-4)
    assert rows["all"][:2] == [16, 14]
    assert rows["all"][-1] == pytest.approx(float(totals.elbo.sum()) / 16, abs=1e-4)
    assert rows["per-sequence"][-1] == pytest.approx(float(totals.elbo.sum()) / B, abs=1e-4)
    assert not below


def test_a_table_leaves_out_what_is_not_there():
    own = lengths_mask(torch.tensor([4, 4, 4, 4]), T)
    title, heads, rows, _ = table(by_time(own, own).by_time)
    assert title.endswith("(4 sequences of 4 steps)")
    assert "observed" not in heads and list(rows) == ["0", "1", "2", "3", "all", "per-sequence"]
    title, *_ = table(by_time(particles="looped").by_time)
    assert title.endswith("steps, mean over 3 particles)")
    assert table(replace(by_time().by_time, timeless=("w",)))[3] == [
        "The KL of w belongs to no timestep, and is not here."
    ]


@pytest.mark.parametrize("num_steps", [1, 7, 20, 21, 129, 5000])
def test_a_long_table_has_few_rows_the_first_step_its_own(num_steps):
    terms = by_time().by_time
    kl = torch.arange(float(num_steps)).unsqueeze(-1).expand(num_steps, B)
    counts = torch.ones(num_steps, B, dtype=torch.bool)
    long = replace(
        terms, time=tuple(range(num_steps)), kl=kl, reconstruction=-kl, observed=counts, mask=counts
    )
    *_, rows, _ = table(long)
    assert len(rows) <= 22 and rows["0"] == [B, 0, 0, 0]
    steps = 0
    for label in list(rows)[:-2]:
        first, _, last = label.partition("-")
        first, last = int(first), int(last or first)
        assert first == steps
        steps = last + 1
        assert rows[label][0] == B * (steps - first)
        assert rows[label][2] == pytest.approx((first + last) / 2)
    assert steps == num_steps
    assert rows["per-sequence"][1] == pytest.approx(num_steps * (num_steps - 1) / 2)


# Batches of a data set


def test_batches_beside_each_other_are_those_of_the_whole():
    own, observed = masks()
    x = torch.linspace(-1.0, 1.0, B * T).reshape(B, T)
    parts = []
    for rows in (slice(0, 3), slice(3, 4)):
        num = len(x[rows])
        parts.append(by_time(own[rows], observed[rows], num=num, size=7, x=x[rows]).by_time)
    joined = concatenate_by_time(parts)
    assert joined.kl.shape == joined.mask.shape == (T, B)
    torch.testing.assert_close(joined.mask, own.T)
    torch.testing.assert_close(joined.kl[:, :3] * 7 / 3, parts[0].kl)
    values, first = joined.to_xarray(), parts[0].to_xarray()
    assert values.kl.dims == ("time", "sequences")
    np.testing.assert_allclose(values.kl[:, :3], first.kl)
    with pytest.raises(ValueError, match="different timesteps"):
        concatenate_by_time([parts[0], replace(parts[1], time=(0, 1))])
    with pytest.raises(ValueError, match="in a plate at dim -1"):
        concatenate_by_time([replace(part, plates=frozenset()) for part in parts])
