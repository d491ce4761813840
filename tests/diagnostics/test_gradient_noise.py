"""Signal and noise of gradients, against closed forms, quadrature and enumeration.

Everywhere z ~ N(0, 1), x | z ~ N(z, 1) and q = N(m, s) with s = exp(r), z = m + s e, or what is
made of that. For one datum, with a = m - x, gradients in (m, r) are

    log p(x | z)    -(a + s e) (1, s e)
    log p(z)        -(m + s e) (1, s e)
    -log q(z)       (0, 1), and (e / s, e^2) through the draw alone
    -KL             -(m, s^2 - 1)
"""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from pyro import poutine
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

import pyproelbo as pe
from pyproelbo._diagnostics import gradient_noise as module

X, M, R = 1.7, 0.4, -0.3
S, A = math.exp(R), M - X
QUIET = {"progress": False}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(nn.Module):
    """q, of a loc and a log scale that all rows share."""

    def __init__(self, m=M, r=R):
        super().__init__()
        self.m, self.r = (nn.Parameter(torch.tensor(value)) for value in (m, r))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.m, self.r.exp()))


ONE = torch.tensor([X], dtype=torch.float64)


def linear(c0, c1, c2):
    """The signal and noise of (c0 + c1 e + c2 e^2), e ~ N(0, 1)."""
    return np.array([(c0 + c2) ** 2, c1**2 + 2 * c2**2])


def of_gradient(weight_x, weight_z, weight_q, path=False, closed=False):
    """Signal and noise in (m, r) of a sum of terms with weights, by the docstring above."""
    centre, slope = weight_x * A + weight_z * M, weight_x + weight_z
    of_m, of_r = [-centre, -slope * S, 0.0], [0.0, -centre * S, -slope * S**2]
    if closed:
        of_m[0] -= weight_q * M
        of_r[0] -= weight_q * (S**2 - 1)
    elif path:
        of_m[1] += weight_q / S
        of_r[2] += weight_q
    else:
        of_r[0] += weight_q
    return np.stack([linear(*of_m), linear(*of_r)])


EXACT = {
    ("auto", "log_likelihood x"): of_gradient(1, 0, 0),
    ("auto", "kl z"): of_gradient(0, 0, 1, closed=True),
    ("auto", "total"): of_gradient(1, 0, 1, closed=True),
    ("sampled", "log_likelihood x"): of_gradient(1, 0, 0),
    ("sampled", "kl z"): of_gradient(0, 1, 1),
    ("sampled", "log_prior z"): of_gradient(0, 1, 0),
    ("sampled", "log_q z"): of_gradient(0, 0, 1),
    ("sampled", "total"): of_gradient(1, 1, 1),
    ("path", "log_likelihood x"): of_gradient(1, 0, 0),
    ("path", "kl z"): of_gradient(0, 1, 1, path=True),
    ("path", "log_prior z"): of_gradient(0, 1, 0),
    ("path", "log_q z"): of_gradient(0, 0, 1, path=True),
    ("path", "total"): of_gradient(1, 1, 1, path=True),
}


def by_quadrature():
    """Signal and noise of the score function's gradients, in (m, r)."""
    e, w = np.polynomial.hermite_e.hermegauss(60)
    w, z, half = w / w.sum(), M + S * e, 0.5 * math.log(2 * math.pi)
    terms = {
        "log_likelihood x": -((z - X) ** 2) / 2 - half,
        "log_prior z": -(z**2) / 2 - half,
        "log_q z": e**2 / 2 + R + half,
    }
    terms["kl z"] = terms["log_prior z"] + terms["log_q z"]
    terms["total"] = terms["log_likelihood x"] + terms["kl z"]
    found = {}
    for name, f in terms.items():
        gradients = np.stack([f * e / S, f * (e**2 - 1)])
        mean = gradients @ w
        found["score", name] = np.stack([mean**2, (gradients - mean[:, None]) ** 2 @ w], 1)
    return found


def is_close(value, stderr, exact):
    value, stderr, exact = (float(x) for x in (value, stderr, exact))
    return abs(value - exact) <= 4 * stderr + 1e-9 * (1 + abs(exact))


