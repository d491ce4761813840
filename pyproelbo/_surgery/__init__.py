"""ELBO surgery of a whole data set."""
