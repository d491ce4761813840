"""The deep Markov model of dmm_torch.py in NumPyro, its loops by NumPyro's ``scan``."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO


def step_of(sizes, x):
    """A jitted function that computes the loss and its gradients, and returns the loss.

    Args:
        sizes: those of dmm_torch.py.
        x: (B, T, D), a NumPy array of zeros and ones; all sequences have T steps.
    """
    k, hidden = sizes.latents, sizes.transition

    def dense(name, num_in, num_out):
        start = dist.Uniform(-(num_in**-0.5), num_in**-0.5)
        weight = numpyro.param(f"{name} weight", lambda key: start.sample(key, (num_in, num_out)))
        bias = numpyro.param(f"{name} bias", lambda key: start.sample(key, (num_out,)))
        return lambda y: y @ weight + bias

    def model(x):
        gates = dense("gate 1", k, hidden), dense("gate 2", hidden, k)
        proposals = dense("proposal 1", k, hidden), dense("proposal 2", hidden, k)
        linear, to_scale = dense("linear", k, k), dense("scale", k, k)
        emit = dense("emit 1", k, sizes.emission), dense("emit 2", sizes.emission, sizes.emission)
        logits = dense("logits", sizes.emission, sizes.features)
        z_0 = numpyro.param("z_0", jnp.zeros(k))

        def transition(z):
            gate = jax.nn.sigmoid(gates[1](jax.nn.relu(gates[0](z))))
            proposal = proposals[1](jax.nn.relu(proposals[0](z)))
            loc = (1 - gate) * linear(z) + gate * proposal
            return dist.Normal(loc, jax.nn.softplus(to_scale(jax.nn.relu(proposal))))

        def step(z, x_t):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", transition(z).to_event(1))
                y = jax.nn.relu(emit[1](jax.nn.relu(emit[0](z))))
                numpyro.sample("x", dist.Bernoulli(logits=logits(y)).to_event(1), obs=x_t)
            return z, None

        scan(step, jnp.broadcast_to(z_0, (len(x), k)), x.swapaxes(0, 1))

    def guide(x):
        read, remember = dense("read", x.shape[-1], sizes.rnn), dense("rnn", sizes.rnn, sizes.rnn)
        past, to_loc = dense("past", k, sizes.rnn), dense("loc", sizes.rnn, k)
        to_scale, z_q_0 = dense("q scale", sizes.rnn, k), numpyro.param("z_q_0", jnp.zeros(k))

        def reader(h, y):
            h = jax.nn.relu(y + remember(h))
            return h, h

        backward = read(x).swapaxes(0, 1)
        _, h = jax.lax.scan(reader, jnp.zeros(backward.shape[1:]), backward, reverse=True)

        def step(z, h_t):
            h_t = 0.5 * (jnp.tanh(past(z)) + h_t)
            q = dist.Normal(to_loc(h_t), jax.nn.softplus(to_scale(h_t)))
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", q.to_event(1))
            return z, None

        scan(step, jnp.broadcast_to(z_q_0, (len(x), k)), h)

    key, x = jax.random.key(0), jnp.asarray(x)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    parameters = svi.get_params(svi.init(key, x))

    def loss(parameters, key, x):
        return Trace_ELBO().loss(key, parameters, model, guide, x)

    with_gradients = jax.jit(jax.value_and_grad(loss))

    def step():
        value, gradients = with_gradients(parameters, key, x)
        jax.block_until_ready(gradients)
        return float(value)

    return step
