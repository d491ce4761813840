"""Shared by all results: the look of tables, notes, and conversion to xarray."""
