"""Laws that hold of all results, whatever they are of."""

import copy
import pickle
import re
import warnings
from dataclasses import is_dataclass, replace
from functools import cache
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers import conjugate
from helpers.oracles import rows
from matplotlib import pyplot as plt
from pyro.infer.autoguide import AutoNormal

import pyproelbo as pe
from pyproelbo._results.result import Result

QUIET = {"progress": False}


def programs():
    return conjugate.model, conjugate.guide_of(0.4), rows(30)


def evidence():
    return pe.evidence(*programs(), num_samples=20, **QUIET)


def annealed():
    """Of one draw, whose errors are not known, with moves."""
    options = {"method": pe.Annealed(4, 2, num_pilot=5), "num_samples": 1}
    return pe.evidence(*programs(), **options, **QUIET)


def psis():
    return pe.psis(*programs(), num_samples=50, **QUIET)


def moments():
    return pe.moments(*programs(), num_samples=50, **QUIET)


def gradient_noise():
    x = rows(4)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 0.8))

    return pe.gradient_noise(conjugate.model, guide, x, num_samples=20, batch_size=2, **QUIET)


def repair():
    """With one that fails, for want of time, and ways that are none."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 9.0 * (x > 1), 0.7))

    return pe.repair(conjugate.model, guide, rows(30), max_time=1e-9, **QUIET)


def linear_response():
    def model():
        pyro.sample(
            "z", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1, 0.9], [0.9, 1]]))
        )
        pyro.sample("rate", dist.Gumbel(0.0, 1.0))

    return pe.linear_response(model, AutoNormal(model), None, num_samples=20, **QUIET)


def sensitivity():
    """With a datum far from all others, and a hyperparameter."""

    def model(x):
        m = pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    x = torch.cat([rows(11), torch.tensor([9.0])])
    return pe.sensitivity(model, AutoNormal(model), x, num_samples=20, **QUIET)


def of_data_set(name):
    """A report whose one row is the data set, and whose prior is improper."""

    def model(x):
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(x.mean() + 0.5, 0.3))

    return getattr(pe, name)(model, guide, rows(8), num_samples=50, **QUIET)


def fisher_divergence():
    return pe.fisher_divergence(*programs(), num_samples=20, **QUIET)


def of_mean():
    """A program with one global latent, its guide, and data."""

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    return model, AutoNormal(model), rows(8)


def fit():
    options = {"method": pe.Stochastic(lr=0.05, least_steps=20), "tolerance": 1.0}
    return pe.fit(*of_mean(), **options, **QUIET)


def fit_out_of_time():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pe.NotConvergedWarning)
        return pe.fit(*of_mean(), max_time=1e-6, **QUIET)


def history():
    return fit().history


def repair_by_level():
    of = conjugate.Hierarchy.of(6)
    options = {"num_samples": 100, "num_nested": 3, "steps": 9, **QUIET}
    return pe.repair(of.model, of.guide(4.0), of.x, level="both", **options)


def psis_of_data_set():
    return of_data_set("psis")


def evidence_of_data_set():
    return of_data_set("evidence")


def moments_of_data_set():
    return of_data_set("moments")


def decompositions_of_data_set():
    return of_data_set("decompositions")


def gap_of_data_set():
    return of_data_set("inference_gap")


def check_of_data_set():
    return of_data_set("check")


def decompositions():
    return pe.decompositions(*programs(), num_samples=20, **QUIET)


def inference_gap():
    return pe.inference_gap(*programs(), steps=2, num_samples=20, **QUIET)


def surgery():
    return pe.surgery(*programs(), **QUIET)


def surgery_part():
    return pe.surgery_part(*programs(), range(10, 20), **QUIET)


def collapsed():
    return pe.surgery(conjugate.model, lambda x: conjugate.guide_of(1.0)(0 * x), rows(30), **QUIET)


def calibration():
    def simulate():
        with pyro.plate("data", 60):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0))

    return pe.calibration(conjugate.model, conjugate.guide_of(0.2), simulate, num_samples=50)


def calibration_by_refits():
    def model(x=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            return pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    return pe.calibration(model, guide, model, refit=pe.Refit(3, steps=2), num_samples=20)


def check():
    return pe.check(*programs(), num_samples=50, **QUIET)


def convergence():
    return pe.convergence(np.random.default_rng(0).normal(size=100))


def convergences():
    return pe.convergence(np.random.default_rng(0).normal(size=(100, 3)))


def loo():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("columns", 4, dim=-1), pyro.plate("rows", 5, dim=-2):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.mean(), 0.2))

    return pe.loo(pe.from_svi(model, guide, (rows(5, 4),), num_samples=50, **QUIET))


def by_time():
    def model(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_0", dist.Normal(0.0, 1.0))
            z = pyro.sample("z_1", dist.Normal(z, 1.0))
            pyro.sample("x_1", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_0", dist.Normal(0.3 * x, 1.0))
            pyro.sample("z_1", dist.Normal(z, 1.0))

    objective = pe.SequentialELBO(time=lambda name: None if name == "w" else int(name[-1]))
    by_time = objective.terms(model, guide, rows(6)).by_time
    assert by_time is not None
    return by_time


def usage():
    far = dist.Normal(torch.tensor([-90.0, 0.0, 90.0]).unsqueeze(1), 1.0).to_event(1)
    codes = torch.tensor([[-90.0], [90.0]])
    return pe.priors.usage(pe.priors.Mixture(far), codes)


KINDS = (
    evidence,
    annealed,
    psis,
    decompositions,
    inference_gap,
    surgery,
    surgery_part,
    collapsed,
    calibration,
    calibration_by_refits,
    check,
    convergence,
    convergences,
    loo,
    by_time,
    usage,
    moments,
    repair,
    repair_by_level,
    fisher_divergence,
    fit,
    fit_out_of_time,
    history,
    gradient_noise,
    linear_response,
    sensitivity,
    psis_of_data_set,
    evidence_of_data_set,
    moments_of_data_set,
    decompositions_of_data_set,
    gap_of_data_set,
    check_of_data_set,
)
WITH_NOTES = (
    collapsed,
    calibration,
    check,
    convergence,
    convergences,
    by_time,
    usage,
    gradient_noise,
    linear_response,
    sensitivity,
    repair,
    fit_out_of_time,
)


@cache
def made(make):
    return make()


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def result(request):
    return made(request.param)


class Texts(HTMLParser):
    """The texts between the tags of a page, and which tags there are."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags = [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.texts.append(data)


