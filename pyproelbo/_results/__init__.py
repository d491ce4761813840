"""What all results share: how their tables look, their notes, and the way on to xarray."""
