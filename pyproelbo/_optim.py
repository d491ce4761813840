"""One torch optimiser for all parameters, with the interface of Pyro's."""

import inspect
from collections.abc import Callable, Iterable, Mapping

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyproelbo._backend.updates import Update

_IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}


class SharedOptim(PyroOptim):
    """A torch optimiser that the parameters of :class:`pyro.infer.SVI` share.

    Pyro's optimisers hold one torch optimiser for each parameter; this holds one for all, fused
    where torch has that, which makes the same updates in a fraction of the time.

    >>> import torch
    >>> optim = SharedOptim(torch.optim.Adam, {"lr": 1e-3})

    which ``SVI(model, guide, optim, loss)`` takes as it does Pyro's. With ``compile=True`` in the
    loss, a compiled step makes the updates of Adam, AdamW and SGD as well; see
    :mod:`pyproelbo.capture`.

    Parameters may appear at any step; those that a step has not used are unchanged. After its
    update a parameter's ``.grad`` is None, which SVI treats as zero.

    Args:
        optimizer: a class of ``torch.optim``, or of ``pyro.optim`` that is one of torch's.
        optim_args: its arguments, or a function from a parameter's name to them, as for Pyro's
            optimisers; parameters with equal arguments share an optimiser.
        clip_args: {"clip_norm": ...}, of the gradients of all parameters of the step together, or
            {"clip_value": ...}.
        scheduler: from an optimiser to its ``torch.optim.lr_scheduler``, which :meth:`step`
            advances: ``partial(StepLR, step_size=100)``.

    Raises:
        ValueError: for other ``clip_args``.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        optim_args: Mapping[str, object] | Callable[[str], Mapping[str, object]],
        clip_args: Mapping[str, float] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        unknown = set(clip_args or ()) - {"clip_norm", "clip_value"}
        if unknown:
            raise ValueError(
                "clip_args should only have the keys clip_norm and clip_value, got "
                f"{sorted(unknown)}"
            )
        args = optim_args if callable(optim_args) else dict(optim_args)
        super().__init__(optimizer, args)  # type: ignore[arg-type]
        self._clip = dict(clip_args or {})
        self._scheduler = scheduler
        self._optimizers: dict[str, Optimizer] = {}  # by their arguments
        self._schedulers: dict[str, LRScheduler] = {}
        self._key: dict[Tensor, str] = {}  # of each parameter's optimiser
        self._updates: dict[str, Update | None] = {}  # that repeat the last steps

    def __call__(self, params: Iterable[Tensor], *args: object, **kwargs: object) -> None:
        """Update these parameters by their gradients."""
        params = list(params)
        self._add([p for p in params if p not in self._key])
        if "clip_norm" in self._clip:
            clip_grad_norm_(params, self._clip["clip_norm"])
        if "clip_value" in self._clip:
            clip_grad_value_(params, self._clip["clip_value"])
        for key, optimizer in self._optimizers.items():
            update = None if args or kwargs else self._updates.get(key)
            if update is not None and update.is_made():
                continue
            if update is not None and update.is_next():
                update.make()
            else:
                optimizer.step(*args, **kwargs)  # type: ignore[arg-type]
                self._updates[key] = Update.after(optimizer)
        for p in params:
            p.grad = None

    def _next(self) -> Update | None:
        """The one update that the next call makes, if it is of the same parameters as the last.

        None where there is more to it. A step that makes the update by itself leaves no gradient,
        and nothing to do for the call.
        """
        if type(self) is not SharedOptim or self._clip or len(self._optimizers) != 1:
            return None
        (key,) = self._optimizers
        return self._updates.get(key)

    def step(self, *args: object, **kwargs: object) -> None:
        """Advance the learning rates; arguments are those of the scheduler's ``step``."""
        for scheduler in self._schedulers.values():
            scheduler.step(*args, **kwargs)  # type: ignore[arg-type]

    def get_state(self) -> dict[str, dict]:
        """The state of each parameter by name, in the form of Pyro's optimisers.

        Raises:
            ValueError: if a parameter has no name in Pyro's store, as when it is local to its
                module.
        """
        store, state = pyro.get_param_store(), {}
        for p, key in self._key.items():
            if store.param_name(p) is None:
                raise ValueError(
                    "Pyro's parameter store has no name for a parameter of shape "
                    f"{tuple(p.shape)}, and its state could not be found again: take the state "
                    "before pyro.clear_param_store(), and without module_local_params"
                )
            optimizer = self._optimizers[key]
            group = {**optimizer.param_groups[0], "params": [0]}
            own = optimizer.state.get(p)
            of_p: dict = {"state": {} if own is None else {0: own}, "param_groups": [group]}
            if key in self._schedulers:
                of_p = {"scheduler": self._schedulers[key].state_dict(), "optimizer": of_p}
            state[store.param_name(p)] = of_p
        return state

    def set_state(self, state_dict: dict[str, dict]) -> None:
        """Continue from a state, also of Pyro's optimisers; for new parameters when they appear."""
        super().set_state(state_dict)
        self._load(self._key)

    def _add(self, params: list[Tensor]) -> None:
        for p in params:
            args = dict(self._get_optim_args(p))
            is_fusible = p.is_floating_point() and p.device.type in ("cpu", "cuda")
            if is_fusible and not _IMPLEMENTATIONS & set(args) and _has_fused(self._constructor):
                args["fused"] = True
            key = self._key[p] = repr(sorted(args.items()))
            if key in self._optimizers:
                self._optimizers[key].param_groups[0]["params"].append(p)
            else:
                optimizer = self._optimizers[key] = self._constructor([p], **args)
                if self._scheduler is not None:
                    self._schedulers[key] = self._scheduler(optimizer)
        if params:
            self._load(params)

    def _load(self, params: Iterable[Tensor]) -> None:
        """Load the states that wait for these parameters."""
        store, waiting = pyro.get_param_store(), self._state_waiting_to_be_consumed
        found = {p: waiting.pop(store.param_name(p), None) for p in params}
        for key, optimizer in self._optimizers.items():
            state = optimizer.state_dict()
            (group,) = state["param_groups"]
            own = zip(group["params"], optimizer.param_groups[0]["params"], strict=True)
            for index, p in own:
                of_p = found.get(p)
                if of_p is None:
                    continue
                if "scheduler" in of_p:
                    if key in self._schedulers:
                        self._schedulers[key].load_state_dict(of_p["scheduler"])
                    of_p = of_p["optimizer"]
                if of_p["state"]:
                    (state["state"][index],) = of_p["state"].values()
                (known,) = of_p["param_groups"]
                skipped = {"params", *_IMPLEMENTATIONS}
                group.update({name: x for name, x in known.items() if name not in skipped})
            optimizer.load_state_dict(state)
            self._updates.pop(key, None)  # whose states are others now

    @property
    def _constructor(self) -> Callable[..., Optimizer]:
        return self.pt_optim_constructor  # type: ignore[return-value]


def _has_fused(optimizer: Callable[..., Optimizer]) -> bool:
    # SGD's fused form takes no parameter that appears after the first step
    return optimizer is not torch.optim.SGD and "fused" in inspect.signature(optimizer).parameters
