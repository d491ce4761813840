"""A captured step as a CUDA graph: one launch, whatever it contains."""

from torch import Tensor, cuda

from pyproelbo.capture.options import GraphFunction

_WARM_UP = 3  # runs in which libraries set themselves up


class CudaGraph:
    """A function of CUDA tensors that is recorded once, and replayed without work on the host.

    The first arguments are copied to where the graph reads them. The others, parameters and
    buffers, are read and written in place; if one has moved, the function runs unrecorded. Random
    numbers continue from torch's generator at each replay.

    Args:
        run: the function. It is run a few times; the caller must undo the random numbers and writes
            of these runs.
        arguments: of its first call.
        inputs: those that follow them at each call.
        passing: which results the next call may write over.
    """

    def __init__(
        self,
        run: GraphFunction,
        arguments: list[Tensor],
        inputs: list[Tensor],
        passing: range = range(0),
    ) -> None:
        self._run, self._passing = run, passing
        self._places = [x.clone() for x in arguments]
        self._addresses = [x.data_ptr() for x in inputs]
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(_WARM_UP):
                run(*self._places, *inputs)
        cuda.current_stream().wait_stream(stream)
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph):
            self._outputs = run(*self._places, *inputs)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The function's result; by a plain call if the inputs have moved."""
        num = len(self._places)
        if [x.data_ptr() for x in tensors[num:]] != self._addresses:
            return self._run(*tensors)
        for place, x in zip(self._places, tensors[:num], strict=True):
            place.copy_(x)
        self._graph.replay()
        # the next replay writes over them
        return [x if i in self._passing else x.clone() for i, x in enumerate(self._outputs)]
