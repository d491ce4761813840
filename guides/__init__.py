"""Amortised guides as Pyro programs, under the names of their models in pyproelbo.models."""