def check(found, exact, scale=(1.0, 1.0), parameters="guide"):
    """Signal and noise of each term, where parameters are (m, r / scale)."""
    data = found.to_xarray().sel(parameters=parameters)
    for (estimator, term), parts in exact.items():
        one = data.sel(estimator=estimator, term=term)
        signal, noise = (parts * np.square(scale)[:, None]).sum(0)
        assert is_close(one.signal, one.signal_stderr, signal), (estimator, term, "signal")
        assert is_close(one.noise, one.noise_stderr, noise), (estimator, term, "noise")
        assert (one.snr == 0) == np.isnan(one.snr_stderr) or signal == 0 or noise < 1e-12
        if noise > 1e-12 and one.signal > 4 * one.signal_stderr:  # else it is no linear function
            snr = math.sqrt(signal / noise)
            assert is_close(one.snr, one.snr_stderr, snr), (estimator, term, "snr")


@pytest.fixture(scope="module")
def one():
    with pyro.validation_enabled():
        torch.set_default_dtype(torch.float64)
        return pe.gradient_noise(model, Guide(), ONE, num_samples=400, **QUIET)


def test_closed_forms_and_quadrature(one):
    assert one.estimators == ("auto", "sampled", "path", "score")
    assert (one.parameters, one.analytic, one.of_rows) == (("guide", "all"), ("z",), None)
    check(one, EXACT | by_quadrature())
    check(one, EXACT | by_quadrature(), parameters="all")


def test_errors_are_those_of_so_many_draws(one):
    """var |g - E g|^2 / R by quadrature, of the sampled estimator; a jackknife of 20 groups."""
    e, w = np.polynomial.hermite_e.hermegauss(60)
    w, c = w / w.sum(), A + M
    square = (2 * S * e) ** 2 + (c * S * e + 2 * S**2 * (e**2 - 1)) ** 2
    exact = math.sqrt((w @ square**2 - (w @ square) ** 2) / 400)
    error = float(one.noise_stderr[one.estimators.index("sampled"), -1, -1])
    assert 0.5 < error / exact < 1.6


def test_shares_add_up(one):
    data = one.to_xarray().sel(parameters="guide")
    tops = ["log_likelihood x", "kl z"]
    np.testing.assert_allclose(data.share.sel(term=tops).sum("term"), 1.0)
    sampled = data.sel(estimator=["sampled", "path", "score"])
    parts = sampled.share.sel(term=["log_prior z", "log_q z"]).sum("term")
    np.testing.assert_allclose(parts, sampled.share.sel(term="kl z"))
    # cov(x, total) of (sampled): -(a + s e) (1, s e) with -(a + m + 2 s e) (1, s e)
    common = 2 * S**2 + A * (A + M) * S**2 + 4 * S**4
    share = common / EXACT["sampled", "total"][:, 1].sum()
    x = data.sel(estimator="sampled", term="log_likelihood x")
    assert is_close(x.share, x.share_stderr, share)


def test_the_sentence_of_advice(one):
    noise = {name: EXACT[name, "total"][:, 1].sum() for name in ("auto", "sampled", "path")}
    assert noise["path"] < 0.8 * noise["auto"]
    ratio = one.ratio[one.estimators.index("path"), 0]
    error = one.ratio_stderr[one.estimators.index("path"), 0]
    assert is_close(ratio, error, noise["path"] / noise["auto"])
    (note,) = one.notes
    assert note.startswith("Take the path gradient, ImportanceWeightedELBO(1, gradient='path')")
    assert "in the guide's parameters has 0.2" in note
    assert note.endswith("times the noise that kl='auto' has.")


def test_no_advice_where_nothing_is_gained():
    def far(x):  # the path gradient has more noise, and the KL is a small part
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    found = pe.gradient_noise(far, Guide(0.0, 0.0), ONE, num_samples=40, **QUIET)
    assert found.notes == []


def test_the_closed_form_is_advised_where_it_helps():
    def wide(x):  # no data to speak of: the closed form has all of the gradient
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 9.0), obs=x)

    found = pe.gradient_noise(wide, Guide(0.5, 0.4), ONE, num_samples=60, **QUIET)
    (note,) = found.notes
    assert "kl='auto', the default, with the closed-form KL of z" in note
    assert note.endswith("times the noise that kl='sampled' has.")


