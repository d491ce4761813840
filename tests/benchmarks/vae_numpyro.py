"""The VAE of step.py in NumPyro, trained by its SVI in one jitted step."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO


def step_of(features, hidden, latents, batch, learning_rate):
    """A function that makes a training step and returns its loss."""

    def dense(name, x, num_out):
        bound = x.shape[-1] ** -0.5
        start = dist.Uniform(-bound, bound)
        weight = numpyro.param(f"{name} weight", lambda k: start.sample(k, (x.shape[-1], num_out)))
        bias = numpyro.param(f"{name} bias", lambda k: start.sample(k, (num_out,)))
        return x @ weight + bias

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latents), 1.0).to_event(1))
            logits = dense("decoder 2", jax.nn.softplus(dense("decoder 1", z, hidden)), features)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        h = jax.nn.softplus(dense("encoder 1", x, hidden))
        loc, raw = jnp.split(dense("encoder 2", h, 2 * latents), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(raw)).to_event(1))

    key = jax.random.key(0)
    x = jax.random.bernoulli(key, shape=(batch, features)).astype(float)
    svi = SVI(model, guide, numpyro.optim.Adam(learning_rate), Trace_ELBO())
    state, update = svi.init(key, x), jax.jit(svi.update, donate_argnums=0)

    def step():
        nonlocal state
        state, loss = update(state, x)
        return float(loss)

    return step
