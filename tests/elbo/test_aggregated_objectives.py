"""SurgeryELBO and TotalCorrelationELBO as objectives: steps, capture, state, complaints."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import programs
from helpers.aggregates import assert_adds_up, discrete, nested
from helpers.losses import captured, initialised, of_module
from helpers.oracles import rows
from helpers.vae import Guide, Model
from pyro import poutine
from pyro.distributions.testing import fakes
from pyro.infer.autoguide import AutoRegressiveMessenger
from torch import nn

import pyproelbo as pe
from pyproelbo.elbo import minibatch
from pyproelbo.schedules import Linear


def test_schedules_and_positions():
    objective = pe.TotalCorrelationELBO(1.0, Linear(1.0, 5.0, 4), 1.0, 40, "weighted")
    assert objective.dataset_size == 40
    assert objective.estimator == "weighted"
    module, x = objective(Model(), Guide()), rows(6, 3)
    for step in range(3):
        pyro.set_rng_seed(1)
        loss = module(x)
        loss.backward()
        terms, surgery = objective.last_terms, objective.last_surgery
        expected = terms.elbo - 6 * step * surgery.total_correlation  # Linear: 1 + step
        torch.testing.assert_close(loss.detach(), -expected)
    assert objective.step == 3


OBJECTIVES = {
    "surgery": lambda **kwargs: pe.SurgeryELBO(40, **kwargs),
    "total correlation": lambda **kwargs: pe.TotalCorrelationELBO(0.5, 3.0, 2.0, 40, **kwargs),
}


@pytest.mark.slow
@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}])
@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_capture(name, in_blocks, particles, monkeypatch):
    """One graph of loss, gradients and surgery, which equals eager and reads no value."""
    if in_blocks:
        defaults = ("stratified", 40, None)
        monkeypatch.setattr(minibatch.log_densities, "__defaults__", defaults)
    model, guide, x = Model(), Guide(), rows(6, 3)
    module = OBJECTIVES[name](**particles)(model, guide)
    loss, grads = of_module(module, x)
    surgery = module.elbo.last_surgery
    captured_loss, found, captured_surgery = captured(
        module, x, also=lambda: tuple(module.elbo.last_surgery)
    )
    assert torch.equal(captured_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(captured_surgery, surgery, strict=True))


def test_independence_is_asked_once_for_each_guide():
    calls = []
    model, guide = initialised(programs.local_normal)
    counted = lambda: calls.append(1) or guide()  # noqa: E731
    objective = pe.SurgeryELBO(None)
    objective.loss_and_grads(model, counted)
    first = len(calls)
    objective.loss_and_grads(model, counted)
    assert first > 2
    assert len(calls) == first + 1


def test_the_check_leaves_running_means_alone():
    class Normalised(Guide):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return super().forward(self.norm(x))

    torch.manual_seed(0)
    guide, x = Normalised(), rows(6, 3)
    other = copy.deepcopy(guide)
    pe.BetaELBO().loss_and_grads(Model(), guide, x)
    pe.SurgeryELBO(40).loss_and_grads(Model(), other, x)
    for ours, theirs in zip(other.buffers(), guide.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_state_and_copies():
    module, x = pe.SurgeryELBO(40)(Model(), Guide()), rows(6, 3)
    module(x).backward()
    assert set(module.elbo.state_dict()) == {"_extra_state"}
    copied = copy.deepcopy(module)
    assert torch.equal(of_module(copied, x)[0], of_module(module, x)[0])
    assert copied.elbo.last_surgery == module.elbo.last_surgery


def test_float32():
    torch.set_default_dtype(torch.float32)
    for make in OBJECTIVES.values():
        module = make()(Model(), Guide())
        loss = module(rows(6, 3))
        assert {v.dtype for v in (loss, *module.elbo.last_surgery)} == {torch.float32}


def test_training_lowers_the_total_correlation():
    """Two dimensions that the data correlate, a decoder that cannot mix them."""
    mix = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.4, 0.0]])
    x = 3 * rows(200, 2) @ mix
    found = {}
    for beta in (1.0, 10.0):
        torch.manual_seed(0)
        module = pe.TotalCorrelationELBO(beta=beta, dataset_size=200)(Model(), Guide())
        decoder = module.model.decoder.requires_grad_(False)
        decoder.weight.copy_(3 * torch.eye(3, 2))
        optimizer = torch.optim.Adam(module.guide.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            module(x[torch.randperm(200)[:50]]).backward()
            optimizer.step()
        objective = pe.SurgeryELBO(None, num_particles=5)
        objective(module.model, module.guide)(x)
        found[beta] = objective.last_surgery.total_correlation.item()
    assert found[1.0] > 0.5
    assert found[10.0] < found[1.0] / 3


def test_complaints_of_constructors():
    for make, message in [
        (lambda: pe.SurgeryELBO(1), "dataset_size should be a whole number of at least 2"),
        (lambda: pe.SurgeryELBO(60.5), "dataset_size should be a whole number of at least 2"),
        (lambda: pe.SurgeryELBO(60, estimator="exact"), "estimator should be one of"),
        (lambda: pe.TotalCorrelationELBO(estimator="mss"), "estimator should be one of"),
        (lambda: pe.TotalCorrelationELBO(-1.0), "alpha should not be negative"),
        (lambda: pe.TotalCorrelationELBO(beta=-1.0), "beta should not be negative"),
        (lambda: pe.TotalCorrelationELBO(gamma=-1.0), "gamma should not be negative"),
        (lambda: pe.SurgeryELBO(60, kl="exact"), "kl should be"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


REFUSED = {
    "of no plate": ("nested_plates", "a", {}, "site 'a' is in no plate"),
    "all, one of no plate": ("subsampled", None, {}, "site 'm' is in no plate"),
    "of several plates": ("nested_plates", "c", {}, r"in plates \['inner', 'outer'\]: name the"),
    "of another plate": ("nested_plates", "b", {"plate": "inner"}, r"plates \['outer'\], not in"),
    "of plates apart": ("sequential", None, {}, "site 'z_0' is in no plate"),
    "given another": ("nested_plates", "b", {}, r"draws 'b' given its sample of \['a'\]"),
    "masked": ("imputed", "x_unobserved", {}, "site 'x_unobserved' is masked"),
    "masked and scaled": ("scaled_and_masked", "z", {}, "site 'z' is masked"),
    "fixed": ("parameters_only", "y", {}, "does not belong to one sample"),
    "joint": ("AutoMultivariateNormal", "p", {}, "is in no plate"),
    "joint, by its own name": (
        "AutoMultivariateNormal",
        "_AutoMultivariateNormal_latent",
        {},
        "is in no plate",
    ),
    "unknown": ("local_normal", "zz", {}, r"names 'zz', but the latent sites are \['z'\]"),
    "nothing": ("nothing_latent", None, {}, "there is no latent site"),
    "another size": ("subsampled", "z", {"dataset_size": 7}, "its 3 rows stand for 6"),
    "too small a size": ("local_normal", "z", {"dataset_size": 4}, "less than the 5 data"),
    "enumerated": ("guide_enumerated_and_sampled", "z", {}, "latents that are enumerated"),
}


@pytest.mark.filterwarnings("ignore:.*possibly invalid dependency")
@pytest.mark.parametrize("why", REFUSED)
def test_refused(why):
    name, site, kwargs, message = REFUSED[why]
    model, guide = initialised((programs.REPARAMETERISED | programs.ENUMERATED)[name])
    kwargs = {"dataset_size": None, "max_plate_nesting": 2, **kwargs}
    for objective in (
        pe.SurgeryELBO(site=site, **kwargs),
        pe.TotalCorrelationELBO(site=site, **kwargs),
    ):
        for _ in range(2):  # a refused guide stays refused
            with pytest.raises(ValueError, match=message):
                objective.loss_and_grads(model, guide)


def one_latent(q, p=None, scale=1.0, model_scale=1.0, num=4, plates=("data",)):
    """A latent of q, with scales of its own."""

    def program(d, scale):
        with pyro.plate("data", num), poutine.scale(scale=scale):
            return pyro.sample("z", d)

    return lambda: program(p or dist.Normal(0.0, 1.0), model_scale), lambda: program(q, scale)


def test_refused_scales_masks_and_short_batches():
    q = dist.Normal(programs.noise(4), 1.0)
    one = dist.Normal(programs.noise(1), 1.0)
    mask = torch.tensor([True, False, True, True])
    for kwargs, message in [
        ({"q": q, "scale": 3.0}, "has its density scaled by 3.0, where plate 'data' gives 1.0"),
        ({"q": q, "model_scale": 3.0}, "has its density scaled by 3.0"),
        ({"q": q, "scale": torch.tensor(3.0)}, "has its density scaled by 3.0"),
        ({"q": q.mask(mask)}, "site 'z' is masked"),
        ({"q": q, "p": dist.Normal(0.0, 1.0).expand([4]).mask(mask)}, "site 'z' is masked"),
        ({"q": one, "num": 1}, "a batch of 1"),
    ]:
        model, guide = one_latent(**kwargs)
        with pytest.raises(ValueError, match=message):
            pe.SurgeryELBO(40, kl="sampled").loss_and_grads(model, guide)


def test_a_scale_of_one_may_be_a_tensor():
    q = dist.Normal(programs.noise(4), 1.0)
    losses = []
    for scale in (1.0, torch.tensor(1.0), torch.ones(1)):
        pyro.set_rng_seed(0)
        model, guide = one_latent(q, scale=scale)
        losses.append(pe.SurgeryELBO(40, kl="sampled").loss_and_grads(model, guide))
    assert losses[1:] == pytest.approx(losses[:1] * 2)


def test_refused_by_total_correlation_alone():
    fake = fakes.NonreparameterizedNormal(programs.noise(4), 1.0)
    with pytest.raises(ValueError, match="NonreparameterizedNormal of site 'z' cannot be"):
        pe.TotalCorrelationELBO(dataset_size=40).loss(*one_latent(fake))
    with pytest.raises(ValueError, match="cannot be reparameterised"):
        pe.TotalCorrelationELBO(site="b").loss(*initialised(discrete))

    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(4, 2), 1.0).to_event(1),
        [dist.transforms.LowerCholeskyAffine(torch.zeros(2), torch.eye(2) + 0.5)],
    )
    model, guide = one_latent(flow, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"the marginals of the guide's distributions of \['z'\]"):
        pe.TotalCorrelationELBO(dataset_size=40).loss(model, guide)
    pe.SurgeryELBO(40).loss_and_grads(model, guide)


def test_refused_messenger():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=programs.noise(4))

    guide = AutoRegressiveMessenger(model)
    with pytest.raises(ValueError, match=r"draws 'z' given its sample of \['m'\]"):
        pe.SurgeryELBO(40, site="z").loss_and_grads(model, guide)


def test_refused_given_a_latent_of_the_same_datum():
    model, guide = initialised(lambda: nested(lambda loc, y: loc + y))
    with pytest.raises(ValueError, match=r"draws 'z' given its sample of \['y'\]"):
        pe.TotalCorrelationELBO(plate="data").loss(model, guide)
    objective = pe.TotalCorrelationELBO(site="y")
    objective.loss_and_grads(model, guide)
    assert_adds_up(objective.last_surgery)