def test_the_path_gradient_has_no_noise_at_the_posterior():
    guide = Guide(X / 2, 0.5 * math.log(0.5))
    found = pe.gradient_noise(model, guide, ONE, num_samples=30, **QUIET)
    data = found.to_xarray().sel(parameters="guide", term="total", estimator="path")
    assert float(data.noise) == float(data.signal) == 0.0
    assert float(found.ratio[found.estimators.index("path"), 0]) == 0.0
    data = found.to_xarray().sel(parameters="guide", term="kl z", estimator="auto")
    assert float(data.noise) == 0.0 and math.isinf(data.snr)
    assert "nan" not in str(found)


def test_parameters_of_the_store_are_unconstrained_ones():
    def guide(x):
        m = pyro.param("m", torch.tensor(M))
        s = pyro.param("s", torch.tensor(S), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, s))

    found = pe.gradient_noise(model, guide, ONE, num_samples=200, seed=1, **QUIET)
    check(found, EXACT)
    assert not list(pyro.get_param_store().keys())  # which were made in the report alone


def test_an_auto_guide():
    """Of an auxiliary site, whose scale is a softplus."""
    guide = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={
        "z": torch.tensor([M])}), init_scale=S)  # fmt: skip
    guide(ONE)
    found = pe.gradient_noise(model, guide, ONE, num_samples=200, **QUIET)
    assert found.estimators == ("sampled", "path", "score")
    names = {"log_q z": "log_q z_unconstrained"}
    exact = {(e, names.get(t, t)): v for (e, t), v in EXACT.items() if e != "auto"}
    slope = -math.expm1(-S) / S  # d r / d u, of exp(r) = log(1 + exp(u))
    check(found, exact, (1.0, slope))


@pytest.mark.parametrize("make", [AutoMultivariateNormal, AutoIAFNormal])
def test_estimators_of_joint_guides_have_one_mean(make):
    def joint(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    torch.manual_seed(0)
    guide, x = make(joint), torch.tensor([0.3, -0.6, 1.0])
    found = pe.gradient_noise(joint, guide, x, num_samples=100, **QUIET)
    assert found.estimators == ("sampled", "path", "score")
    signal, error = found.signal[:, 0, -1], found.signal_stderr[:, 0, -1]
    assert (signal[1:] - signal[0]).abs().le(4 * (error[1:] + error[0])).all()
    assert ("kl", guide.__class__.__name__) not in found.terms
    parts = {kind for (kind, _), key in zip(found.terms, found.within, strict=True) if key}
    assert parts == {"log_prior", "log_q"}


def bernoulli(x, q=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class BernoulliGuide(nn.Module):
    def __init__(self, infer=None):
        super().__init__()
        self.logit, self.infer = nn.Parameter(torch.tensor(0.6)), infer or {}

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logit), infer=self.infer)


def bernoulli_exact():
    """By the two values of z: each term times the slope of log q(z), which is z - p."""
    p, values = torch.tensor(0.6).sigmoid(), torch.tensor([0.0, 1.0])
    q = dist.Bernoulli(p)
    terms = {
        "log_likelihood x": dist.Normal(values, 1.0).log_prob(torch.tensor(X)),
        "log_prior z": dist.Bernoulli(0.3).log_prob(values),
        "log_q z": -q.log_prob(values),
    }
    terms["kl z"] = terms["log_prior z"] + terms["log_q z"]
    terms["total"] = terms["log_likelihood x"] + terms["kl z"]
    weight, found = q.log_prob(values).exp(), {}
    for name, f in terms.items():
        gradient = f * (values - p)
        mean = (weight * gradient).sum()
        noise = (weight * (gradient - mean).square()).sum()
        found["sampled", name] = np.array([[mean.item() ** 2, noise.item()]])
    return found


