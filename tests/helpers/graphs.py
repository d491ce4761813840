"""Graphs as captures record them."""

from pyproelbo._backend import tracing


class _Recording(tracing.DispatchMode):
    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.recorder.run(func, args, kwargs or {})


def graph_of(function, *tensors):
    """The graph of a function from tensors to a tensor, or a list of these."""
    with tracing.recording(tensors) as recorder, _Recording(recorder):
        value = function(*tensors)
    return recorder.module(value if isinstance(value, list) else [value])
