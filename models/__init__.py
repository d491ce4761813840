"""Generative models as Pyro programs; their guides have the same names in pyproelbo.guides."""
