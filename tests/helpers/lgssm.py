"""A linear-Gaussian model of sequences with nothing special about its parameters."""

from helpers.modules import at_random
from helpers.sequence_data import D, k

from pyproelbo.models.lgssm import LGSSM


def lgssm(num_latents=k, num_features=D, num_inputs=0, dataset_size=None):
    """An LGSSM with nothing special about its parameters, and of a stable F."""
    (model,) = at_random(LGSSM(num_latents, num_features, num_inputs, dataset_size))
    return model
