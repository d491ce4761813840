"""A fit in ArviZ's form."""
