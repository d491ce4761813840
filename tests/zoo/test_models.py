"""What holds for every model with every guide of it."""

import copy

import pyro
import pytest
import torch
from helpers.oracles import rows
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD

from pyproelbo import BetaELBO
from pyproelbo.guides import gmm as gmm_guides
from pyproelbo.guides import hvae as hvae_guides
from pyproelbo.guides import ppca as ppca_guides
from pyproelbo.guides import vae as vae_guides
from pyproelbo.models.gmm import GMM
from pyproelbo.models.hvae import HVAE
from pyproelbo.models.nets import gated_mlp
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE, BernoulliLikelihood

D = 4


def exact(make, guide):
    def pair(dataset_size=None):
        model = make(2, D, dataset_size=dataset_size)
        return model, guide(model)

    return pair


def learned(make, guide, *args, **kwargs):
    return lambda dataset_size=None: (
        make(2, D, *args, dataset_size=dataset_size, **kwargs),
        guide(2, D, *args, dataset_size=dataset_size),
    )


PAIRS = {
    "ppca, exact": exact(PPCA, ppca_guides.Exact),
    "ppca, diagonal": learned(PPCA, ppca_guides.Diagonal),
    "ppca, full": learned(PPCA, ppca_guides.FullCovariance),
    "gmm, exact": exact(GMM, gmm_guides.Exact),
    "gmm, softmax": learned(GMM, gmm_guides.Softmax),
    "vae, diagonal": learned(VAE, vae_guides.Diagonal, (3,)),
    "vae, gated": lambda dataset_size=None: (
        VAE(2, D, (3,), dataset_size=dataset_size, net=gated_mlp),
        vae_guides.Diagonal(2, D, (3,), dataset_size, net=gated_mlp, log_scale=(-3.0, 1.0)),
    ),
    "hvae, linear": lambda dataset_size=None: (
        HVAE((3, 2), D, dataset_size=dataset_size, log_scale=(-3.0, 1.0)),
        hvae_guides.Diagonal((3, 2), D, dataset_size=dataset_size, log_scale=(-3.0, 1.0)),
    ),
    "hvae, gated": lambda dataset_size=None: (
        HVAE((3, 2), D, (3, 5), BernoulliLikelihood(), dataset_size=dataset_size, net=gated_mlp),
        hvae_guides.Diagonal((3, 2), D, (3, 5), dataset_size, net=gated_mlp, log_scale=(-3.0, 1.0)),
    ),
    "vae, full": learned(VAE, vae_guides.FullCovariance, (3,)),
    "bernoulli": learned(VAE, vae_guides.Diagonal, (3,), likelihood=BernoulliLikelihood()),
}


@pytest.fixture(params=PAIRS)
def make(request):
    return PAIRS[request.param]


def data():
    return (rows(6, D) > 0).to(rows(1))


def svi(model, guide):
    return SVI(model, guide, SGD({"lr": 0.01}), BetaELBO(max_plate_nesting=1))


