"""Modules with parameters that are nothing special, and the values of these."""

import torch
from torch import nn


def at_random(*modules):
    """The modules, with nothing special about their parameters."""
    with torch.no_grad():
        for parameter in nn.ModuleList(modules).parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return modules


def values(*modules):
    """A copy of each parameter."""
    return [p.detach().clone() for module in modules for p in module.parameters()]