def test_the_score_function_by_enumeration():
    exact = bernoulli_exact()
    found = pe.gradient_noise(bernoulli, BernoulliGuide(), ONE, num_samples=300, **QUIET)
    assert found.estimators == ("auto", "sampled") and found.analytic == ("z",)
    check(found, exact, (1.0,))
    # in closed form the KL has no noise, and its gradient is that of the sampled one
    kl = exact["sampled", "kl z"] * [[1, 0]]
    check(found, {("auto", "kl z"): kl}, (1.0,))


@pytest.mark.parametrize("at_once", [False, True])
def test_baselines_by_enumeration(at_once):
    """Of two draws: the mean of f(z_k) - f(z_j) times the slope of log q(z_k), each term alone."""
    p, z = torch.tensor(0.6).sigmoid(), torch.tensor([0.0, 1.0])
    log_q, prior = dist.Bernoulli(p).log_prob(z), dist.Bernoulli(0.3).log_prob(z)
    likelihood = dist.Normal(z, 1.0).log_prob(torch.tensor(X))
    options = {"kl": "sampled", "num_particles": 2, "vectorize_particles": at_once}
    objectives = {
        name: pe.BetaELBO(baselines=name, max_plate_nesting=1, **options)
        for name in ("none", "leave_one_out")
    }
    options = {"objective": objectives, "num_samples": 100, **QUIET}
    found = pe.gradient_noise(bernoulli, BernoulliGuide(), ONE, **options)
    weight, exact = (log_q.unsqueeze(1) + log_q).exp(), {}
    for name, less in zip(objectives, (0.0, 1.0), strict=True):
        for term, f in {
            "log_likelihood x": likelihood,
            "kl z": prior - log_q,
            "total": likelihood + prior - log_q,
        }.items():
            cost = f.unsqueeze(1) - less * f
            gradient = (cost * (z - p).unsqueeze(1) + (cost * (z - p).unsqueeze(1)).T) / 2
            if not less:
                single = f * (z - p)
                gradient = (single.unsqueeze(1) + single) / 2
            mean = (weight * gradient).sum()
            noise = (weight * (gradient - mean).square()).sum()
            exact[name, term] = np.array([[mean.item() ** 2, noise.item()]])
    check(found, exact, (1.0,))
    assert exact["leave_one_out", "total"][0, 1] < exact["none", "total"][0, 1]


def test_a_guide_that_enumerates_has_no_noise():
    guide = BernoulliGuide({"enumerate": "parallel"})
    found = pe.gradient_noise(bernoulli, guide, ONE, num_samples=20, **QUIET)
    assert not {"path", "score"} & {*found.estimators}
    exact = {(e, t): v * [[1, 0]] for (_, t), v in bernoulli_exact().items()
             for e in found.estimators if t in ("log_likelihood x", "kl z", "total")}  # fmt: skip
    check(found, exact, (1.0,))
    assert float(found.noise.nan_to_num().max()) == 0.0


def test_models_and_what_they_share():
    scale = nn.Parameter(torch.tensor(0.2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.both = nn.Parameter(torch.tensor(0.5)), scale

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, self.both.exp()))
                pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x)

    guide = Guide()
    guide.both = scale
    found = pe.gradient_noise(Model(), guide, ONE, num_samples=100, **QUIET)
    assert found.parameters == ("model", "guide", "shared", "all")
    data = found.to_xarray().sel(estimator="sampled")
    assert float(data.noise.sel(term="total", parameters="all")) == pytest.approx(
        float(data.noise.sel(term="total", parameters=["model", "guide", "shared"]).sum())
    )
    # d log p(x | z) / d shift = x - z - shift, and d log p(z) / d both = z^2 / b^2 - 1
    in_shift = data.sel(term="log_likelihood x", parameters="model")
    assert is_close(in_shift.noise, in_shift.noise_stderr, S**2)
    assert is_close(in_shift.signal, in_shift.signal_stderr, (X - M - 0.5) ** 2)
    in_both = data.sel(term="log_prior z", parameters="shared")
    noise = (4 * M**2 * S**2 + 2 * S**4) * math.exp(-0.8)
    assert is_close(in_both.noise, in_both.noise_stderr, noise)
    assert float(data.noise.sel(term="log_likelihood x", parameters="shared")) == 0.0
    text = str(found)
    assert "in the model's parameters" in text and "in what model and guide share" in text


