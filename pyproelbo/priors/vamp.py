"""The variational mixture of posteriors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, constraints, transform_to

from pyproelbo._backend.unregistered import Unregistered
from pyproelbo.priors.mixture import MixturePrior

MARGIN = 0.05  # of the width of an interval: near its ends pseudo-inputs would hardly move


class VampPrior(MixturePrior):
    r"""p(z) = sum_k w_k q(z | u_k), a mixture of the posteriors of K learned pseudo-inputs u_k.

    Tomczak & Welling (2018), "VAE with a VampPrior", eq. 9; w_k = 1 / K there. The best prior for
    a given q is the aggregate posterior (1/N) sum_n q(z | x_n); this one approximates it with K <<
    N inputs, using the guide's own encoder:

    >>> import torch
    >>> import pyproelbo as pe
    >>> from pyproelbo.guides.vae import Diagonal
    >>> from pyproelbo.models.vae import VAE
    >>> x = torch.rand(500, 64)
    >>> guide = Diagonal(num_latents=2, num_features=64)
    >>> init, images = pe.priors.RowsOf(x), constraints.unit_interval
    >>> prior = pe.VampPrior(guide.posterior, 20, init, constraint=images)
    >>> model = VAE(num_latents=2, num_features=64, prior=prior)
    >>> prior.pseudo_inputs.shape, prior().batch_shape, prior().event_shape
    (torch.Size([20, 64]), torch.Size([]), torch.Size([2]))

    The encoder's parameters remain the guide's: this module does not register them. They are only
    in the guide's ``parameters()`` and ``state_dict()``, and move to a device with it. A deep copy
    of the model alone has its own copy of the encoder; copy model and guide in one call to keep
    them together.

    The encoder runs on the K pseudo-inputs once for each run of the model, and once for each
    training step of our objectives, however many particles they loop over.

    Args:
        encoder: returns q(z | u), batch shape (K,), for inputs u of shape (K, *S).
        num_components: K.
        init: called with K, returns the initial pseudo-inputs, (K, *S), such as
            :class:`RowsOf`, :class:`MomentsOf` or :class:`RandomInputs`.
        constraint: the set of values that pseudo-inputs stay in, one of
            ``torch.distributions.constraints``. The initial ones are moved inside an interval by
            five per cent of its width: near its ends they would hardly move.
        learned_weights: whether the components' weights are learned; otherwise each is 1 / K.

    Raises:
        ValueError: if ``init`` returns anything but K finite inputs within the constraint; when the
            prior is called, if the encoder's distribution does not have batch shape (K,).
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Distribution],
        num_components: int,
        init: Callable[[int], Tensor],
        *,
        constraint: Any = constraints.real,
        learned_weights: bool = False,
    ) -> None:
        super().__init__(num_components, learned_weights)
        self._encoder = Unregistered(encoder)
        self.constraint = constraint
        start = init(num_components).detach()
        if start.shape[:1] != (num_components,):
            raise ValueError(
                f"init should return {num_components} inputs, (K, ...), got {tuple(start.shape)}"
            )
        if not (start.isfinite().all() and constraint.check(start).all()):
            raise ValueError(
                f"init should return finite inputs that satisfy {constraint}: scale the data so "
                "that they do, or take another constraint"
            )
        if hasattr(constraint, "lower_bound") and hasattr(constraint, "upper_bound"):
            margin = MARGIN * (constraint.upper_bound - constraint.lower_bound)
            start = start.clamp(constraint.lower_bound + margin, constraint.upper_bound - margin)
        start = transform_to(constraint).inv(start)
        if not start.isfinite().all():
            raise ValueError(
                f"init returned inputs on the boundary of {constraint}, where they would have no "
                "gradient: move them inside"
            )
        self.unconstrained = nn.Parameter(start)

    @property
    def pseudo_inputs(self) -> Tensor:
        """u_k, (K, *S)."""
        return transform_to(self.constraint)(self.unconstrained)

    def components(self) -> Distribution:
        """q(z | u_k) of the pseudo-inputs, batch shape (K,)."""
        return encode(self._encoder.module, self.pseudo_inputs)


def encode(encoder: Callable[[Tensor], Distribution], inputs: Tensor) -> Distribution:
    """q(z | u_k) of inputs (K, *S), batch shape (K,).

    Raises:
        ValueError: if the encoder returns no distribution, or one with another batch shape.
    """
    d = encoder(inputs)
    if not isinstance(d, Distribution):
        raise ValueError(
            "encoder should return the distribution q(z | u) of inputs u, got a "
            f"{type(d).__name__}: a guide draws z from it and is not one; give what returns it, "
            "such as the method `posterior` of the guides in pyproelbo.guides.vae"
        )
    if d.batch_shape != inputs.shape[:1]:
        raise ValueError(
            f"encoder should return a distribution of batch shape ({len(inputs)},) for inputs of "
            f"shape {tuple(inputs.shape)}, got batch shape {tuple(d.batch_shape)} and event shape "
            f"{tuple(d.event_shape)}: .to_event(1) makes dims of z event dims"
        )
    return d
