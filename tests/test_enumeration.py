"""Random discrete programs, enumerated here and there, against Pyro's TraceEnum_ELBO."""

import math
import warnings

import pyro
import pyro.distributions as dist
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyro.infer import TraceEnum_ELBO
from test_terms import assert_same, loss_and_grads

import pyproelbo as pe

ROLES = ["enumerated by the guide", "sampled by the guide", "enumerated by the model", "data"]
SITES = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(ROLES)), min_size=1, max_size=5)


def program(sites):
    """Bernoulli sites at plate level 0, 1 or 2, each depending on all before it that it may."""
    sites = sorted(sites, key=lambda site: site[0])
    levels = {f"z{i}": level for i, (level, _) in enumerate(sites)}
    roles = {f"z{i}": role for i, (_, role) in enumerate(sites)}

    def run(who):
        outer, inner = pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 3, dim=-2)
        plates = [[], [outer], [outer, inner]]
        values = {}
        for i, (name, role) in enumerate(roles.items()):
            if who == "guide" and "guide" not in role:
                continue
            logits = pyro.param(f"{who}_{name}", torch.tensor(0.1 * i + 0.2))
            logits = logits + sum(0.7 * (v - 0.4) for v in values.values())
            infer = {"enumerate": "parallel"} if f"enumerated by the {who}" == role else {}
            obs = None
            if role == "data":
                shape = [2, 2, 3][: levels[name] + 1][1:][::-1]
                obs = (torch.arange(math.prod(shape)).reshape(shape) % 2).double()
            for plate in plates[levels[name]]:
                plate.__enter__()
            try:
                fn = dist.Bernoulli(logits=logits)
                values[name] = pyro.sample(name, fn, obs=obs, infer=infer)
            finally:
                for plate in reversed(plates[levels[name]]):
                    plate.__exit__(None, None, None)

    return lambda: run("model"), lambda: run("guide")


@settings(deadline=None, max_examples=80)
@given(SITES, st.sampled_from([{}, {"num_particles": 2, "vectorize_particles": True}]))
def test_equals_trace_enum_elbo(sites, particles):
    assume(any("enumerated" in role for _, role in sites))  # or the estimator is Trace_ELBO's
    pyro.clear_param_store()
    model, guide = program(sites)
    kwargs = {"max_plate_nesting": 2, **particles}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            TraceEnum_ELBO(**kwargs).loss(model, guide)
        except (ValueError, NotImplementedError):
            assume(False)  # Pyro cannot
        assume(len(pyro.get_param_store()))
        theirs = loss_and_grads(TraceEnum_ELBO(**kwargs), model, guide)
        assert_same(loss_and_grads(pe.BetaELBO(kl="sampled", **kwargs), model, guide), theirs)
        if not any("sampled" in role for _, role in sites):
            assert_same(loss_and_grads(pe.BetaELBO(**kwargs), model, guide), theirs)
        terms = pe.BetaELBO(**kwargs).terms(model, guide)
    torch.testing.assert_close(
        pe.BetaELBO(kl="sampled").objective(terms), terms.fit - terms.shrinkage
    )