def values(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def moved(before, *modules):
    return [not torch.equal(a, b) for a, b in zip(before, values(*modules), strict=True)]


def test_svi_finds_every_parameter(make):
    programs = make()
    before = values(*programs)
    svi(*programs).step(data())
    assert all(moved(before, *programs))


def test_module_finds_every_parameter(make):
    model, guide = make()
    module = BetaELBO(max_plate_nesting=1)(model, guide)
    assert len(list(module.parameters())) == len(values(model, guide))
    module(data()).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_both_routes_take_the_same_step(make):
    programs = make()
    twins = copy.deepcopy(programs)
    torch.manual_seed(1)
    svi(*programs).step(data())
    torch.manual_seed(1)
    module = BetaELBO(max_plate_nesting=1)(*twins)
    module(data()).backward()
    torch.optim.SGD(module.parameters(), lr=0.01).step()
    torch.testing.assert_close(values(*twins), values(*programs))


@pytest.mark.parametrize("other", ["an instance", "a copy", "a copy after training"])
def test_no_two_programs_share_parameters(make, other):
    first = make()
    if other == "a copy after training":
        svi(*first).step(data())
    second = make() if other == "an instance" else copy.deepcopy(first)
    svi(*first).step(data())
    svi(*second).step(data())
    for trained, idle in ((first, second), (second, first)):
        before, still = values(*trained), values(*idle)
        svi(*trained).step(data())
        assert all(moved(before, *trained))
        assert not any(moved(still, *idle))


def test_clearing_the_store_changes_no_parameter(make):
    programs = make()
    svi(*programs).step(data())
    before = values(*programs)
    pyro.clear_param_store()
    Trace_ELBO().loss(*programs, data())
    assert not any(moved(before, *programs))
    svi(*programs).step(data())
    assert all(moved(before, *programs))


def test_state_dict_goes_from_one_to_another(make):
    (model, guide), (other_model, other_guide) = make(), make()
    other_model.load_state_dict(model.state_dict())
    other_guide.load_state_dict(guide.state_dict())
    assert not any(moved(values(model, guide), other_model, other_guide))


def test_parts_of_another_module_take_their_names_from_it(make):
    class Whole(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.model, self.guide = make()

        def forward(self, x):
            return self.model(x)

    names = poutine.trace(Whole()).get_trace(data()).param_nodes
    assert names and all(name.startswith("model") for name in names)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_runs_on_a_device_of_its_own_without_a_sync(make):
    # A tensor on the meta device has no values: reading one raises, and so does a mix of devices.
    model, guide = (program.to("meta") for program in make())
    x = data().to("meta")
    with pyro.validation_enabled(False):
        loss = BetaELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
        loss.backward()
        evidence = model.log_evidence(x) if hasattr(model, "log_evidence") else None
    assert loss.device.type == "meta" and (evidence is None or evidence.device.type == "meta")


def test_single_precision(make):
    model, guide = (program.float() for program in make())
    terms = BetaELBO(max_plate_nesting=1).terms(model, guide, data().float())
    assert {v.dtype for v in (*terms.log_likelihood.values(), *terms.kl.values())} == {
        torch.float32
    }
    assert model(num=2).dtype == torch.float32


def test_size_is_a_scale(make):
    traces = [poutine.trace(program).get_trace(data()) for program in make(dataset_size=60)]
    for trace in traces:
        latents = [trace.nodes[n] for n in trace.stochastic_nodes if n.startswith("z")]
        assert latents and all(site["scale"] == 10.0 for site in latents)
    assert traces[0].nodes["x"]["scale"] == 10.0


def test_simulates(make):
    model, _ = make(dataset_size=6)
    x = model(num=9)
    assert x.shape == (9, D)


@pytest.mark.parametrize("shape", [(6, D + 1), (D,), (2, 6, D), ()])
def test_x_of_the_wrong_shape(make, shape):
    for program in make():
        with pytest.raises(ValueError, match=rf"x should have shape \(B, {D}\)"):
            program(torch.zeros(shape))


def test_posterior_of_x_of_the_wrong_shape(make):
    for program in make():
        if hasattr(program, "posterior"):
            with pytest.raises(ValueError, match=rf"x should have shape \(..., {D}\)"):
                program.posterior(torch.zeros(6, D - 1))


def test_z_of_the_wrong_shape():
    for model in (PPCA(2, D), VAE(2, D)):
        with pytest.raises(ValueError, match=r"z should have shape \(..., 2\)"):
            model.decode(torch.zeros(6, 3))


def test_more_rows_than_the_whole(make):
    for program in make(dataset_size=5):
        with pytest.raises(ValueError, match="x has 6 rows, more than dataset_size=5"):
            program(data())


def test_levels_of_the_wrong_shape():
    model, guide = HVAE((3, 2), D), hvae_guides.Diagonal((3, 2), D)
    z1, z2, x = torch.zeros(6, 3), torch.zeros(6, 2), torch.zeros(6, D)
    for call, message in [
        (lambda: model.decode(z2, z2), r"z1 should have shape \(..., 3\)"),
        (lambda: model.decode(z1, z1), r"z2 should have shape \(..., 2\)"),
        (lambda: model.conditional_prior(z1), r"z2 should have shape \(..., 2\)"),
        (lambda: guide.conditional_posterior(x, z1), r"z2 should have shape \(..., 2\)"),
        (lambda: guide.conditional_posterior(z1, z2), rf"x should have shape \(..., {D}\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("make", [HVAE, hvae_guides.Diagonal])
@pytest.mark.parametrize("num_latents, message", [
    (2, r"num_latents should be two sizes, \(k1, k2\) of z1 and z2, got 2"),
    ((2, 3, 4), "num_latents should be two sizes"),
    ((2, 0), r"num_latents\[1\] should be a positive whole number, got 0"),
])  # fmt: skip
def test_levels_that_are_none(make, num_latents, message):
    with pytest.raises(ValueError, match=message):
        make(num_latents, D)


@pytest.mark.parametrize(
    "make", [PPCA, GMM, VAE, ppca_guides.Diagonal, gmm_guides.Softmax, vae_guides.FullCovariance]
)
@pytest.mark.parametrize("sizes", [(0, 4), (2, 0), (2.0, 4)])
def test_sizes_that_are_none(make, sizes):
    with pytest.raises(ValueError, match="should be a positive whole number"):
        make(*sizes)