def test_masked_rows_add_nothing():
    x, mask = torch.tensor([X, 40.0, X]), torch.tensor([True, False, True])

    def masked(x):
        with poutine.mask(mask=mask):
            model(x)

    def guide(x):
        with poutine.mask(mask=mask):
            inner(x)

    inner = Guide()

    def registered(x):
        pyro.module("guide", inner)
        guide(x)

    found = pe.gradient_noise(masked, registered, x, num_samples=100, **QUIET)
    twice = {k: v * [[4, 2]] for k, v in EXACT.items()}  # two rows, which are independent
    check(found, twice)


DATA = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.4], dtype=torch.float64)


def of_rows(size, scale):
    """Noise of the likelihood's and of the total gradient by the choice of rows, and of the draws.

    Of "sampled": d / dm and d / dr of the mean over draws are linear in the sum of the rows.
    """
    sums = [sum(DATA[list(rows)].tolist()) for rows in itertools.combinations(range(5), size)]
    rows = np.var(sums) * scale**2  # sum of x, in -(m - x) - s e and so on; of r its mean is 0
    chosen = [list(rows) for rows in itertools.combinations(range(5), size)]
    draws = 0.0
    for each in chosen:
        a = M - DATA[each].numpy()
        draws += (4 * S**2 + (a + M) ** 2 * S**2 + 8 * S**4).sum() * scale**2 / len(chosen)
    return rows, draws


def test_minibatches():
    found = pe.gradient_noise(
        model, Guide(), DATA, batch_size=np.int64(2), num_samples=120, **QUIET
    )
    rows, draws = of_rows(2, 1.0)
    data = found.to_xarray().sel(estimator="sampled", parameters="guide")
    for term in ("log_likelihood x", "total"):
        one = data.sel(term=term)
        assert is_close(one.of_rows, one.of_rows_stderr, rows), term
    assert is_close(one.noise, one.noise_stderr, rows + draws)
    assert abs(float(data.of_rows.sel(term="log_q z"))) < 1e-20
    mean = 2 * (DATA.mean().item() - 2 * M), 2 * (1 - 2 * S**2)
    assert is_close(one.signal, one.signal_stderr, mean[0] ** 2 + mean[1] ** 2)
    assert "gradients of 2 rows: 120" in str(found) and "by the choice of rows" in str(found)
    whole = pe.gradient_noise(model, Guide(), DATA, batch_size=np.int64(9), num_samples=60, **QUIET)
    one = whole.to_xarray().sel(estimator="sampled", parameters="guide", term="total")
    assert is_close(one.of_rows, one.of_rows_stderr, 0.0)


def test_a_plate_that_subsamples():
    guide = Guide()

    def subsampled(q):
        def program(x):
            if q:
                pyro.module("guide", guide)
            with pyro.plate("data", 5, subsample_size=2) as rows:
                loc, scale = (guide.m, guide.r.exp()) if q else (0.0, 1.0)
                z = pyro.sample("z", dist.Normal(loc, scale))
                if not q:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        return program

    found = pe.gradient_noise(subsampled(False), subsampled(True), DATA, num_samples=100, **QUIET)
    rows, draws = of_rows(2, 2.5)
    one = found.to_xarray().sel(estimator="sampled", parameters="guide", term="total")
    assert is_close(one.of_rows, one.of_rows_stderr, rows)
    assert is_close(one.noise, one.noise_stderr, rows + draws)


def test_rows_are_said_to_be_most_of_the_noise():
    x = torch.tensor([-30.0, 30.0, -30.0, 30.0])
    found = pe.gradient_noise(model, Guide(0.0, -3.0), x, batch_size=1, num_samples=20, **QUIET)
    assert any(note.startswith("The choice of rows makes 9") for note in found.notes)


