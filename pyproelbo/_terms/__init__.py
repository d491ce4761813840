"""From the traces of two programs to :class:`~pyproelbo.Terms`."""
