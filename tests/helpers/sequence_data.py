"""Small sequences for models of sequences: whole, of several lengths, with steps missing, wrong."""

import torch
from helpers.oracles import rows

B, T, k, D = 4, 7, 2, 3  # sequences, steps, latents and features
PARTICLES = {
    "one": {},
    "looped": {"num_particles": 2},
    "vectorised": {"num_particles": 2, "vectorize_particles": True},
}


def data(num_inputs=0, lengths=False, observed=False):
    """Arguments of the programs; what does not count is NaN."""
    arguments = {"x": rows(B, T, D)}
    seen = torch.ones(B, T, dtype=torch.bool)
    if num_inputs:
        arguments["inputs"] = rows(B, T, num_inputs).flip(0)
        arguments["inputs"][:, 0] = torch.nan
    if lengths:
        arguments["lengths"] = torch.tensor([T, 5, 1, 4])
        seen &= torch.arange(T) < arguments["lengths"][:, None]
        if num_inputs:
            arguments["inputs"][~seen] = torch.nan
    if observed:
        arguments["observed"] = torch.rand(B, T) > 0.4
        arguments["observed"][0, 0] = arguments["observed"][1, 4] = False
        arguments["observed"][2, 0] = True
        seen &= arguments["observed"]
    arguments["x"][~seen] = torch.nan
    return arguments, seen


def own(arguments):
    """bool (B, T): which steps are no padding."""
    lengths = arguments.get("lengths", torch.full((B,), T))
    return torch.arange(T) < lengths[:, None]


WRONG = {  # what is wrong: arguments, of a fitting x, and what is said
    "one sequence": (lambda x: {"x": x[0]}, r"x should have shape \(B, T, 3\)"),
    "other features": (lambda x: {"x": x[..., :2]}, r"x should have shape \(..., T, 3\)"),
    "no steps": (lambda x: {"x": x[:, :0]}, "x should have shape .* with T at least 1"),
    "no sequences": (lambda x: {"x": x[:0]}, "x should have at least one row"),
    "NaN that counts": (lambda x: {"x": x + torch.nan}, "x should be finite"),
    "infinite": (lambda x: {"x": x + torch.inf}, "x should be finite"),
    "long lengths": (lambda x: {"lengths": torch.full((B,), T + 1)}, "lengths should be from 1"),
    "zero lengths": (lambda x: {"lengths": torch.arange(B)}, "lengths should be from 1"),
    "lengths not whole": (lambda x: {"lengths": torch.ones(B)}, "lengths should be whole"),
    "lengths of others": (lambda x: {"lengths": torch.ones(3)}, "lengths should have shape"),
    "observed not bool": (lambda x: {"observed": x[..., 0]}, "observed should be bool"),
    "observed of others": (lambda x: {"observed": x[1:, :, 0] > 0}, "observed should have shape"),
    "inputs": (lambda x: {"inputs": x}, "inputs should not be given: num_inputs is 0"),
}
WRONG_INPUTS = {
    "none": (lambda u: None, "inputs should be given: num_inputs is 2"),
    "of others": (lambda u: u[1:], r"inputs should have shape \(4, 7, 2\)"),
    "NaN that counts": (lambda u: u + torch.nan, "inputs should be finite"),
}
