"""Objectives of several draws, and the ways to draw them."""

import pyro.distributions as dist

import pyproelbo as pe

FORMS = {
    "looped": {"max_plate_nesting": 1},
    "vectorised": {"vectorize_particles": True, "max_plate_nesting": 1},
}
MANY = FORMS["vectorised"]
OBJECTIVES = {
    "standard": lambda k, **kw: pe.ImportanceWeightedELBO(k, **kw),
    "path": lambda k, **kw: pe.ImportanceWeightedELBO(k, "path", **kw),
    "doubly": lambda k, **kw: pe.ImportanceWeightedELBO(k, "doubly_reparameterised", **kw),
    "Renyi": lambda k, **kw: pe.RenyiELBO(0.5, k, **kw),
    "Renyi, doubly": lambda k, **kw: pe.RenyiELBO(0.5, k, "doubly_reparameterised", **kw),
    "wake": lambda k, **kw: pe.ReweightedWakeSleepELBO(k, **kw),
    "wake, doubly": lambda k, **kw: pe.ReweightedWakeSleepELBO(k, "doubly_reparameterised", **kw),
}


def given_noise(noise):
    """A Normal whose draws are loc + scale * noise, for noise of the shape of all draws."""

    class Given(dist.Normal):
        def rsample(self, sample_shape=()):
            assert not sample_shape
            return self.loc + self.scale * noise

    return Given


NO_NOISE = ("path", "doubly", "Renyi, doubly", "wake, doubly")