def datasets(data):
    """The dataset, or those of a tree."""
    if isinstance(data, xarray.DataTree):
        return [node.to_dataset() for node in data.subtree]
    assert isinstance(data, xarray.Dataset)
    return [data]


def test_these_are_all_of_the_results():
    kinds = {type(made(make)) for make in KINDS}
    assert kinds == set(Result.__subclasses__()) and len(kinds) == 20
    for kind in kinds:
        assert is_dataclass(kind) and not kind.__subclasses__()
    with pytest.raises(TypeError, match="abstract"):
        Result()


def test_a_result_has_a_figure(result):
    with matplotlib.rc_context({"backend": "Agg"}):
        ax = result.plot()
        assert ax.has_data() and (ax.get_xlabel() or ax.get_ylabel())
        ax.figure.canvas.draw()
        assert result.plot(ax=ax) is ax
        plt.close("all")


def test_a_result_prints_its_table_and_its_notes(result):
    text = str(result)
    assert repr(result) == text and f"{result}" == text
    assert isinstance(result.notes, list)
    for note in result.notes:
        assert isinstance(note, str) and text.count(note) >= 1
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("make", WITH_NOTES, ids=lambda make: make.__name__)
def test_some_results_have_notes(make):
    assert made(make).notes


def test_a_result_is_equal_to_itself_alone(result):
    other = replace(result)
    assert (result == result, result != result) == (True, False)
    assert (result == other, result != other) == (False, True)
    assert len({result, other, result}) == 2 and result in [other, result]


def test_no_error_is_said_to_be_0(result):
    text = str(result)
    assert not re.search(r"± *0(\.0*)?(?![.\d])", text)
    assert "nan" not in text


