"""Fits that stop by themselves."""
