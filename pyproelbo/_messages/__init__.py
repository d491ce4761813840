"""Checks of the user's input, and messages to the user."""
