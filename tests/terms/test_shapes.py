"""Any nesting of plates, any event shape, any particles: the same numbers as Pyro's."""

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.losses import assert_same, loss_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.distributions.testing import fakes
from pyro.infer import Trace_ELBO
from torch.distributions.constraints import positive

import pyproelbo as pe


@st.composite
def structures(draw):
    """Plate sizes; for each site its plates, event shape, if reparameterised, scale, if masked."""
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    sites = draw(
        st.lists(
            st.tuples(
                st.sets(st.integers(0, max(0, len(sizes) - 1))) if sizes else st.just(set()),
                st.lists(st.integers(1, 2), max_size=2),
                st.booleans(),
                st.sampled_from([1.0, 2.5]),
                st.booleans(),
            ),
            min_size=1,
            max_size=3,
        )
    )
    return sizes, sites


def program(sizes, sites):
    """Each site's mean depends on those before it; the last one is observed, by the model."""

    def run(role):
        plates = [
            pyro.plate(f"plate_{i}", 10 * size, subsample=torch.arange(size), dim=-1 - i)
            for i, size in enumerate(sizes)
        ]
        total = torch.tensor(0.0)
        for n, (inside, event, reparameterised, scale, masked) in enumerate(sites):
            is_data = n == len(sites) - 1
            if is_data and role == "guide":
                return
            loc = pyro.param(f"{role}_loc_{n}", torch.full(event, 0.1 * n + 0.2))
            spread = pyro.param(f"{role}_scale_{n}", torch.full(event, 0.7), constraint=positive)
            normal = dist.Normal if reparameterised else fakes.NonreparameterizedNormal
            with ExitStack() as stack:
                for i in sorted(inside):
                    stack.enter_context(plates[i])
                stack.enter_context(poutine.scale(scale=scale))
                if masked:
                    first = min(inside, default=0)
                    mask = torch.arange(sizes[first] if inside else 1) > 0
                    mask = mask.reshape((-1,) + (1,) * first) if inside else mask[0]
                    stack.enter_context(poutine.mask(mask=mask))
                fn = normal(loc + total, spread).to_event(len(event))
                obs = torch.full(fn.shape(), 0.3) if is_data else None
                z = pyro.sample(f"z{n}", fn, obs=obs)
            total = total + 0.3 * z.mean()

    return lambda: run("model"), lambda: run("guide")


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(structures(), st.sampled_from([{}, {"num_particles": 2}]))
def test_equals_trace_elbo(structure, particles):
    pyro.clear_param_store()
    model, guide = program(*structure)
    kwargs = {"max_plate_nesting": 3, **particles}
    pe.BetaELBO(**kwargs).loss(model, guide)
    ours = loss_and_grads(pe.BetaELBO(kl="sampled", baselines="none", **kwargs), model, guide)
    assert_same(ours, loss_and_grads(Trace_ELBO(**kwargs), model, guide))
    terms = pe.BetaELBO(**kwargs).terms(model, guide)
    sizes, sites = structure
    for n, (inside, *_) in enumerate(sites[:-1]):
        shape = [1] * max((1 + i for i in inside), default=0)
        for i in inside:
            shape[-1 - i] = sizes[i]
        actual = terms.kl[f"z{n}"].shape
        assert list(actual[len(actual) - len(shape) :]) == shape
