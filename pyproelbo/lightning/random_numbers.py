"""The random numbers of several processes."""

import torch

from pyproelbo._backend import rng
from pyproelbo._processes import TrainingProcesses


def draw_apart(processes: TrainingProcesses) -> None:
    """Let processes whose generators are in one state, as after one seed, draw different numbers.

    Those of the first process are unchanged.
    """
    rank, states = processes.rank, processes.gathered(torch.get_rng_state())
    if any(torch.equal(states[rank], state) for state in states[:rank]):
        drawn = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
        rng.begin(rng.seed_of(drawn, rank))
