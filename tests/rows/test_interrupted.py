"""Reports that are interrupted, or fail: what is finished is there, and is what it is by itself."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers.conjugate import Hierarchy
from torch.testing import assert_close

import pyproelbo as pe
from pyproelbo._surgery import drawing, of_sums, points

N, BATCH = 14, 4
OPTIONS = {"seed": 2, "progress": False}


def normal(x):
    return dist.Normal(0.4 * x[..., :2], 0.8).to_event(1)


def flow(x):
    shift = dist.transforms.AffineTransform(0.4 * x[..., :2], 0.8, event_dim=1)
    base = dist.Normal(torch.zeros_like(x[..., :2]), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [shift])


def programs(q):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([z, z.sin()], -1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return model, guide


class Disk(Exception):
    """What is not expected."""


class Stopping:
    """A program that raises an error at one of its calls, by their number."""

    def __init__(self, program, at=None, error=KeyboardInterrupt):
        self.program, self.at, self.error, self.calls = program, at, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.program(*args, **kwargs)


def gap(model, guide, x, **options):
    counts = {"steps": 3, "num_particles": 2, "num_samples": 30}
    return pe.inference_gap(model, guide, x, **counts, **options)


REPORTS = {
    "evidence": lambda *a, **k: pe.evidence(*a, num_samples=30, **k),
    "psis": lambda *a, **k: pe.psis(*a, num_samples=30, **k),
    "decompositions": lambda *a, **k: pe.decompositions(*a, num_samples=30, **k),
    "inference_gap": gap,
    "surgery": lambda *a, **k: pe.surgery(*a, num_samples=2, **k),
}


def values(result):
    """All numbers of a result; the joint k-hat is of all of its data."""
    return {name: torch.as_tensor(v.values.copy()) for name, v in result.to_xarray().items()}


@pytest.mark.parametrize("posterior", [normal, flow])
@pytest.mark.parametrize("name", REPORTS)
def test_ctrl_c_leaves_the_report_of_the_first_data(name, posterior):
    """Wherever it comes."""
    torch.manual_seed(0)
    x, report = torch.randn(N, 4), REPORTS[name]
    model, guide = programs(posterior)
    counting = Stopping(guide)
    report(model, counting, x, batch_size=BATCH, **OPTIONS)
    sizes = set()
    for at in range(2, counting.calls + 1, max(1, counting.calls // 6)):
        stopping = Stopping(guide, at)
        try:
            with pytest.warns(pe.UnfinishedWarning, match=f"the {name} covers only the first"):
                part = report(model, stopping, x, batch_size=BATCH, **OPTIONS)
        except KeyboardInterrupt:
            assert not sizes or name == "surgery"  # before the first part of all, or of q(z)
            continue
        found = part.to_xarray()
        num = found.attrs.get("num_data", found.sizes.get("datum"))
        expected = values(report(model, guide, x[:num], batch_size=BATCH, **OPTIONS))
        assert_close(values(part), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        sizes.add(num)
    assert len(sizes) > 1 or name == "surgery"
    assert sizes and sizes <= {4, 8, 12, 14}


@pytest.mark.parametrize("name", REPORTS)
def test_an_error_has_what_was_finished(name):
    torch.manual_seed(0)
    x, report = torch.randn(N, 4), REPORTS[name]
    model, guide = programs(flow)
    counting = Stopping(guide)
    report(model, counting, x, batch_size=BATCH, **OPTIONS)
    failing = Stopping(guide, counting.calls, Disk)
    with pytest.raises(Disk) as caught:
        report(model, failing, x, batch_size=BATCH, **OPTIONS)
    assert f"`{name}`" in "".join(caught.value.__notes__)
    part = getattr(caught.value, name).to_xarray()
    assert part.attrs.get("num_data", part.sizes.get("datum")) < N


def test_a_calibration_of_fewer_draws():
    model, guide = programs(normal)

    def simulate():
        with pyro.plate("data", 20):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return dist.Normal(torch.cat([z, z.sin()], -1), 1.0).sample()

    whole = {"num_samples": 12, "chunk": 1, **OPTIONS}
    counting = Stopping(guide)
    pe.calibration(model, counting, simulate, **whole)
    stopping = Stopping(guide, counting.calls - 4)
    with pytest.warns(pe.UnfinishedWarning, match="first 7 draws for each"):
        part = pe.calibration(model, stopping, simulate, **whole)
    expected = pe.calibration(model, guide, simulate, **{**whole, "num_samples": 7})
    assert torch.equal(part.ranks, expected.ranks)
    assert part.num_samples == 7
    with pytest.raises(Disk) as caught:
        pe.calibration(model, Stopping(guide, counting.calls - 4, Disk), simulate, **whole)
    assert torch.equal(caught.value.calibration.ranks, expected.ranks)


def global_latent():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.mean(), 0.3))

    return model, guide, torch.randn(6)


def test_draws_that_ended_early():
    """Interrupted anywhere: each group has its first draws, and those of one z belong together."""
    model, guide, x = global_latent()
    options = {"num_samples": 6, "chunk": 1, **OPTIONS}
    counting = Stopping(model)
    whole = pe.from_svi(counting, guide, (x,), **options)
    ends = []
    for at in range(2, counting.calls + 1):
        try:
            with pytest.warns(pe.UnfinishedWarning, match="these draws and no others"):
                part = pe.from_svi(Stopping(model, at), guide, (x,), **options)
        except KeyboardInterrupt:
            assert not ends
            continue
        for group in set(part.children) - {"observed_data"}:
            num = part[group].sizes["draw"]
            xarray.testing.assert_equal(
                part[group].to_dataset(), whole[group].to_dataset().isel(draw=slice(num))
            )
        assert len({part[g].sizes["draw"] for g in ("posterior", "log_q", "sample_stats")}) == 1
        ends.append(len(part.children))
    assert ends == sorted(ends)
    assert ends[0] < len(whole.children) == ends[-1]
    with pytest.raises(Disk) as caught:
        pe.from_svi(Stopping(model, counting.calls // 2, Disk), guide, (x,), **options)
    assert "posterior" in caught.value.from_svi.children


def test_a_check_of_the_first_data():
    """All of its parts are of the same data, and it says that it has not seen the rest."""
    torch.manual_seed(0)
    x, options = torch.randn(N, 4), {"num_samples": 30, "batch_size": BATCH, **OPTIONS}
    model, guide = programs(normal)
    counting = Stopping(guide)
    pe.check(model, counting, x, **options)
    sizes = set()
    for at in range(2, counting.calls + 1, max(1, counting.calls // 9)):
        try:
            with pytest.warns(pe.UnfinishedWarning, match="the (check|surgery) covers only the"):
                part = pe.check(model, Stopping(guide, at), x, **options)
        except KeyboardInterrupt:
            assert not sizes
            continue
        num = len(part.psis.khat)
        assert len(part.moments.khat) == part.decompositions.num_data == num
        whole = pe.check(model, guide, x[:num], **options)
        assert_close(part.psis.khat, whole.psis.khat, rtol=1e-5, atol=1e-5)
        assert part.decompositions.elbo.value == pytest.approx(whole.decompositions.elbo.value)
        if part.surgery is None:
            assert part.verdict != "fine" and "interrupted" in str(part)
        sizes.add(num)
    assert len(sizes) > 2 and N in sizes
    with pytest.raises(Disk) as caught:
        pe.check(model, Stopping(guide, counting.calls, Disk), x, **options)
    assert len(caught.value.check.psis.khat) == N


@pytest.mark.parametrize("level", ["global", "local"])
@pytest.mark.parametrize("name", ["evidence", "psis", "moments"])
def test_reports_by_level(name, level, monkeypatch):
    """Of the first draws of the global latents."""
    of, report = Hierarchy.of(6), getattr(pe, name)
    monkeypatch.setattr("pyproelbo._rows.levels.ROWS", 6 * 3)
    options = {"level": level, "num_samples": 40, "num_nested": 3, **OPTIONS}
    counting = Stopping(of.guide())
    report(of.model, counting, of.x, **options)
    with pytest.warns(pe.UnfinishedWarning, match="first .* draws of the global latents"):
        part = report(of.model, Stopping(of.guide(), counting.calls - 5), of.x, **options)
    if level == "global":
        assert 25 <= part.num_samples < 40
        expected = report(
            of.model, of.guide(), of.x, **{**options, "num_samples": part.num_samples}
        )
        assert_close(values(part), values(expected), rtol=1e-9, atol=1e-9)
    with pytest.raises(KeyboardInterrupt):
        report(of.model, Stopping(of.guide(), 5), of.x, **options)


def stopping(of, at, error):
    """A function that raises an error at one of its calls, by their number."""
    calls = itertools.count(1)

    def called(*args):
        if next(calls) == at:
            raise error
        return of(*args)

    return called


@pytest.mark.parametrize("max_pairs", [None, 120 * 400])
@pytest.mark.parametrize("name", ["normal_marginals", "estimates_of"])
def test_the_last_steps_of_a_surgery(name, max_pairs, monkeypatch):
    """Ctrl-C there, or an error: all that does not need the step is what it is."""
    x, options = torch.randn(400, 4), {"max_pairs": max_pairs, **OPTIONS}
    whole, of = pe.surgery(*programs(normal), x, **options), getattr(of_sums, name)
    monkeypatch.setattr(of_sums, name, stopping(of, 1, KeyboardInterrupt))
    is_last = name == "estimates_of"  # which is made again
    what = "whole" if is_last else "without the marginals"
    with pytest.warns(pe.UnfinishedWarning, match=f"the surgery is {what}"):
        part = pe.surgery(*programs(normal), x, **options)
    lacking = {"total_correlation", "dimension_wise_kl", "marginal_kl_per_dim"}
    lacking |= {f"{name}_stderr" for name in lacking}
    assert values(whole).keys() - values(part).keys() == (set() if is_last else lacking)
    covariates = max_pairs is not None and not is_last  # of which the marginals are one
    for key, value in values(part).items():
        of_q = covariates and key.startswith(("mutual", "marginal"))
        assert_close(value, values(whole)[key], rtol=0, atol=0.1 if of_q else 1e-12)
    assert part.num_data == 400 and part.num_points == whole.num_points
    if not is_last:
        assert part.total_correlation is None and "unknown" not in str(part)
        monkeypatch.setattr(of_sums, name, stopping(of, 1, Disk))
        with pytest.raises(Disk) as caught:
            pe.surgery(*programs(normal), x, **options)
        assert caught.value.surgery.elbo == whole.elbo
        assert caught.value.surgery.dimension_wise_kl is None


@pytest.mark.parametrize("posterior", [normal, flow])
def test_a_surgery_at_fewer_points(posterior, monkeypatch):
    """All of it is of all data; q(z) is evaluated at those points that were finished."""
    monkeypatch.setattr(points, "_AT_ONCE", 100)
    x = torch.randn(900, 4)
    model, guide = programs(posterior)
    options = {"max_pairs": 500 * 900, "batch_size": 300, **OPTIONS}
    whole, of = pe.surgery(model, guide, x, **options), drawing.data_parts
    for error in (KeyboardInterrupt, Disk):
        monkeypatch.setattr(drawing, "data_parts", stopping(of, 4, error))
        if error is Disk:
            with pytest.raises(Disk) as caught:
                pe.surgery(model, guide, x, **options)
            part = caught.value.surgery
        else:
            with pytest.warns(pe.UnfinishedWarning, match="the first 300 of 500 points"):
                part = pe.surgery(model, guide, x, **options)
        assert (part.num_data, part.num_points, whole.num_points) == (900, 300, 500)
        assert part.elbo == whole.elbo and part.average_kl == whole.average_kl
        error = whole.stderr["mutual_information"] + part.stderr["mutual_information"]
        assert abs(part.mutual_information - whole.mutual_information) < 3 * error
        assert part.mutual_information + part.marginal_kl == pytest.approx(part.average_kl)
    monkeypatch.setattr(drawing, "data_parts", stopping(of, 1, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pe.surgery(model, guide, x, **options)


@pytest.mark.parametrize("max_pairs", [None, 120 * 150 * 5])
def test_a_surgery_of_fewer_draws_of_the_global_latents(max_pairs):
    """Those that were finished, each of all data."""
    of = Hierarchy.of(150)
    options = {"site": "z", "num_nested": 5, "max_pairs": max_pairs, **OPTIONS}
    counting = Stopping(of.guide())
    whole = pe.surgery(of.model, counting, of.x, **options)
    with pytest.warns(pe.UnfinishedWarning, match="the first 3 draws of the global latents"):
        part = pe.surgery(of.model, Stopping(of.guide(), counting.calls * 7 // 10), of.x, **options)
    assert (part.num_globals, part.num_data, whole.num_globals) == (3, 150, 5)
    fewer = {"num_nested": 3} | ({} if max_pairs is None else {"max_pairs": 120 * 150 * 3})
    expected = pe.surgery(of.model, of.guide(), of.x, **options | fewer)
    assert_close(values(part), values(expected))
    with pytest.raises(Disk) as caught:
        pe.surgery(of.model, Stopping(of.guide(), counting.calls * 7 // 10, Disk), of.x, **options)
    assert caught.value.surgery.num_globals == 3