def test_objectives_by_their_own_terms():
    objectives = {
        "beta": pe.BetaELBO(3.0, kl="sampled"),
        "closed": pe.BetaELBO(3.0),
        "path": pe.ImportanceWeightedELBO(1, gradient="path"),  # a name that is no estimator here
        "weighted": pe.ImportanceWeightedELBO(1),
    }
    found = pe.gradient_noise(model, Guide(), ONE, objective=objectives, num_samples=100, **QUIET)
    assert found.estimators == tuple(objectives) and found.notes == []
    exact = {
        ("beta", "log_likelihood x"): of_gradient(1, 0, 0),
        ("beta", "kl z"): of_gradient(0, 3, 3),
        ("beta", "total"): of_gradient(1, 3, 3),
        ("closed", "total"): of_gradient(1, 0, 3, closed=True),
        ("path", "rest"): of_gradient(1, 1, 1, path=True),
        ("path", "total"): of_gradient(1, 1, 1, path=True),
        ("weighted", "log_prior z"): of_gradient(0, 1, 0),
        ("weighted", "total"): of_gradient(1, 1, 1),
    }
    check(found, exact)
    data = found.to_xarray().sel(parameters="guide", term="rest")
    assert np.isnan(data.noise.sel(estimator=["beta", "closed", "weighted"])).all()
    assert [objective.step for objective in objectives.values()] == [0] * 4


QUICK = {"nested_plates", "AutoNormalMessenger", "score_function"}
ALL = programs.REPARAMETERISED | programs.SCORE_FUNCTION | programs.ENUMERATED


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL
])  # fmt: skip
def test_the_gradients_are_those_of_training(name):
    """Those of BetaELBO at the same draws, and on average all estimators' are one."""
    model, guide = ALL[name]()
    objectives = {"auto": pe.BetaELBO(), "sampled": pe.BetaELBO(kl="sampled")}
    options = {"num_samples": 20, **QUIET}
    found = pe.gradient_noise(model, guide, None, **options).to_xarray().sel(term="total")
    trained = pe.gradient_noise(model, guide, None, objective=objectives, **options)
    trained = trained.to_xarray().sel(term="total", estimator=["sampled"])
    own, kwargs = found.sel(estimator=["sampled"]), {"rtol": 1e-9, "atol": 1e-12}
    if name not in DRAWS_ANEW:
        np.testing.assert_allclose(own.noise, trained.noise, **kwargs)
        np.testing.assert_allclose(own.signal, trained.signal, **kwargs)
    for other in (found, trained):
        error = 2.5 * (own.signal_stderr.values + other.signal_stderr.values)
        gap = abs(own.signal.values - other.signal.values)
        assert (gap <= error + 1e-9 * (1 + abs(own.signal.values))).all()


# where an objective's first run, to find how plates nest, takes random numbers
DRAWS_ANEW = {
    "guide_enumerated_and_sampled",
    "model_enumerated",
    "model_enumerated_above_latents",
    "multiply_sampled",
}


def test_particles_lower_the_noise():
    objective = pe.BetaELBO(kl="sampled", num_particles=4)
    found = pe.gradient_noise(model, Guide(), ONE, objective=objective, num_samples=100, **QUIET)
    exact = EXACT["sampled", "total"] * [[1, 1 / 4]]
    check(found, {("BetaELBO", "total"): exact})


def test_a_schedule_that_takes_the_kl_away():
    objective = pe.BetaELBO(pe.schedules.Linear(0.0, 1.0, steps=10))
    found = pe.gradient_noise(model, Guide(), ONE, objective=objective, num_samples=20, **QUIET)
    kl = found.to_xarray().sel(estimator="BetaELBO", term="kl z", parameters="all")
    assert float(kl.noise) == float(kl.signal) == 0.0


def test_nothing_of_the_programs_changes():
    guide = nn.Sequential(nn.Dropout(0.5))
    inner = Guide()
    guide.forward = lambda x: inner(x)
    guide.inner = inner
    inner.m.grad, state = torch.tensor(7.0), torch.get_rng_state()
    inner.r.requires_grad_(False)
    pyro.param("mine", torch.ones(2))
    before = inner.m.item()
    first = pe.gradient_noise(model, guide, ONE, num_samples=20, **QUIET)
    assert inner.m.item() == before and inner.m.grad == 7.0 and inner.r.grad is None
    assert guide.training and not inner.r.requires_grad and torch.is_grad_enabled()
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(torch.get_rng_state(), state)
    again = pe.gradient_noise(model, guide, ONE, num_samples=20, **QUIET)
    other = pe.gradient_noise(model, guide, ONE, num_samples=20, seed=1, **QUIET)
    assert str(first) == str(again) != str(other)
    # of m alone, for r takes no gradient
    of_m = {key: parts[:1] for key, parts in EXACT.items()}
    data = first.to_xarray().sel(estimator="sampled", parameters="guide", term="total")
    assert is_close(data.noise, data.noise_stderr, of_m["sampled", "total"][0, 1])