def test_html_says_the_same(result):
    page = Texts(result._repr_html_())
    assert page.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    for table, notes in result._sections():
        expected = [table.title, *table.heads, *notes, *(row.label.strip() for row in table.rows)]
        assert set(filter(None, expected)) <= set(page.texts)
    words = " ".join(page.texts).split()
    assert sorted(words) == sorted(str(result).split())


def test_labels_are_no_html():
    dims = ("<script>z", *made(calibration).dims[1:])
    result = replace(made(calibration), dims=dims)
    assert "<script>" not in result._repr_html_() and "&lt;script&gt;z" in result._repr_html_()


def test_xarray_has_the_units(result, tmp_path):
    data = result.to_xarray()
    for dataset in datasets(data):
        for name, value in dataset.data_vars.items():
            if value.dtype.kind == "f":
                assert isinstance(value.attrs.get("units"), str), name
            if str(name).endswith("_stderr"):
                of = dataset[str(name).removesuffix("_stderr")]
                assert (of.dims, of.units) == (value.dims, value.units)
    data.to_netcdf(tmp_path / "result.nc", engine="h5netcdf")


def saved(result, path):
    result.save(path)
    return pe.load_result(path)


def test_copies_say_the_same(result, tmp_path):
    copies = pickle.loads(pickle.dumps(result)), copy.copy(result), copy.deepcopy(result)
    for other in (*copies, saved(result, tmp_path / "result.npz")):
        assert str(other) == str(result) and type(other) is type(result)
        before, after = (datasets(r.to_xarray()) for r in (result, other))
        assert len(before) == len(after)
        for one, two in zip(before, after, strict=True):
            xarray.testing.assert_identical(one, two)


# What single ones hand on


def test_evidence_by_datum():
    result, data = made(evidence), made(evidence).to_xarray()
    assert data.sizes == {"datum": 30} and data.log_evidence.units == "nats"
    np.testing.assert_array_equal(data.log_evidence_stderr, result.stderr)
    np.testing.assert_array_equal(data.elbo_stderr, result.elbo_stderr)
    assert "acceptance" not in data and "acceptance" in made(annealed).to_xarray()


def test_loo_by_its_plates():
    result, data = made(loo), made(loo).to_xarray()
    assert data.pointwise.dims == data.khat.dims == ("rows", "columns")
    assert float(data.elpd) == result.elpd and float(data.elpd_stderr) == result.stderr
    assert float(data.pointwise.sum()) == pytest.approx(result.elpd)


def test_convergence_by_quantity():
    result, data = made(convergences), made(convergences).to_xarray()
    assert data.sizes == {"quantity": 3} and data.attrs["window"] == 50
    np.testing.assert_array_equal(data.mean_stderr, result.mcse)


def test_a_check_hands_on_its_parts_and_its_verdict():
    result, tree, json = made(check), made(check).to_xarray(), made(check).as_json()
    assert set(tree.children) == {"decompositions", "psis", "moments", "fisher", "surgery"}
    assert tree.attrs["verdict"] == json["verdict"]
    found = zip(tree.verdicts.values, tree.findings.values, strict=True)
    assert [{"verdict": v, "text": t} for v, t in found] == json["findings"]
    for name in ("elbo", "log_evidence", "posterior_kl"):
        assert float(tree["decompositions"][name]) == json[name]
    assert tree["psis"].khat.values.tolist() == json["khat"]
    assert float(tree["psis"].joint_khat) == json["joint_khat"]
    assert float(tree["surgery"].elbo) == result.surgery.elbo
    alone = replace(result, surgery=None, skipped="for a reason").to_xarray()
    assert set(alone.children) == {"decompositions", "psis", "moments", "fisher"}
    assert alone.attrs["skipped"] == "for a reason"


def test_an_evidence_of_one_draw_does_not_know_its_error():
    lines = str(made(annealed)).splitlines()
    assert lines[1].endswith("± unknown") and lines[2].endswith("± unknown")


def test_the_bound_on_mutual_information_is_beside_it():
    (line,) = (line for line in str(made(surgery)).splitlines() if "mutual" in line)
    assert line.endswith(f"(log N = {np.log(30):.4f})")
