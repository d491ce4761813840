"""Fits that end by themselves."""
