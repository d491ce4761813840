"""A guide over a data set: in batches, row by row."""
