"""A VAE of one linear layer each way, as plain modules with nothing in Pyro's param store."""

import pyro
import pyro.distributions as dist
from torch import nn


class Model(nn.Module):
    """Two latents, three features."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class Guide(nn.Module):
    """An amortised diagonal Normal."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 4)

    def forward(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
