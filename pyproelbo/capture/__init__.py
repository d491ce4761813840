r"""Captured steps: training a Pyro program without the overhead of Pyro and autograd.

With ``compile=True`` an objective runs the first training step of a model and a guide as usual. At
the second it captures the step, with the loss and all its gradients, in one graph of tensor
operations, and from then on runs that in place of the programs::

    objective = BetaELBO(beta=Linear(0.0, 1.0, steps=1000), compile=True)

in ``SVI``, as an ``nn.Module`` and under Lightning alike. Up to rounding, the numbers are those of
eager steps at the same seed: random numbers come from torch's generators in the order of the
program.

No step waits for a compiler. The graph runs at once, operation by operation, which avoids the
program's Python. Meanwhile torch's inductor compiles it in a separate process of the lowest
priority: 15 to 30 seconds of CPU time for a small VAE. When the compiled step is ready and agrees
with the graph, it takes over, with no change in the numbers except rounding. First the two
alternate for ten steps; if the compiled one is 1.5 times slower, the graph stays, and a warning is
given. A training that ends before its compiler stops that too. Compiled graphs are kept in torch's
folder (``TORCHINDUCTOR_CACHE_DIR``), where later processes find them and run them from their third
step on. Each further structure of the arguments has its own graph, which starts at once and is
compiled in turn. ``Capture(background=False)`` waits for the compiler instead, which makes rounding
the same in each run.

What stays live: parameters, buffers and data, whatever changes the numbers in them; masks, and all
other tensors that are arguments; weights, such as a rising beta; subsampling. Python floats among
the arguments become inputs too, once a second value of them is met; if Python inspects one, as by
``if beta > 0`` or an f-string, each of its values has its own graph.

What makes another graph: another shape, dtype or device of an argument, another whole number or
string as an argument; ``train()`` and ``eval()``; ``requires_grad_()``; another layer, parameter,
buffer, number or function in the place of one that the programs use, in a module, an object, a list
or dict of up to 100 entries, a closure or a global variable; another dtype, shape or class of
these; autocast, the default dtype and device. At most ``Capture(max_graphs=...)`` graphs are kept.
A structure that is met only once, such as a single short batch, costs nothing.

What cannot be captured runs eagerly, and one :class:`CaptureWarning` names it, with the site and
the line where known:

- Python that depends on numbers in tensors: ``if z > 0``, ``.item()``, ``.numpy()``, ``x[x > 0]``;
  where Pyro's validation reads them, it is disabled in the graph, after an eager step with
  validation;
- random numbers of Python, NumPy or a ``torch.Generator`` other than the default;
- attributes of a module that a step changes, such as counters; make them buffers;
- arguments that are neither tensors nor numbers, strings, or tuples, lists, dicts, dataclasses and
  namespaces of these; bind them once: ``functools.partial(model, config=config)``;
- hooks of modules, of all modules, and of parameters, except torch's own, such as
  ``weight_norm``'s; hooks of autograd's nodes, such as DistributedDataParallel's, are called where
  the loss is back-propagated as a tensor, but not by SVI;
- steps within effect handlers, within ``torch.autograd.detect_anomaly``, and within the call of a
  PyroModule that keeps samples;
- float16, whose gradients would vanish, since a graph computes them before ``GradScaler`` scales
  the loss;
- second derivatives of the loss raise an error.

Python itself runs once: effects outside tensors, such as the next number of an iterator or a
``print``, do not recur. To detect this, the first replayed step is also run eagerly and compared;
``Capture(check=...)`` compares more of them. If there is no warning, steps are captured, as their
duration also shows. Compiled steps are compared in the same way. With torch 2.6 some of them do not
agree, and run as graphs, with a warning: take a later release (2.11, 2.13 and 2.14 are tested).

Sequence-valued sites are sampled in a loop over time. That loop, and a recurrent net under
``sequences.opaque``, are one operation of the graph, which runs as it does eagerly, for any T. A
program's own loops become as many operations as they execute, which take long to capture, and are
not compiled beyond ``Capture(max_nodes=...)``.

In a step of Pyro's ``SVI`` with a :class:`~pyproelbo.SharedOptim` of torch's Adam, AdamW or SGD the
compiled graph ends with the update of the parameters, if there are at most 64: it writes to them,
and to the states of the optimiser, which stay live, can be saved, and follow the learning rates of
a scheduler. The optimiser then finds no gradient, and nothing to do. Where it has more to do than
that, it does it itself, after the step: for clipped gradients, hooks of optimisers, parameters with
arguments of their own, gradients that are there already, arguments that share memory with a
parameter, loops over time and other opaque functions, and a loss that is not finite, of which the
warning comes before the update.

On an x86 CPU large float32 matrix products use oneDNN in place of MKL, which is twice as fast on
processors not made by Intel; ``torch.backends.mkldnn.flags(enabled=False)`` around the first steps
keeps MKL.

On a GPU the compiled step is recorded as a CUDA graph, which makes a step one launch, and with
``Capture(lazy_loss=True)`` no step waits for the device. This has not been run on a GPU yet: should
the recording fail there, or give other numbers than the program, a warning is given.
"""

from pyproelbo.capture.calls import Call, Parts, Replay
from pyproelbo.capture.lazy import LazyLoss
from pyproelbo.capture.options import Capture, CaptureWarning, as_capture
from pyproelbo.capture.records import Records
from pyproelbo.capture.steps import CapturedSteps

__all__ = [
    "Call",
    "Capture",
    "CaptureWarning",
    "CapturedSteps",
    "LazyLoss",
    "Parts",
    "Records",
    "Replay",
    "as_capture",
]
