"""Programs for surgery: a posterior of each family, and log q of every pair."""

import pyro
import pyro.distributions as dist
import torch

SCALARS = (
    "elbo",
    "reconstruction",
    "average_kl",
    "mutual_information",
    "marginal_kl",
    "total_correlation",
    "dimension_wise_kl",
)


def standard(size=2):
    return dist.Normal(torch.zeros(size), torch.ones(size)).to_event(1)


def programs(q, p=standard):
    """A model with the prior p() of z, and a guide with the posterior q(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p())
            mean = z.flatten(1).sum(1) if z.dim() > 1 else z.to(x)
            mean = mean[:, None].expand(x.shape)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return model, guide


def normal(x):
    return dist.Normal(x[:, :2], 0.3 + x[:, 2:4].sigmoid()).to_event(1)


def correlated(x):
    L = torch.diag_embed(0.3 + x[:, 2:4].sigmoid()) + torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    return dist.MultivariateNormal(x[:, :2], scale_tril=L)


def flow(x):
    base = dist.Normal(torch.zeros_like(x[:, :2]), 1.0).to_event(1)
    scale = 0.3 + x[:, 2:4].sigmoid()
    affine = dist.transforms.AffineTransform(x[:, :2], scale, event_dim=1)
    return dist.TransformedDistribution(base, [affine])


def mixture(x):
    loc = torch.stack([x[:, :2], x[:, 2:4]], 1)
    parts = dist.Normal(loc, 0.5).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=x[:, :2]), parts)


def student(x):
    return dist.StudentT(5.0, x[:, :2], 0.5).to_event(1)


def gamma(x):
    return dist.Gamma(2.0 + x[:, :2].exp(), 2.0).to_event(1)


POSTERIORS = [normal, correlated, flow, mixture, student, gamma]
PRIORS = {gamma: lambda: dist.Gamma(2.0, 2.0).expand([2]).to_event(1)}  # of others, standard


def log_q_matrix(q, z):
    """log q(z_m | x_n), one pair after the other."""
    return torch.stack([q.log_prob(value.expand(q.batch_shape + value.shape)) for value in z])