def test_what_is_finished_is_not_lost(monkeypatch):
    made = []

    def interrupted(*args):
        made.append(args)
        if len(made) > 30:
            raise KeyboardInterrupt
        return module.np.random.SeedSequence(args).generate_state(1)[0]

    monkeypatch.setattr(module, "seed_of", interrupted)
    with pytest.warns(pe.UnfinishedWarning, match="covers only the first 30 gradients"):
        found = pe.gradient_noise(model, Guide(), ONE, **QUIET)
    assert found.num_samples == 30
    check(found, {("sampled", "log_q z"): EXACT["sampled", "log_q z"]})


def test_what_cannot_be_is_said():
    x = torch.randn(6)
    with pytest.raises(ValueError, match="num_samples should be a whole number of at least 20"):
        pe.gradient_noise(model, Guide(), x, num_samples=10)
    with pytest.raises(ValueError, match="batch_size should be a positive whole number"):
        pe.gradient_noise(model, Guide(), x, batch_size=0)
    with pytest.raises(ValueError, match=r"Pyro's Trace_ELBO is BetaELBO\(kl='sampled'\)"):
        pe.gradient_noise(model, Guide(), x, objective=pyro.infer.Trace_ELBO())
    with pytest.raises(ValueError, match="objective should name at least one"):
        pe.gradient_noise(model, Guide(), x, objective={})
    with pytest.raises(ValueError, match="no parameters that take gradients"):
        pe.gradient_noise(model, lambda x: Guide()(x), x)
    with pytest.raises(ValueError, match="data are given in several batches"):
        pe.gradient_noise(model, Guide(), torch.utils.data.DataLoader(x, batch_size=2))
    with pytest.raises(ValueError, match="for an AutoGuide"):
        pe.gradient_noise(model, AutoNormal(model), x, batch_size=2)

    def shared(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def of_mean(x):
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    with pytest.raises(ValueError, match="the plate of the data has the size of a minibatch"):
        pe.gradient_noise(shared, of_mean, x, batch_size=2)

    def infinite(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", (0 * z).sqrt())

    def of_z(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))

    with pytest.raises(ValueError, match="gradients of factors f are NaN or infinite"):
        pe.gradient_noise(infinite, of_z, x, num_samples=20, **QUIET)


def test_sites_that_come_and_go_are_refused():
    def model(x):
        for name in draws:
            pyro.sample(name, dist.Normal(0.0, 1.0))

    draws = []

    def guide(x):
        draws[:] = ["a"] if torch.rand(()) < 0.5 else ["b"]
        pyro.sample(draws[0], dist.Normal(pyro.param("q", torch.zeros(())), 1.0))

    with pytest.raises(ValueError, match="should have the same sites in each run"):
        pe.gradient_noise(model, guide, torch.zeros(1), **QUIET)


def test_the_figure(one):
    ax = pe.plot_gradient_noise(one, parameters="guide")
    assert ax.get_xscale() == "log" and "the guide's parameters" in ax.get_xlabel()
    labels = [label.get_text().strip() for label in ax.get_yticklabels()]
    assert labels == ["log-likelihood of x", "KL of z", "log-prior of z", "log q of z", "total"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(one.estimators)
    widths = sorted(bar.get_width() for bar in ax.patches if bar.get_width() > 0)
    noise = one.noise[:, 0].flatten()
    np.testing.assert_allclose(widths, noise[noise > 0].sort().values)
    with pytest.raises(ValueError, match="parameters should be one of"):
        pe.plot_gradient_noise(one, parameters="model")
