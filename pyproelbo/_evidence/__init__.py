"""Estimates of log p(x), and of what separates it from its bound."""
