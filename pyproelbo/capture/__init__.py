r"""Captured steps: a Pyro program trained without the cost of Pyro, nor of autograd.

With ``compile=True`` an objective runs the first training step of a model and a guide as ever. At
the second it captures the step, the loss and all its gradients, in one graph of tensor operations,
and from there runs that in place of the programs::

    objective = BetaELBO(beta=Linear(0.0, 1.0, steps=1000), compile=True)

in ``SVI``, as an ``nn.Module`` and under Lightning alike. The numbers are those of eager steps at
the same seed, but for rounding: random numbers come from torch's generators in the order of the
program.

No step waits for a compiler. The graph runs at once, operation by operation, which spares the
program's Python. Meanwhile torch's inductor compiles it in a process of its own, of the lowest
priority: 15 to 30 seconds of CPU time for a small VAE. When that is done, and what it has made
makes the step that the graph makes, it takes over, and no number shows when, but for rounding. The
two first take turns for ten steps; where the compiled one is 1.5 times slower, the graph stays, and
a warning says so. A training that ends before its compiler ends that, too. What has been compiled
lies in torch's folder of compiled graphs (``TORCHINDUCTOR_CACHE_DIR``), where later processes find
it, so that they run it from their third step on. Each further structure of the arguments has its
own graph, which starts at once and is compiled in turn. ``Capture(background=False)`` waits for the
compiler instead, so that rounding is the same in each run.

What stays live: parameters, buffers and data, whatever changes the numbers in them; masks, and all
other tensors that are arguments; weights, as a beta that rises; subsampling. Python floats among
the arguments are inputs, too, once a second value of them is met; if Python looks at one, as by
``if beta > 0`` or an f-string, each of its values has a graph of its own.

What makes another graph: another shape, dtype or device of an argument, another whole number or
string as an argument; ``train()`` and ``eval()``; ``requires_grad_()``; another layer, parameter,
buffer, number or function in the place of one that the programs use, in a module, an object, a list
or dict of up to 100 entries, a closure or a global variable; another dtype, shape or class of
these; autocast, the default dtype and device. As many graphs are kept as
``Capture(max_graphs=...)`` says. A structure that is met once, as a batch that is never so short
again, costs nothing.

What cannot be captured runs eagerly, and one :class:`CaptureWarning` says what it was, with the
site and the line where that is known:

- Python that depends on numbers in tensors: ``if z > 0``, ``.item()``, ``.numpy()``, ``x[x > 0]``;
  where Pyro's validation reads them, it is switched off in the graph, after an eager step that was
  validated;
- random numbers of Python, NumPy or a ``torch.Generator`` of one's own;
- attributes that a step of a module changes, as counters; make them buffers;
- arguments that are neither tensors nor numbers, strings, or tuples, lists, dicts, dataclasses and
  namespaces of these; bind them, once: ``functools.partial(model, config=config)``;
- hooks of modules, of all modules, and of parameters, but for torch's own, as of ``weight_norm``;
  those of autograd's own nodes, as of DistributedDataParallel, are called where the loss is taken
  back as a tensor, and not by SVI;
- steps within effect handlers, within ``torch.autograd.detect_anomaly``, and within the call of a
  PyroModule that keeps samples;
- float16, whose gradients would vanish, as a graph takes them before ``GradScaler`` scales the
  loss;
- second derivatives of the loss raise an error.

Python itself runs once: what only Python sees is not seen again, as the next number of an iterator,
nor does a ``print`` print. To find that, the first step that is replayed is also run eagerly and
compared; ``Capture(check=...)`` compares more of them. Whether steps are captured is seen in that
there is no warning, and in the time of a step.

Sequence-valued sites are sampled in a loop over time. That loop, and a recurrent net under
``sequences.opaque``, are one operation of the graph, which runs as it does eagerly, for any T.
Loops that a program makes by itself become as many operations as they have, which take long to
capture, and are not compiled from ``Capture(max_nodes=...)`` on.

On an x86 CPU large products of float32 matrices are oneDNN's in place of MKL's, which is twice as
fast where the processor is not Intel's; ``torch.backends.mkldnn.flags(enabled=False)`` around the
first steps leaves them to MKL.

On a GPU the compiled step is recorded as a CUDA graph, so that a step is one launch, and with
``Capture(lazy_loss=True)`` no step waits for the device. This has not been run on a GPU yet: should
the recording fail there, or give other numbers than the program, a warning says so.
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
