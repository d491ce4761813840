"""Data in batches."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo._rows.batches import Batches, device_of


def test_a_tensor_tensors_a_mapping_and_a_loader_give_the_same_rows():
    x, y = rows(10, 3), rows(10)
    whole = Batches((x, y), 4)
    assert len(whole) == 3 and [(b.start, b.size) for b in whole] == [(0, 4), (4, 4), (8, 2)]
    loader = Batches(DataLoader(TensorDataset(x, y), batch_size=4), 99)
    assert len(loader) == 3
    named = Batches({"x": x, "y": y}, 4)
    for a, b, c in zip(whole, loader, named, strict=True):
        for i, name in enumerate("xy"):
            torch.testing.assert_close(a.args[i], b.args[i])
            torch.testing.assert_close(a.args[i], c.kwargs[name])
    only = next(iter(Batches(x, 4)))
    torch.testing.assert_close(only.args[0], x[:4])


def test_repeated_rows_keep_what_is_no_tensor_of_rows():
    (batch,) = Batches(DataLoader([(1.0, 5), (2.0, 6)], batch_size=2), 1)
    batch = batch._replace(args=(*batch.args, "as it is", torch.ones(3)))
    repeated = batch.repeat(2)
    assert repeated.size == 4 and repeated.args[0].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert repeated.args[2] == "as it is" and len(repeated.args[3]) == 3


def test_batches_go_to_a_device():
    batches = Batches(rows(4, 2).cpu(), 2, device=torch.device("meta"))
    assert all(batch.args[0].device.type == "meta" for batch in batches)
    assert device_of(print, nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(print, nn.ReLU()) is None


@pytest.mark.parametrize("data, cause", [
    (rows(0, 2), "at least one row"), ([rows(2), rows(3)[0]], "one row for each datum"),
    (iter([rows(2)]), "iterated over several times"), (3, "got int"), ([], "at least one row"),
    ([["a"]], "one row for each datum"),
])  # fmt: skip
def test_other_data(data, cause):
    with pytest.raises(ValueError, match=cause):
        list(Batches(data, 2))


X, W, COUNT = rows(7, 2), rows(3), torch.tensor(3)


@pytest.mark.parametrize("data, args, kwargs", [
    ((X, None), (X, None), {}), ((X, None, 2.0), (X, None, 2.0), {}), ((X, "a"), (X, "a"), {}),
    ({"x": X, "n": 1.0}, (), {"x": X, "n": 1.0}), ({"x": X, "w": W}, (), {"x": X, "w": W}),
    ((X, True, COUNT), (X, True, COUNT), {}),
    (((X,), {"w": W, "flag": None}), (X,), {"w": W, "flag": None}),
    ([((X,), {})], (X,), {}), ([(X, None)], (X, None), {}),
    ([{"x": X, "n": 2}], (), {"x": X, "n": 2}),
])  # fmt: skip
def test_constants_beside_the_data(data, args, kwargs):
    """They are given to every batch as they are; rows are those of the first tensor with any."""
    batches = list(Batches(data, 3))
    sizes = [7] if isinstance(data, list) else [3, 3, 1]
    assert [batch.size for batch in batches] == sizes
    for batch in batches:
        expected = (*args, *kwargs.values())
        found = (*batch.args, *batch.kwargs.values())
        assert batch.kwargs.keys() == kwargs.keys() and len(batch.args) == len(args)
        for value, whole in zip(found, expected, strict=True):
            if whole is X:
                torch.testing.assert_close(value, X[batch.start : batch.start + batch.size])
            else:
                assert value is whole


def test_a_function_tells_what_the_arguments_are():
    nested = [{"x": {"a": X}, "n": 3}]
    (batch,) = Batches(nested, 3, arguments=lambda b: ((b["x"]["a"],), {"n": b["n"]}))
    assert batch.args[0] is X and batch.kwargs == {"n": 3} and batch.size == 7
    with pytest.raises(ValueError, match="arguments=, a function"):
        list(Batches(nested, 3))
    first, *_ = Batches(X, 3, arguments=lambda x: (x, None))
    assert first.args[1] is None and len(first.args[0]) == 3


@pytest.mark.slow
def test_reports_take_programs_as_packages_have_them():
    """Constants, nested batches, no arguments at all: the same number from each."""
    x = rows(20)

    def model(x, flag=None, n=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, n))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, flag=None, n=1.0):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    options = {"num_samples": 25, "batch_size": 8, "progress": False}
    nested = {"arguments": lambda batch: (batch["x"]["a"], "flag")}
    closed = [lambda program=program: program(x) for program in (model, guide)]
    for programs, data, more in (
        ((model, guide), (x, None, 1.0), {}), ((model, guide), {"x": x, "n": 1.0}, {}),
        ((model, guide), [((x,), {"n": 1.0})], {}), ((model, guide), [{"x": {"a": x}}], nested),
        (closed, None, {}), (closed, (), {}),
    ):  # fmt: skip
        for report in (pe.evidence, pe.psis):
            found = report(*programs, data, **options, **more).log_evidence
            torch.testing.assert_close(found, exact)
        checked = pe.check(*programs, data, **options, **more)
        assert checked.surgery.num_data == 20 and checked.findings[0].verdict == "fine"
        gap = pe.inference_gap(*programs, data, steps=2, **options, **more)
        assert gap.total.abs().max() < 0.1


def test_no_latents_and_none_that_the_guide_draws():
    """log p(x) where the model sums all latents out, or has none."""
    x = rows(9)
    weights, loc = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.0])

    def summed_out(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    def without(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    mixture = dist.Categorical(weights), dist.Normal(loc, 1.0)
    for model, exact in (
        (summed_out, dist.MixtureSameFamily(*mixture)), (without, dist.Normal(0.0, 1.0)),
    ):  # fmt: skip
        for report in (pe.evidence, pe.psis):
            found = report(model, lambda x: None, x, num_samples=25, progress=False)
            torch.testing.assert_close(found.log_evidence, exact.log_prob(x))
        with pytest.raises(ValueError, match="draws no latent"):
            pe.inference_gap(model, lambda x: None, x, progress=False)
        with pytest.raises(ValueError, match="no latent site"):
            pe.surgery(model, lambda x: None, x, progress=False)
